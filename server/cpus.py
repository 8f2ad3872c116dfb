"""How many CPUs the container may use, and how many of them Java gets."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from server.cgroup import OWN, ROOT, settings

# The frontend moves bytes and never computes: more threads only take cores from decoding, and on a
# node of 64 cores, where a container has no limit, Java would start threads for all of them.
FRONTEND = 4


def usable_cpus(root: Path = ROOT, own: Path = OWN) -> int:
    """CPUs that this process may use: those it may run on (macOS does not tell, and has them all),
    and no more than its control groups' limits, a part of one counting as one.

    handler/seq2seq_handler.py has its own: an archive needs nothing beside it.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for text in settings("cpu", "cpu.max", root=root, own=own):
        with contextlib.suppress(ValueError):  # no limit is "max"
            quota, period = map(int, text.split())
            count = min(count, max(1, -(-quota // period)))
    return count


def frontend_cpus() -> int:
    """CPUs that Java shall think there are."""
    return min(usable_cpus(), FRONTEND)
