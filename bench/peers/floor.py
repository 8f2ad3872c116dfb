"""The floor: seconds of the matrix products alone that decoding a batch in fp32 needs.

What is counted, for N sentences of S tokens (the mean of the job's), K hypotheses, T tokens each:

- once: the encoder's input products of all N*S positions, its S recurrent products of N rows for
  each direction and layer, the bridge, the keys and values of the attention;
- one step of N rows, as all hypotheses of a beam are the same before it, then T - 1 of N*K rows:
  the gates of each layer [rows, input + H] x [input + H, 4H], query, scores, context, readout and
  generator.

Each product is done in the fastest of the ways below, found by timing it where it stands: between
the others, so that weights come from where they would. Weights are packed, transposed or laid out
in advance, and so not counted. Nothing else is: no gates' nonlinearities, no softmax, no top-k, no
reordering, no Python of a search.

It is a floor of torch's fp32 products of this network, not of the machine: int8 or bf16 go below,
and so does a table of the first layer's input product (embedding times W_ih), which saves about
a tenth of a step.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from bench.peers.job import Job

STEPS = 8  # timed of each kind, of which the median counts
TRIALS = 3  # of each way


@dataclass
class Product:
    """One product, and the ways to do it."""

    ways: list[Callable[[], Tensor]]
    spent: list[float] = field(default_factory=list)  # the least seconds of each way


def by_weight(rows: int, inputs: int, outputs: int) -> Product:
    """[rows, inputs] x [inputs, outputs], a weight."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    transposed = weight.t().contiguous()
    ways: list[Callable[[], Tensor]] = [
        lambda: functional.linear(x, weight),
        lambda: torch.mm(x, transposed),
    ]
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(
            lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, None, "none", [], "")
        )
        if torch.backends.mkl.is_available():
            mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            ways.append(lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, None, rows))
    return Product(ways)


def by_memory(n: int, rows: int, inputs: int, outputs: int, transposed: bool) -> Product:
    """[n, rows, inputs] x [n, inputs, outputs], where the right side may be kept transposed."""
    x = torch.randn(n, rows, inputs)
    memory = torch.randn(n, inputs, outputs)
    ways: list[Callable[[], Tensor]] = [lambda: torch.bmm(x, memory)]
    if transposed:
        other = torch.randn(n, outputs, inputs)
        ways.append(lambda: torch.bmm(x, other.transpose(1, 2)))
    return Product(ways)


class Floor:
    """The products of one batch of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        torch.set_num_threads(job.threads)
        n = min(job.batch, len(job.sources))
        source = round(statistics.mean(len(one) for one in job.sources))
        self.first = chosen(step(job, n, 1, source))
        self.later = self.first
        if job.beam_size > 1:
            self.later = chosen(step(job, n, job.beam_size, source))
        recurrent, whole = encoder(job, n, source)
        self.recurrent, self.whole = chosen(recurrent), chosen(whole)
        self.sentences, self.source = n, source

    def tokens_per_second(self) -> float:
        """Measured anew at each call."""
        torch.set_num_threads(self.job.threads)
        seconds = (
            self.median(self.whole)
            + self.source * self.median(self.recurrent)
            + self.median(self.first)
            + (self.job.tokens - 1) * self.median(self.later)
        )
        return self.sentences * self.job.tokens / seconds

    @torch.inference_mode()
    def median(self, products: list[Callable[[], Tensor]]) -> float:
        """Seconds of the sequence, in the clock of the job."""
        clock = time.process_time if self.job.cpu_time else time.perf_counter
        seconds_of(products, clock)
        return statistics.median(seconds_of(products, clock) for _ in range(STEPS))


def step(job: Job, n: int, k: int, source: int) -> list[Product]:
    """A step of N sentences of K hypotheses."""
    sizes = job.sizes
    h, e, rows = sizes.hidden_size, sizes.embedding_size, n * k
    return [
        *(by_weight(rows, (h if layer else e) + h, 4 * h) for layer in range(sizes.layers)),
        by_weight(rows, h, e),  # query: attention is as wide as the embedding, as in `ours`
        by_memory(n, k, e, source, transposed=True),  # scores
        by_memory(n, k, source, e, transposed=False),  # context
        by_weight(rows, h + e, e),  # readout
        by_weight(rows, e, sizes.vocabulary),
    ]


def encoder(job: Job, n: int, source: int) -> tuple[list[Product], list[Product]]:
    """The products of one position, and those of all at once; H/2 for each direction."""
    sizes = job.sizes
    h, e, layers = sizes.hidden_size, sizes.embedding_size, sizes.layers
    recurrent = [by_weight(n, h // 2, 2 * h) for _ in range(2 * layers)]
    inputs = [by_weight(n * source, h if layer else e, 4 * h) for layer in range(layers)]
    bridge = [by_weight(n, layers * h, layers * h) for _ in "hc"]
    attended = [by_weight(n * source, h, e) for _ in ("keys", "values")]
    return recurrent, [*inputs, *bridge, *attended]


@torch.inference_mode()
def chosen(products: list[Product]) -> list[Callable[[], Tensor]]:
    """The fastest way of each, timed in sequence with the others."""
    most = max(len(product.ways) for product in products)
    for way in range(most):
        trials = [
            [seconds_of([product.ways[min(way, len(product.ways) - 1)]]) for product in products]
            for _ in range(TRIALS)
        ]
        for product, spent in zip(products, zip(*trials)):
            if way < len(product.ways):
                product.spent.append(min(spent))
    return [product.ways[product.spent.index(min(product.spent))] for product in products]


def seconds_of(
    products: list[Callable[[], Tensor]], clock: Callable[[], float] = time.perf_counter
) -> float:
    started = clock()
    for product in products:
        product()
    return clock() - started
