"""What the kernel's control groups allow this process: a container's limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def settings(
    controller: str, name: str, name_v1: str = "", root: Path = ROOT, own: Path = OWN
) -> Iterator[str]:
    """Yield what file `name` of this process' group holds, and of every group above it, as their
    limits hold too.

    A container sees its own group either as the root or by the path that `own` names.

    Args:
        controller: such as "memory"; version 1 has a tree of groups for each, version 2 one tree.
        name_v1: the file's name in version 1; "" not to look there.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and (not name_v1 or controller not in controllers.split(",")):
                continue
            place, file = (root / controller, name_v1) if controllers else (root, name)
            parts = [one for one in path.split("/") if one not in ("", "..")]
            for depth in range(len(parts) + 1):
                with contextlib.suppress(OSError):
                    yield place.joinpath(*parts[:depth], file).read_text(encoding="utf-8")
