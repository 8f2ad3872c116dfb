"""`train --dry-run`: how large a recipe's training is and how long it takes, before there is data.

Parameters are counted on the meta device, memory is reckoned by formula, and words a second follow
from the products of each part at the rate that this machine makes them, measured within seconds.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from model import ModelOptions, Network
from model.lstm import LSTMStack
from model.network import Attention
from training.batches import BatchSampler
from training.learner import make_optimizer, precision
from training.loss import GeneratorLoss, chunk_rows
from training.recipe import Recipe
from training.run import Run
from training.tokens import TokenPairs
from training.train import choose_device

FLOAT = 4  # bytes
PASSES = 6  # floating point operations of a weight and a word: 2 forward, 4 backward
USUAL_LENGTH = 25  # tokens of a sentence, where nothing is known; about that of news
KERNELS = 100_000_000  # bytes; oneDNN's products in bf16, some 6 MB a shape (model/blocks.py)
SAMPLE_STEPS, SAMPLE_PARAMETERS, SAMPLE_CHUNKS = 8, 8_000_000, 4  # what is timed
REPEATS = 3


@dataclass(frozen=True)
class Load:
    """How much there is to compute.

    source, target: tokens of the largest batch, padding counted; longest: of its sources.
    sentences, words: sentences and target tokens of a usual batch.
    pairs, source_words, target_words: of an epoch; 0 where there is no data yet.
    """

    source: int
    target: int
    longest: int
    sentences: int
    words: float
    pairs: int = 0
    source_words: int = 0
    target_words: int = 0

    @classmethod
    def of(cls, recipe: Recipe, run: Run | None) -> "Load":
        """From prepared data, or else from the recipe: the largest batch is then full of sentences
        of cleaning.max_tokens, as long in the source as in the target, and a usual one is full of
        sentences of USUAL_LENGTH."""
        options = recipe.training
        if run is None or not run.report.exists():
            longest = recipe.cleaning.max_tokens + 1
            tokens = max(longest, min(options.batch_tokens, options.batch_sentences * longest))
            usual = min(options.batch_sentences, max(1, options.batch_tokens // USUAL_LENGTH))
            return cls(tokens, tokens, longest, usual, usual * USUAL_LENGTH)
        pairs = TokenPairs.load(run.data / "train.tokens")
        batches = BatchSampler(
            pairs, options.batch_tokens, options.batch_sentences, options.seed
        ).batches(0)
        source, target = pairs.source_lengths(), pairs.target_lengths()
        padded = [(len(one), int(source[one].max()), int(target[one].max())) for one in batches]
        n, longest, width = max(padded, key=lambda size: size[0] * (size[1] + size[2]))
        words = int(target.sum())
        return cls(
            n * longest, n * width, longest, round(len(pairs) / len(batches)), words / len(batches),
            len(pairs), int(source.sum()), words,
        )  # fmt: skip

    @property
    def source_share(self) -> float:
        """Source words a target word; 1 where nothing is known."""
        return self.source_words / self.target_words if self.target_words else 1.0


@dataclass(frozen=True)
class Part:
    """A part of the network: its parameters, and those that multiply for each word of a side."""

    name: str
    parameters: int
    by_source: int = 0
    by_target: int = 0

    def operations(self, load: Load) -> float:
        """Floating point operations a target word, forward and backward."""
        return PASSES * (self.by_source * load.source_share + self.by_target)


def parts(network: Network) -> list[Part]:
    """Of a network on any device; weights that are tied count once, where they are first named."""
    seen: set[int] = set()

    def count(module: nn.Module | None) -> int:
        own = [] if module is None else [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        return sum(p.numel() for p in own)

    def products(*modules: nn.Module | None) -> int:
        return sum(
            p.numel() for one in modules if one is not None for p in one.parameters() if p.dim() > 1
        )

    attention = network.attention
    by_source = products(attention.key, attention.value) if attention is not None else 0
    return [
        Part("source embedding", count(network.encoder.embedding)),
        Part("encoder", count(network.encoder.stack), by_source=products(network.encoder.stack)),
        Part("bridge", count(network.bridge)),  # once a sentence
        Part("target embedding", count(network.embedding)),
        Part("decoder", count(network.decoder), by_target=products(network.decoder)),
        Part("attention", count(attention), by_source, products(attention) - by_source),
        Part("generator", count(network.generator), by_target=products(network.generator)),
    ]


def memory(recipe: Recipe, network: Network, load: Load, half: bool) -> dict[str, int]:
    """Bytes that training holds at most, by what they are for; what torch itself takes (some
    hundred MB, more with CUDA) comes on top.

    weights, gradients, average: 4 bytes a parameter each; optimiser: 8 with Adam, 0 with SGD.
    working copies: weights that multiply once more in bf16, where that is the precision.
    generator: its gradient twice more, as the loss makes it before its scale is known.
    activations: of a layer of H units that reads X, for each token, b bytes being the precision's:
        what backward reads: X b for its input, 4H gates, H cells before, H squashed cells and H
        outputs in float32, H b states before: X b + 28H + H b; and with dropout 8H more, for mask
        and product. One layer at a time has another (20 + 4 b) H of gradients of its gates.
        Embeddings: 8E a token as read and packed, 16E with dropout. Attention: for each source
        token 8A keys and values; for each target token 4 (2A + H + 2E) and 8 S heads of scores and
        weights, and 8 S A with additive scores. Features: 16F for each target token.
    logits: 12 bytes for each of a chunk: the logits, their logarithms and gradients.
    kernels: KERNELS, in bf16 on a CPU.

    R-Drop reads every batch twice. Under torchrun each process has all of this, and gradients once
    more, in the buckets that are sent.
    """
    options, model = recipe.training, recipe.model
    count = sum(p.numel() for p in network.parameters())
    multiplying = sum(
        p.numel() for name, p in network.named_parameters()
        if p.dim() > 1 and "embedding" not in name
    )  # fmt: skip
    generator = network.generator.weight.numel()
    twice = 2 if options.r_drop else 1
    vocabulary = network.generator.out_features
    rows = min(load.target, chunk_rows(vocabulary, choose_device(options).type))
    return {
        "weights": FLOAT * count,
        "gradients": FLOAT * count,
        "optimiser": 2 * FLOAT * count if options.optimizer == "adam" else 0,
        "average": FLOAT * count if options.average else 0,
        "working copies": 2 * multiplying if half else 0,
        "generator": 2 * FLOAT * generator,
        "activations": twice * activations(model, load, 2 if half else FLOAT),
        "logits": 3 * FLOAT * rows * vocabulary,
        "kernels": KERNELS if half and choose_device(options).type == "cpu" else 0,
    }


def activations(model: ModelOptions, load: Load, b: int) -> int:
    """See `memory`."""
    dropping = 8 if model.dropout else 0
    e, a = model.embedding_size, model.attention_size

    def stack(layers: int, hidden: int, directions: int, tokens: int) -> int:
        inputs = [e, *[hidden * directions] * (layers - 1)]
        kept = sum(x * b + (28 + b + dropping) * hidden * directions for x in inputs)
        return tokens * (kept + (20 + 4 * b) * hidden + (16 if dropping else 8) * e)

    total = stack(model.encoder_layers, model.encoder_hidden_size, model.directions, load.source)
    total += stack(model.decoder_layers, model.decoder_hidden_size, 1, load.target)
    total += 16 * model.feature_size * load.target
    if model.kind == "attention":
        scores = 8 * load.longest * (a if model.attention == "additive" else model.attention_heads)
        readout = FLOAT * (2 * a + model.decoder_hidden_size + 2 * e)
        total += 8 * a * load.source + load.target * (readout + scores)
    return total


@dataclass(frozen=True)
class Meter:
    """Times the learning of small pieces as `Learner` would make it learn."""

    device: torch.device
    precision: torch.dtype

    def seconds(self, act: Callable[[], object]) -> float:
        """The shortest of some calls, after one that is not counted."""
        act()
        return min(self.once(act) for _ in range(REPEATS))

    def once(self, act: Callable[[], object]) -> float:
        """Seconds of one call."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else torch.cpu.synchronize
        wait()
        since = time.perf_counter()
        act()
        wait()
        return time.perf_counter() - since

    def learning(self, loss: Callable[[], Tensor]) -> float:
        """Forward and backward."""
        half = self.precision == torch.bfloat16

        def act() -> None:
            with torch.autocast(self.device.type, self.precision, half):
                made = loss()
            made.backward()

        return self.seconds(act)

    def layer(self, inputs: int, hidden: int, directions: int, sentences: int) -> float:
        """Seconds a token of one LSTM layer."""
        stack = LSTMStack(
            inputs, hidden, 1, bidirectional=directions == 2, dropout=0.0, variational=False,
            recurrent_dropout=0.0, residual=False, layer_norm=False,
        ).to(self.device)  # fmt: skip
        x = torch.randn(sentences, SAMPLE_STEPS, inputs, device=self.device, requires_grad=True)

        def loss() -> Tensor:
            lengths = torch.full((sentences,), SAMPLE_STEPS)
            packed = pack_padded_sequence(x, lengths, batch_first=True)
            output, _, _ = stack(packed, None, None)
            return output.data.sum()

        return self.learning(loss) / (sentences * SAMPLE_STEPS)

    def stack(self, model: ModelOptions, side: str, sentences: int) -> float:
        """Seconds a token of all layers of a side; the second and further ones are equal."""
        encoding = side == "encoder"
        depth = model.encoder_layers if encoding else model.decoder_layers
        hidden = model.encoder_hidden_size if encoding else model.decoder_hidden_size
        directions = model.directions if encoding else 1
        first = self.layer(model.embedding_size, hidden, directions, sentences)
        if depth == 1:
            return first
        return first + (depth - 1) * self.layer(hidden * directions, hidden, directions, sentences)

    def attention(self, model: ModelOptions, load: Load) -> float:
        n, length = load.sentences, max(1, round(load.words / load.sentences))
        attention = Attention(model).to(self.device)
        width = model.directions * model.encoder_hidden_size
        memory = torch.randn(n, length, width, device=self.device)
        states = torch.randn(n, length, model.decoder_hidden_size, device=self.device)
        mask = torch.ones(n, length, dtype=torch.bool, device=self.device)
        return self.learning(
            lambda: attention(states, attention.key(memory), attention.value(memory), mask).sum()
        ) / (n * length)

    def generator(self, width: int, vocabulary: int, smoothing: float, words: float) -> float:
        """Seconds a token: a chunk of logits costs what several cost more than one, and what they
        have besides, such as the gradient that they begin with, is paid once for `words`."""
        generator = nn.Linear(width, vocabulary, device=self.device)
        rows = chunk_rows(vocabulary, self.device.type)

        def taken(chunks: int) -> float:
            x = torch.randn(rows * chunks, width, device=self.device, requires_grad=True)
            y = torch.zeros(len(x), dtype=torch.int64, device=self.device)
            return self.learning(
                lambda: GeneratorLoss.apply(
                    x, generator.weight, generator.bias, y, smoothing, 0.0, False
                )[0]
            )

        one = taken(1)
        further = max(0.0, taken(SAMPLE_CHUNKS) - one) / (SAMPLE_CHUNKS - 1)
        return further / rows + max(0.0, one - further) / words

    def update(self, recipe: Recipe) -> float:
        """Seconds a parameter of the optimiser."""
        sample = nn.Linear(SAMPLE_PARAMETERS // 1000, 1000, bias=False, device=self.device)
        sample.weight.grad = torch.zeros_like(sample.weight)
        optimizer = make_optimizer(recipe.training, sample)
        return self.seconds(optimizer.step) / sample.weight.numel()


def seconds_a_token(recipe: Recipe, network: Network, load: Load, meter: Meter) -> dict[str, float]:
    """What each part takes for a target token, by its name; `update` is the optimiser."""
    model, options = recipe.model, recipe.training
    width, vocabulary = network.generator.in_features, network.generator.out_features
    twice = 2 if options.r_drop else 1
    found = {
        "encoder": meter.stack(model, "encoder", load.sentences) * load.source_share,
        "decoder": meter.stack(model, "decoder", load.sentences),
        "generator": meter.generator(width, vocabulary, options.label_smoothing, load.words),
    }
    if model.kind == "attention":
        found["attention"] = meter.attention(model, load)
    count = sum(p.numel() for p in network.parameters())
    update = meter.update(recipe) * count / (load.words * options.accumulate)
    return {**{name: twice * one for name, one in found.items()}, "update": update}


def available(device: torch.device) -> int:
    """Bytes of memory of the GPU, or else of the machine or of the container that this runs in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return installed


def dry_run(recipe: Recipe, run: Run | None = None) -> str:
    """Parameters, memory and time of training `recipe`, as text; trains and writes nothing.

    Args:
        run: a folder whose prepared data, where there is some, tell how large batches and epochs
            are.
    """
    device = choose_device(recipe.training)
    sizes = recipe.tokenizer.source_vocabulary, recipe.tokenizer.target_vocabulary
    with torch.device("meta"):
        network = Network(recipe.model, *sizes)
    meter = Meter(device, precision(recipe.training, device, network))
    load = Load.of(recipe, run)
    seconds = seconds_a_token(recipe, network, load, meter)
    held = memory(recipe, network, load, meter.precision == torch.bfloat16)
    return "\n\n".join(
        [
            parts_told(recipe, parts(network), load, seconds),
            memory_told(recipe, held, load, available(device), device),
            time_told(recipe, load, sum(seconds.values()), meter),
        ]
    )


def parts_told(recipe: Recipe, network: list[Part], load: Load, seconds: dict[str, float]) -> str:
    total = sum(part.parameters for part in network)
    twice = 2 if recipe.training.r_drop else 1
    rows = [
        f"{recipe.name}: {total:,} parameters ({total / 1e6:.1f} million)",
        f"{'part':18}{'parameters':>14}{'MFLOP/token':>14}{'GFLOP/s here':>14}{'us/token':>12}",
    ]
    for part in network:
        row = f"{part.name:18}{part.parameters:>14,}"
        operations = part.operations(load) * twice
        if part.name in seconds and operations:
            taken = seconds[part.name]
            row += f"{operations / 1e6:>14.1f}{operations / taken / 1e9:>14.0f}{taken * 1e6:>12.1f}"
        rows.append(row)
    rows.append(f"{'update':46}{'':>14}{seconds['update'] * 1e6:>12.1f}")
    return "\n".join(rows)


def memory_told(
    recipe: Recipe, held: dict[str, int], load: Load, limit: int, device: torch.device
) -> str:
    """The estimate, and what to do where it is more than `limit` bytes."""
    total, where = sum(held.values()), "GPU" if device.type == "cuda" else "machine"
    short, fixed = (total - limit) / 1e9, total - held["activations"]
    whose = "of the prepared data" if load.pairs else "that the recipe allows"
    rows = [
        f"memory of each process, with the largest batch {whose}, {load.source:,} source and "
        f"{load.target:,} target tokens with padding:",
        *(f"{name:18}{size / 1e9:>10.3f} GB" for name, size in held.items() if size),
        f"{'in all':18}{total / 1e9:>10.3f} GB, and what torch itself takes; this {where} has "
        f"{limit / 1e9:.1f} GB",
    ]
    if total <= limit:
        return "\n".join([*rows, "it fits"])
    said = f"it DOES NOT FIT by {short:.1f} GB"
    if fixed < limit:
        most = int(load.target * (limit - fixed) / held["activations"])
        said += f": lower training.batch_tokens to {most:,} (training.accumulate makes up for it)"
    else:
        said += f", with no batch at all by {(fixed - limit) / 1e9:.1f} GB: smaller vocabularies "
        said += "or layers, or another machine"
    return "\n".join([*rows, said])


def time_told(recipe: Recipe, load: Load, seconds: float, meter: Meter) -> str:
    speed = (
        f"time, on this {meter.device.type} in {str(meter.precision).removeprefix('torch.')}, one "
        f"process: {1 / seconds:,.0f} target tokens/s, "
    )
    if not load.pairs:
        return speed + f"{seconds * 1e6 / 3600:.3g} hours per million target tokens"
    hours = load.target_words * seconds / 3600
    return speed + (
        f"{hours:.3g} hours an epoch of {load.pairs:,} pairs, {hours * recipe.training.epochs:.3g} "
        f"hours for {recipe.training.epochs:g} epochs; validation comes on top"
    )
