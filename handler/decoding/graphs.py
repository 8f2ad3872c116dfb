"""A decoding step on a GPU as one CUDA graph: the step, the choice of tokens and the normaliser.

A step of few rows is some fifty small kernels, which a processor takes longer to launch than the
GPU to run. A graph launches them at once, with addresses and shapes that never change; so what a
step reads is copied into buffers of a bucket, a size that many shapes share, and the rows beyond
those that live are computed from whatever lies there and never read. No operation mixes sentences,
so nothing of them reaches another row.

Nothing waits for the device: what a step chose is there, and the engine feeds it to the next one
(multistep.py) before it reads several steps at once.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

GRAPHS = 64  # kept at once; the one that was not used for longest goes first, as it does
MOST_BYTES = 2 << 30  # beyond what the buffers of all may have
MOST_ROWS = 8192  # of a graph; there kernels take longer than their launch
SHORTEST = 16  # source tokens of the smallest bucket
WARM_UP = 4  # runs before a recording: TorchScript profiles and compiles, libraries load
TOLERANCE = 0.05  # of logits, between a replay and the step that it was recorded from
BLOCK = 64  # logits that the first stage of the choice looks at together
LAST = 0x7FFFFFFF  # of int32


class Outputs(NamedTuple):
    """What a step leaves on the device, for N sentences of K hypotheses: see `GraphedModel.best`.
    state: [N*K, ...]; attention: [N, K, S]."""

    values: Tensor
    tokens: Tensor
    normaliser: Tensor
    state: list[Tensor]
    attention: Tensor


class Recording(NamedTuple):
    """`replay` computes again from what the function read, into the same `outputs`, which last
    until another recording is replayed."""

    outputs: Outputs
    replay: Callable[[], None]


class Recorder(Protocol):
    """How functions of tensors at fixed addresses are recorded."""

    def record(self, function: Callable[[], Outputs]) -> Recording:
        """Raises RuntimeError where it cannot be."""
        ...


class CudaGraphs:
    """CUDA's own recordings. They share one pool of memory, as only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Outputs]) -> Recording:
        current = torch.cuda.current_stream(self.device)
        # Named, though it is the current one: a recording that fails leaves its own in its place.
        with torch.cuda.device(self.device), torch.cuda.stream(current):
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    function()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do to the device meanwhile spoils nothing.
            with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                outputs = function()
        return Recording(outputs, graph.replay)


class Graph:
    """The step of one bucket: buffers that it reads, and its recording.

    Args:
        sentences, source: of the bucket, N and S.
        previous, state, memory: of the first step, which give the other sizes.
        size: bytes, see `size_of`.
    """

    outputs: Outputs  # once recorded, as what follows
    replay: Callable[[], None]

    def __init__(
        self,
        sentences: int,
        source: int,
        previous: Tensor,
        state: list[Tensor],
        memory: Any,
        size: int,
    ) -> None:
        k = previous.size(1)
        self.size = size
        self.previous = previous.new_zeros(sentences, k)
        self.state = [t.new_zeros(sentences * k, *t.shape[1:]) for t in state]
        attended = [t.new_zeros(sentences, source, *t.shape[2:]) for t in memory.attended]
        self.memory = memory._replace(attended=attended, initial=[])
        self.filled = 0  # columns of `attended` that may be other than zero

    def fill(self, previous: Tensor, state: list[Tensor], memory: Any | None) -> None:
        """Copy what a step reads into the first rows of the buffers; no memory where that is there
        already."""
        n = previous.size(0)
        self.previous[:n].copy_(previous)
        rows = [t[: previous.numel()] for t in self.state]
        torch._foreach_copy_(rows, state)
        if memory is None:
            return
        length = length_of(memory)
        for buffer, given in zip(self.memory.attended, memory.attended):
            buffer[:n, :length].copy_(given)
            if length < self.filled:
                buffer[:, length : self.filled].zero_()  # what longer sources have left
        self.filled = length

    def record(
        self, recorder: Recorder, step: Callable[..., Outputs], count: int, normalised: bool, n: int
    ) -> None:
        """Record the step of what has been filled in, of which `n` sentences live.

        Raises:
            RuntimeError: it cannot be recorded, or its replay gives something else.
        """
        def function() -> Outputs:
            return step(self.previous, self.state, self.memory, count, normalised)

        expected = function().values[:n].clone()
        self.outputs, self.replay = recorder.record(function)
        self.replay()
        found = self.outputs.values[:n]
        if not torch.allclose(found, expected, TOLERANCE, TOLERANCE, equal_nan=True):
            raise RuntimeError("a replay gives other logits than the step it was recorded from")

    def read(self, n: int, length: int) -> Outputs:
        """What the replay left of the first `n` sentences; the state is a copy."""
        values, tokens, normaliser, state, attention = self.outputs
        left = [t[: n * self.previous.size(1)] for t in state]
        state = [torch.empty_like(t) for t in left]
        torch._foreach_copy_(state, left)
        return Outputs(values[:n], tokens[:n], normaliser[:n], state, attention[:n, :, :length])


