"""Transformers in CTranslate2, int8, in its own environment; the argument names one of SHAPES.

What a user would pick instead of a recurrent model. A shape has its own
sizes and the job's vocabulary; the job's other sizes belong to recurrent networks.
"""

import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import ctranslate2  # type: ignore[import-not-found]
import numpy
from ctranslate2.specs import TransformerSpec  # type: ignore[import-not-found]

from bench.peers.job import SPECIAL, Job, Sizes, batches, serve

EOS = "</s>"


@dataclass(frozen=True)
class Shape:
    encoder_layers: int
    decoder_layers: int
    width: int
    feed_forward: int
    heads: int

    def __str__(self) -> str:
        return (
            f"Transformer of {self.encoder_layers} + {self.decoder_layers} layers of {self.width}, "
            f"feed-forward {self.feed_forward}, {self.heads} heads, int8"
        )


SHAPES = {
    "tiny": Shape(4, 4, 128, 256, 4),  # reaches 41.02 BLEU on Multi30k when trained
    "browser": Shape(6, 2, 256, 1536, 8),  # the size of browsers' translators
}


class CTranslate2:
    def __init__(self, shape: Shape, sizes: Sizes) -> None:
        self.system = f"CTranslate2 {ctranslate2.__version__}"
        self.network = str(shape)
        self.folder = tempfile.TemporaryDirectory()
        specification(shape, sizes.vocabulary).save(self.folder.name)
        self.translator: Any = None
        self.threads = 0

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        if self.threads != job.threads:
            self.translator = ctranslate2.Translator(
                self.folder.name, device="cpu", compute_type="int8",
                inter_threads=1, intra_threads=job.threads,
            )
            self.threads = job.threads
        lengths = []
        for sentences in batches(sources, job.batch):
            texts = [[*(f"w{id}" for id in ids[:-1]), EOS] for ids in sentences]
            found = self.translator.translate_batch(
                texts, beam_size=job.beam_size, min_decoding_length=job.tokens,
                max_decoding_length=job.tokens,
            )
            lengths += [len(result.hypotheses[0]) for result in found]
        return lengths


def specification(shape: Shape, vocabulary: int) -> TransformerSpec:
    """A model of random weights, quantised."""
    draw = numpy.random.default_rng(1)
    spec = TransformerSpec.from_config((shape.encoder_layers, shape.decoder_layers), shape.heads)
    width = shape.width

    def uniform(*size: int) -> Any:
        return draw.uniform(-0.1, 0.1, size).astype(numpy.float32)

    def linear(layer: Any, inputs: int, outputs: int) -> None:
        layer.weight, layer.bias = uniform(outputs, inputs), uniform(outputs)

    def norm(layer: Any) -> None:
        layer.gamma, layer.beta = numpy.ones(width, numpy.float32), uniform(width)

    def attention(layer: Any, products: list[int]) -> None:
        norm(layer.layer_norm)
        for product, outputs in zip(layer.linear, products, strict=True):
            linear(product, width, outputs)

    def feed_forward(layer: Any) -> None:
        norm(layer.layer_norm)
        linear(layer.linear_0, width, shape.feed_forward)
        linear(layer.linear_1, shape.feed_forward, width)

    for side in (spec.encoder, spec.decoder):
        embeddings = side.embeddings[0] if isinstance(side.embeddings, list) else side.embeddings
        embeddings.weight = uniform(vocabulary, width)
        norm(side.layer_norm)
        for layer in side.layer:
            attention(layer.self_attention, [3 * width, width])
            feed_forward(layer.ffn)
    for layer in spec.decoder.layer:
        attention(layer.attention, [width, 2 * width, width])
    linear(spec.decoder.projection, width, vocabulary)
    words = ["<unk>", "<s>", EOS, "<pad>", *(f"w{id}" for id in range(SPECIAL, vocabulary))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.validate()
    spec.optimize(quantization="int8")
    return spec


if __name__ == "__main__":
    serve(lambda sizes: CTranslate2(SHAPES[sys.argv[1]], sizes))
