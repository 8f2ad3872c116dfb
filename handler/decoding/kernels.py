"""The operators of a decoding step on a GPU that are one kernel each: torch.ops.seq2serve.*.

A step of few rows is as long as the gaps between its kernels, so it pays to have few. They are
called by model.pt where its tensors are on a GPU (`lstm_pointwise`, `attend`) and by what runs it
(`choose`, `advance`, `gather_rows`). On a CPU, and on a GPU until `compile_for` has succeeded, they
are plain torch: a GPU for which nothing can be compiled decodes as well, slower. kernels.cu and
search.cu say how the kernels compute.
"""

import ctypes
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from handler.decoding import cuda, static_search
from handler.decoding.native import declare
from handler.decoding.selection import greatest

# `attend` is declared in native.py.
SCHEMAS = {
    "seq2serve::lstm_pointwise": "(Tensor gates, Tensor more, Tensor? bias, Tensor c) -> "
    "(Tensor, Tensor)",
    "seq2serve::gather_rows": "(Tensor[] tables, Tensor origin) -> Tensor[]",
    "seq2serve::choose": "(Tensor logits, Tensor never, int count, bool normalised) -> "
    "(Tensor, Tensor, Tensor)",
    "seq2serve::advance": static_search.SCHEMA,
}
SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cu", "search.cu")]
NEVER = float("-inf")
# As in kernels.cu and search.cu.
THREADS = 512
MOST_STEPS, MOST_TABLES, MOST_NEVER, MOST_BEAM = 4096, 64, 8, 64
TYPES = {
    torch.float32: "float", torch.float16: "Half", torch.bfloat16: "Brain", torch.float64: "double",
}  # fmt: skip
VECTOR = 16  # bytes that a thread reads at once, where addresses allow it
NAMES = [
    "gather_rows", "advance_one", "advance_beam",
    *(f"lstm_pointwise<{name}>" for name in TYPES.values()),
    *(
        f"attend<{name}, {at_once}>"
        for dtype, name in TYPES.items()
        for at_once in (1, VECTOR // dtype.itemsize)
    ),
    *(f"choose<{name}>" for dtype, name in TYPES.items() if dtype != torch.float64),
]  # fmt: skip
_loaded: dict[torch.device, cuda.Kernels] = {}


def compile_for(device: torch.device) -> float:
    """Compile and load all kernels for a GPU, once in a process; they are used from then on.

    Returns:
        The seconds that it took.

    Raises:
        RuntimeError: it cannot be done, and why; the operators stay plain torch.
    """
    begun = time.perf_counter()
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    if device not in _loaded:
        _loaded[device] = cuda.load(device, SOURCES, NAMES)
    return time.perf_counter() - begun


def ready(tensors: Iterable[Tensor | None]) -> cuda.Kernels | None:
    """The kernels for these tensors, where they are loaded and the tensors are of one type."""
    given = [one for one in tensors if one is not None]
    same = all(one.dtype == given[0].dtype for one in given)
    return _loaded.get(given[0].device) if same else None


# The operators: as a kernel, and in plain torch


class Tables(ctypes.Structure):
    """The argument of `gather_rows`, as in kernels.cu."""

    _fields_ = (
        ("source", ctypes.c_void_p * MOST_TABLES),
        ("target", ctypes.c_void_p * MOST_TABLES),
        ("bytes", ctypes.c_longlong * MOST_TABLES),
    )


def lstm_pointwise(
    gates: Tensor, more: Tensor, bias: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor]:
    """What follows the products of an LSTM layer for one step.

    Args:
        gates, more: [R, 4H], the products of input and state, in the order i, f, o, g.
        bias: [4H]; c: [R, H].

    Returns:
        The next h and c [R, H], of c's type; what is between is in float32, for double in double.
    """
    kernels = ready((gates, more, bias, c))
    if kernels is None:
        return plain_lstm_pointwise(gates, more, bias, c)
    rows, size = c.shape
    gates, more, c = gates.contiguous(), more.contiguous(), c.contiguous()
    bias = None if bias is None else bias.contiguous()
    h_next, c_next = torch.empty_like(c), torch.empty_like(c)
    threads = 256
    kernels.launch(
        f"lstm_pointwise<{TYPES[c.dtype]}>", (rows, -(-size // threads)), threads,
        gates, more, bias, c, h_next, c_next, size,
    )  # fmt: skip
    return h_next, c_next


def plain_lstm_pointwise(
    gates: Tensor, more: Tensor, bias: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor]:
    sums = widened(gates) + widened(more)
    if bias is not None:
        sums = sums + widened(bias)
    i, f, o, g = sums.chunk(4, 1)
    c_next = torch.sigmoid(f) * widened(c) + torch.sigmoid(i) * torch.tanh(g)
    h_next = torch.sigmoid(o) * torch.tanh(c_next)
    return h_next.to(c.dtype), c_next.to(c.dtype)


def widened(x: Tensor) -> Tensor:
    """In the type that sums are made in."""
    return x if x.dtype == torch.float64 else x.float()


def gather_rows(tables: list[Tensor], origin: Tensor) -> list[Tensor]:
    """Rows `origin`, int64 [M], of several tables [R, ...]: tensors [M, ...]."""
    kernels = _loaded.get(origin.device)
    if kernels is None:
        return plain_gather_rows(tables, origin)
    origin = origin.contiguous()
    whole = [one.contiguous() for one in tables]
    found = [one.new_empty((origin.numel(), *one.shape[1:])) for one in whole]
    for first in range(0, len(whole), MOST_TABLES):
        some = whole[first : first + MOST_TABLES]
        given = Tables()
        for i, (one, into) in enumerate(zip(some, found[first:])):
            given.source[i], given.target[i] = one.data_ptr(), into.data_ptr()
            given.bytes[i] = math.prod(one.shape[1:]) * one.element_size()
        kernels.launch("gather_rows", (origin.numel(), len(some)), 128, given, origin)
    return found


def plain_gather_rows(tables: list[Tensor], origin: Tensor) -> list[Tensor]:
    return [one.index_select(0, origin) for one in tables]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention by dot products, side by side in `heads`.

    Args:
        query: [N, K, A], scaled; keys, values: [N, S, A]; mask: bool [N, S], true where there is
            something to attend to.

    Returns:
        Context [N, K, A]; the mean over heads of the weights that made it [N, K, S], in float32
        (for double in double). Both are zeros where there is nothing to attend to; plain torch has
        NaN there.
    """
    kernels = ready((query, keys, values))
    steps = keys.size(1)
    if kernels is None or steps > MOST_STEPS or keys.stride(2) != 1 or values.stride(2) != 1:
        return plain_attend(query, keys, values, mask, heads)
    n, k, width = query.shape
    query = query.contiguous()
    context = torch.empty_like(query)
    weights = torch.empty((n, k, steps), dtype=widest(query.dtype), device=query.device)
    at_once = VECTOR // query.element_size()
    strides = *keys.stride()[:2], *values.stride()[:2]
    addresses = query.data_ptr(), keys.data_ptr(), values.data_ptr()
    if any(one % at_once for one in (width // heads, *strides)) or any(
        one % VECTOR for one in addresses
    ):
        at_once = 1
    kernels.launch(
        f"attend<{TYPES[query.dtype]}, {at_once}>", (n * k, 1), THREADS,
        query, keys, values, mask, context, weights, k, steps, width, heads, *strides,
        *mask.stride(),
    )  # fmt: skip
    return context, weights


def plain_attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, keys, values))
    scores = q @ k.transpose(2, 3)  # [N, heads, K, S]
    scores = widened(scores).masked_fill(~mask[:, None, None], NEVER)
    weights = torch.softmax(scores, 3)
    context = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return context, weights.mean(1)


def widest(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose(
    logits: Tensor, never: Tensor, count: int, normalised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest logits of each row.

    Args:
        logits: [R, V], of which the ids in `never`, int64, count as -inf.
        count: how many, at most V; beyond THREADS they are chosen by plain torch.

    Returns:
        Values in float32 and their ids, [R, count] each: best first, equals by id, NaN before all;
        and where it is `normalised` the log sum exp of each row in float32 [R], else empty.
    """
    rows, vocabulary = logits.shape
    if not 1 <= count <= vocabulary:
        raise ValueError(f"count: got {count}; allowed: 1 to {vocabulary}")
    if logits.dtype == torch.float64:
        logits = logits.float()
    kernels = ready((logits,))
    if kernels is None or never.numel() > MOST_NEVER or count > THREADS:
        return plain_choose(logits, never, count, normalised)
    values = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, count), dtype=torch.int64, device=logits.device)
    normaliser = values.new_empty(rows if normalised else 0)
    kernels.launch(
        f"choose<{TYPES[logits.dtype]}>", (rows, 1), THREADS,
        logits.contiguous(), never.contiguous(), values, tokens,
        normaliser if normalised else None, vocabulary, never.numel(), count,
    )  # fmt: skip
    return values, tokens, normaliser


def plain_choose(
    logits: Tensor, never: Tensor, count: int, normalised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float().index_fill(1, never, NEVER)
    values, tokens = greatest(logits.unsqueeze(1), count)
    normaliser = logits.logsumexp(1) if normalised else logits.new_empty(0)
    return values.squeeze(1), tokens.squeeze(1), normaliser


def advance(
    values: Tensor, tokens: Tensor, normaliser: Tensor, eos: int, board: list[Tensor]
) -> None:
    """One token for every sentence that is not over, see `static_search.advance`."""
    facts, longest, made, over, previous, scores, _, said, *finished = board
    (n, k), room = previous.shape, said.size(2)
    choices = values.size(1)
    kernels = ready((values, normaliser, scores, *finished[1:2]))
    known = scores.dtype == torch.float32 and k <= MOST_BEAM and choices > min(k, 2)
    given = values.contiguous(), tokens.contiguous(), normaliser.contiguous(), eos
    if kernels is None or not known or not all(one.is_contiguous() for one in board):
        static_search.advance(values, tokens, normaliser, eos, board)
    elif k == 1:
        kernels.launch(
            "advance_one", (-(-n // 128), 1), 128,
            *given, facts, longest, made, over, previous, scores, said, n, choices, room,
        )  # fmt: skip
    else:
        kernels.launch(
            "advance_beam", (n, 1), 128 if k <= 16 else THREADS, *given, *board, k, choices, room
        )


declare(SCHEMAS)
_forms = torch.library.Library("seq2serve", "IMPL")
for _name, _form in (
    ("lstm_pointwise", lstm_pointwise), ("gather_rows", gather_rows), ("choose", choose),
    ("advance", advance),
):  # fmt: skip
    _forms.impl(_name, _form, "CPU")
    _forms.impl(_name, _form, "CUDA")
_forms.impl("attend", attend, "CUDA")  # a CPU's is in model/native
