"""How much memory the container may use, and how much of it Java gets."""

from __future__ import annotations

import contextlib
from pathlib import Path

from server.cgroup import OWN, ROOT, settings
from server.errors import ServerError

MIB = 1 << 20
# Requests that wait and run at once (jobQueueSize and batchSize of model-config.yaml), each of
# max_request_size, are what Java needs a heap for. Measured with 336 clients of 250 kB each: Java
# took 776 MiB with a heap of 512, 647 with 384, 509 with 256, 469 with 192; with 128 it ended.
HEAP = 512  # MiB
_LEAST_HEAP = 192  # MiB
_NATIVE = 128  # MiB of Java beside its heap and buffers: classes, compiled code, threads
# MiB of a worker on a CPU without weights; measured 260 to 285, and decoding takes up to 90. On a
# GPU it is more, for CUDA.
_WORKER = 384
# MiB that requests take at most, beside decoding: `costs.largest` of the archive's handler/costs.py
# with the request_memory, max_response_bytes and batchSize of model-config.yaml.
_REQUESTS = 262
_SUPERVISOR = 32  # MiB
# Weights as they are read, the copy laid out for the CPU's matrix products, and one to spare.
_COPIES = 3


def heap_size(limit: int | None, archive: int) -> int:
    """Return the heap that Java gets, in MiB.

    Java takes its heap, as much again for the network's buffers (its default for direct memory),
    and what it is made of; so, all in MiB,

        limit >= 2 heap + 128 + worker + supervisor,  worker = 384 + 262 + 3 archive

    and heap is the largest that fits, 512 at most. Java's own choice, a quarter of the limit, knows
    nothing of the worker beside it, and the kernel kills one of the two when they meet.

    Args:
        limit: bytes; None where there is none.
        archive: bytes of the unpacked archive, most of them weights.

    Raises:
        ServerError: the limit cannot hold Java, the worker and the model.
    """
    if limit is None:
        return HEAP
    others = _NATIVE + _SUPERVISOR + _WORKER + _REQUESTS + _COPIES * -(-archive // MIB)
    heap = (limit // MIB - others) // 2
    if heap < _LEAST_HEAP:
        raise ServerError(
            f"the container's memory limit is {limit // MIB} MiB: allowed is "
            f"{others + 2 * _LEAST_HEAP} MiB and more for Java ({2 * _LEAST_HEAP + _NATIVE} MiB), "
            f"the worker and this model: raise resources.limits.memory"
        )
    return min(heap, HEAP)


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
