"""Our engine: `python -m bench.peers.ours < job.json`."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.peers.job import Job, Sizes, serve
from handler.decoding import DecodingOptions, Engine, decode_in_order, native
from handler.decoding.model import load
from model import ModelOptions, Network, ServingModel
from model.native import build
from model.quantized import quantized
from model.serving import scripted
from training.export import LIBRARIES


class Ours:
    system = "ours"
    int8 = False

    def __init__(self, sizes: Sizes) -> None:
        options = ModelOptions(
            kind="attention",
            embedding_size=sizes.embedding_size,
            encoder_layers=sizes.layers,
            encoder_hidden_size=sizes.hidden_size // 2,
            decoder_layers=sizes.layers,
            decoder_hidden_size=sizes.hidden_size,
            attention_size=sizes.embedding_size,
        )
        network = Network(options, sizes.vocabulary, sizes.vocabulary)
        model: Any = ServingModel(network, max_source_length=256, max_target_length=256)
        if self.int8:
            model = quantized(model)
        native.enable(build(LIBRARIES, native.library()).parent)
        with tempfile.TemporaryDirectory() as folder:  # loaded as the handler loads it
            path = Path(folder) / "model.pt"
            scripted(model).save(str(path))
            self.model = load(str(path), torch.device("cpu"))
        self.network = (
            f"bidirectional encoder {sizes.layers} x {sizes.hidden_size // 2} each way, learned "
            f"bridge for every layer, decoder {sizes.layers} x {sizes.hidden_size}, 'general' "
            "attention, readout, no input feeding"
        )

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        engine = Engine(self.model, rows=job.batch * job.beam_size)
        options = DecodingOptions(
            beam_size=job.beam_size, min_length=job.tokens, max_length=job.tokens
        )
        with_eos = [[*one[:-1], self.model.eos_id] for one in sources]
        events = decode_in_order(engine, with_eos, options)
        return [len(event.results[0].tokens) for event in events]


if __name__ == "__main__":
    serve(Ours)