class GraphedModel:
    """A `SequenceModel` on a GPU as a `FusedModel`, whose `best` replays recorded steps.

    A bucket is recorded at its first use. Where that fails, a warning says so, and every step is
    computed kernel by kernel from then on.

    Args:
        recorder: None computes every step kernel by kernel.

    Not thread-safe: one thread calls it.
    """

    fused = True
    unseen = 8  # steps that are made before what they chose is read

    def __init__(self, model: Any, device: torch.device, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self.graphs: OrderedDict[tuple[int, int, int, int, bool], Graph] = OrderedDict()
        self.last: tuple[Graph | None, Any] = None, None  # that was filled, and with which memory
        # Read at every step, and slow to read from a scripted module.
        self.pad_id: int = model.pad_id
        self.unk_id: int = model.unk_id
        self.bos_id: int = model.bos_id
        self.eos_id: int = model.eos_id
        self.source_vocabulary: int = model.source_vocabulary
        self.target_vocabulary: int = model.target_vocabulary
        self.max_source_length: int = model.max_source_length
        self.max_target_length: int = model.max_target_length
        self.has_attention: bool = model.has_attention
        self.card: str = model.card
        self.encode = model.encode
        self.start = model.start
        self.step = model.step
        self.shortlisted = bool(getattr(model, "shortlisted", False))
        if self.shortlisted:
            self.allowed = model.allowed
        self.never = torch.tensor([self.pad_id, self.unk_id, self.bos_id], device=device)

    @torch.inference_mode()
    def best(
        self, previous: Tensor, state: list[Tensor], memory: Any, count: int, normalised: bool
    ) -> Outputs:
        """The greatest `count` logits of each row [N, K, count], best first and equals by id, their
        tokens, and where asked for the log sum exp of all [N, K] (else empty); then the state and
        the attention [N, K, S] as of `step`. All on the device, where they may still be computed,
        and all but the state last until the next call."""
        graph = self.graph(previous, state, memory, count, normalised)
        if graph is None:
            return self.computed(previous, state, memory, count, normalised)
        graph.replay()
        return graph.read(previous.size(0), length_of(memory))

    def graph(
        self, previous: Tensor, state: list[Tensor], memory: Any, count: int, normalised: bool
    ) -> Graph | None:
        """The graph for a step like this one, with its input; None where there is none."""
        n, k = previous.shape
        if self.recorder is None or n * k > MOST_ROWS:
            return None
        sentences, source = -(-bucket(n * k) // k), bucket(length_of(memory), SHORTEST)
        key = (sentences, k, source, count, normalised)
        found = self.graphs.get(key)
        if found is not None:
            self.graphs.move_to_end(key)
            # Steps of one call share a memory, which is the most there is to copy.
            again = self.last[0] is found and self.last[1] is memory
            found.fill(previous, state, None if again else memory)
            self.last = found, memory
            return found
        size = size_of(sentences / n, source, state, memory)
        if size > MOST_BYTES:
            return None
        try:
            graph = Graph(sentences, source, previous, state, memory, size)
            graph.fill(previous, state, memory)
            graph.record(self.recorder, self.computed, count, normalised, n)
        except RuntimeError as error:
            logger.warning("no CUDA graphs from here on: %s", str(error).partition("\n")[0])
            self.recorder = None
            self.graphs.clear()
            self.last = None, None
            return None
        self.graphs[key] = graph
        while (
            len(self.graphs) > GRAPHS
            or sum(one.size for one in self.graphs.values()) > MOST_BYTES
        ):
            self.graphs.popitem(last=False)
        return graph

    @property
    def most_bytes(self) -> int:
        """Of all buffers, at most."""
        return 0 if self.recorder is None else MOST_BYTES

    def computed(
        self, previous: Tensor, state: list[Tensor], memory: Any, count: int, normalised: bool
    ) -> Outputs:
        """A step and its choice, kernel by kernel; it waits for nothing, and so can be recorded."""
        logits, state, attention = self.step(previous, state, memory)
        logits = logits.float().index_fill_(2, self.never, float("-inf"))
        if self.shortlisted:
            logits.masked_fill_(~self.allowed(memory).unsqueeze(1), float("-inf"))
        values, tokens = greatest(logits, count)
        normaliser = logits.logsumexp(2) if normalised else values.new_empty(0)
        return Outputs(values, tokens, normaliser, state, attention)


def length_of(memory: Any) -> int:
    """S; 0 of a model without attention."""
    return memory.attended[0].size(1) if memory.attended else 0


def size_of(filling: float, source: int, state: list[Tensor], memory: Any) -> int:
    """Bytes of the buffers of a bucket that has `filling` times these rows and `source` tokens:
    its state, before and after, and its memory."""
    rows = 2 * sum(t.nbytes for t in state)
    attended = sum(t.nbytes for t in memory.attended)
    return math.ceil(filling * (rows + attended * source / max(length_of(memory), 1)))


def bucket(size: int, least: int = 1) -> int:
    """The least that is not below `size`, of 0, `least` times 1, 2, 4, 8 ..., and from 64 on also
    half way between."""
    if size == 0:
        return 0
    top = least
    while top < size:
        top *= 2
    between = top * 3 // 4
    return between if between >= max(64, size) else top


def greatest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest `count` of float32 [N, K, V], best first, equals by id, and their ids.

    In half precision equal logits are common, and which of them torch's top-k takes depends on how
    many it is asked for, so on the sentences beside. In two stages: of the `count` first blocks in
    the order of their maxima, those that are equal by place, each has one before any element of the
    other blocks.
    """
    n, k, vocabulary = logits.shape
    blocks = vocabulary // BLOCK
    ids = torch.arange(vocabulary, device=logits.device)
    if blocks <= count:
        return in_order(logits, ids.expand(n, k, -1), count)
    whole = logits[:, :, : blocks * BLOCK].unflatten(2, (blocks, BLOCK))
    _, block = in_order(whole.amax(3), ids[:blocks].expand(n, k, -1), count)  # [N, K, count]
    found = whole.gather(2, block.unsqueeze(3).expand(n, k, count, BLOCK)).flatten(2)
    tokens = (block.unsqueeze(3) * BLOCK + ids[:BLOCK]).flatten(2)
    rest = ids[blocks * BLOCK :]
    found = torch.cat([found, logits[:, :, blocks * BLOCK :]], 2)
    return in_order(found, torch.cat([tokens, rest.expand(n, k, -1)], 2), count)


def in_order(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of values [..., C] with their ids: the greatest first, NaN before all,
    equals by id. A float's bits, those behind a negative sign turned over, are ordered as whole
    numbers."""
    bits = values.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & LAST)).masked_fill(values.isnan(), LAST)
    _, place = ((ordered.long() << 32) - ids).topk(count, -1)
    return values.gather(-1, place), ids.gather(-1, place)
