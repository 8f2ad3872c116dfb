"""How much memory the container may use, and how much of it Java and the HTTP front get."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from server.cgroup import OWN, ROOT, settings
from server.errors import ServerError

MIB = 1 << 20
# Requests that wait and run at once (jobQueueSize and batchSize of model-config.yaml), each of
# max_request_size, are what Java needs a heap for. Measured with 336 clients of 250 kB each: Java
# took 776 MiB with a heap of 512, 647 with 384, 509 with 256, 469 with 192; with 128 it ended.
HEAP = 512  # MiB
_LEAST_HEAP = 192  # MiB
# Of Java's memory for the network, in parts of the heap: 336 requests of 256 KiB are 84 MiB, and
# what is left holds answers until their clients have read them.
_DIRECT = 5 / 8
_QUEUED = 84  # MiB
# MiB of one answer of max_response_bytes, as Java grows its buffer.
_ANSWER = 8
_NATIVE = 128  # MiB of Java beside its heap and buffers: classes, compiled code, threads
# Bodies above 16 KiB that the front holds at once, each in a buffer of 288 KiB (haproxy.cfg), while
# they arrive and until they are answered, for each MiB of heap: 400 for 512, which is more than
# TorchServe takes.
_UPLOADS = 400 / 512
_BUFFER = 288 / 1024  # MiB
# MiB of the front beside those, with 4,096 connections; docs/results.md has measured it.
_FRONT = 48
# Java and the front together, in parts of the heap.
_SHARES = 1 + _DIRECT + _UPLOADS * _BUFFER
# MiB of a worker on a CPU without weights; measured 260 to 285, and decoding takes up to 90. On a
# GPU it is more, for CUDA.
_WORKER = 384
# MiB that requests take at most, beside decoding: `costs.largest` of the archive's handler/costs.py
# with the request_memory, max_response_bytes and batchSize of model-config.yaml.
_REQUESTS = 262
_SUPERVISOR = 32  # MiB
# Weights as they are read, the copy laid out for the CPU's matrix products, and one to spare.
_COPIES = 3


@dataclass(frozen=True)
class FrontLimits:
    """uploads: bodies that are not small, at once; answers: large ones, at once."""

    uploads: int
    answers: int


@dataclass(frozen=True)
class Shares:
    """MiB of Java's heap and of its direct memory, which the network's buffers are."""

    heap: int
    direct: int

    @property
    def front(self) -> FrontLimits:
        """What the front may let happen at once with that."""
        return FrontLimits(int(self.heap * _UPLOADS), max(1, (self.direct - _QUEUED) // _ANSWER))


def shares(limit: int | None, archive: int) -> Shares:
    """Return what Java gets of a container's memory.

    Java takes its heap, 5/8 of that for the network's buffers, and what it is made of; the front
    takes 0.22 of the heap for the bodies of requests; so, all in MiB,

        limit >= 1.845 heap + 128 + 48 + worker + supervisor,  worker = 384 + 262 + 3 archive

    and heap is the largest that fits, 512 at most. Java's own choice, a quarter of the limit, knows
    nothing of those beside it, and the kernel kills one of them when they meet.

    Args:
        limit: bytes; None where there is none.
        archive: bytes of the unpacked archive, most of them weights.

    Raises:
        ServerError: the limit cannot hold Java, the front, the worker and the model.
    """
    if limit is None:
        return _with(HEAP)
    others = _NATIVE + _FRONT + _SUPERVISOR + _WORKER + _REQUESTS + _COPIES * -(-archive // MIB)
    heap = int((limit // MIB - others) / _SHARES)
    if heap < _LEAST_HEAP:
        least = math.ceil(_LEAST_HEAP * _SHARES)
        raise ServerError(
            f"the container's memory limit is {limit // MIB} MiB: allowed is {others + least} MiB "
            f"and more for Java and the HTTP front ({least + _NATIVE + _FRONT} MiB), the worker "
            "and this model: raise resources.limits.memory"
        )
    return _with(min(heap, HEAP))


def _with(heap: int) -> Shares:
    return Shares(heap, int(heap * _DIRECT))


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Return the bytes that this process' control groups may use, None for as many as there are.

    Version 2 tells them in memory.max ("max" for none), version 1 in memory.limit_in_bytes (a
    number near 2^63 for none).
    """
    limits = []
    for text in settings("memory", "memory.max", "memory.limit_in_bytes", root, own):
        with contextlib.suppress(ValueError):
            limits.append(int(text))
    limit = min(limits, default=1 << 62)
    return limit if limit < 1 << 60 else None
