"""fairseq's LSTM and its sequence generator, in fairseq's environment."""

from importlib.metadata import version

import torch
from fairseq.data import Dictionary  # type: ignore[import-not-found]
from fairseq.data.data_utils import collate_tokens  # type: ignore[import-not-found]
from fairseq.models.lstm import (  # type: ignore[import-not-found]
    LSTMDecoder,
    LSTMEncoder,
    LSTMModel,
)
from fairseq.sequence_generator import SequenceGenerator  # type: ignore[import-not-found]

from bench.peers.job import SPECIAL, Job, Sizes, batches, randomise, serve


class Fairseq:
    def __init__(self, sizes: Sizes) -> None:
        self.dictionary = Dictionary()
        for i in range(sizes.vocabulary - SPECIAL):
            self.dictionary.add_symbol(f"w{i}")
        encoder = LSTMEncoder(
            self.dictionary, embed_dim=sizes.embedding_size, hidden_size=sizes.hidden_size // 2,
            num_layers=sizes.layers, bidirectional=True,
        )
        decoder = LSTMDecoder(
            self.dictionary, embed_dim=sizes.embedding_size, hidden_size=sizes.hidden_size,
            out_embed_dim=sizes.hidden_size, num_layers=sizes.layers,
            encoder_output_units=encoder.output_units,
        )
        self.model = LSTMModel(encoder, decoder)
        randomise(self.model)
        self.model.eval()
        self.model.make_generation_fast_(need_attn=False)  # as fairseq-generate does
        self.system = f"fairseq-fixed {version('fairseq-fixed')}"
        self.network = (
            f"bidirectional encoder {sizes.layers} x {sizes.hidden_size // 2} each way, no "
            f"bridge, decoder {sizes.layers} x {sizes.hidden_size}, its one attention, input "
            "feeding (it has no other decoder), the last of the tokens is EOS"
        )

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        eos, pad = self.dictionary.eos(), self.dictionary.pad()
        # Its lengths leave EOS out, which takes a step more.
        generator = SequenceGenerator(
            [self.model], self.dictionary, beam_size=job.beam_size, max_len_a=0,
            max_len_b=job.tokens - 1, min_len=job.tokens - 1,
        )
        lengths = []
        for sentences in batches(sources, job.batch):
            ids = [torch.tensor([*one[:-1], eos]) for one in sentences]
            sample = {
                "net_input": {
                    "src_tokens": collate_tokens(ids, pad, eos, left_pad=True),
                    "src_lengths": torch.tensor([len(one) for one in ids]),
                }
            }
            found = generator.generate([self.model], sample)
            lengths += [len(one[0]["tokens"].tolist()) for one in found]
        return lengths


if __name__ == "__main__":
    serve(Fairseq)
