"""The flags with which Java runs TorchServe's frontend; docs/results.md measures them.

Java parses and checks 5,000 classes at every start. It can write down what it made of them ("class
data sharing"), and take it from that file at the next: `python -m server.classes` makes the file
once for an environment, an image's for one. Java ignores the file of another Java, another
TorchServe or another place; without one a start takes longer, and nothing else is different.
"""

from __future__ import annotations

import sys
from pathlib import Path

from server.memory import Shares


def classes_file(version: int) -> Path:
    """Where an environment keeps the classes of a release of Java."""
    return Path(sys.prefix) / "share" / "seq2serve" / f"classes-{version}.jsa"


def jvm_flags(memory: Shares, cpus: int, classes: Path, record: Path | None) -> list[str]:
    """Return Java's flags.

    Args:
        memory: that Java gets.
        cpus: that Java thinks there are.
        classes: taken from there, if it exists.
        record: where Java writes the names of the classes it loads; None not to.
    """
    flags = [
        f"-Xmx{memory.heap}m",
        # Buffers of the network, which are no part of the heap.
        f"-XX:MaxDirectMemorySize={memory.direct}m",
        "-XX:+ExitOnOutOfMemoryError",
        # Its own choice of threads and collector is for a machine that it has to itself.
        f"-XX:ActiveProcessorCount={cpus}",
        "-XX:+UseSerialGC",
        # The frontend copies bytes. Compiling it to the utmost takes longer, on cores that import
        # torch at the start and decode later, than it gives back.
        "-XX:TieredStopAtLevel=1",
    ]
    if record is not None:
        flags += ["-Xshare:off", f"-XX:DumpLoadedClassList={record}"]
    elif classes.is_file():
        flags.append(f"-XX:SharedArchiveFile={classes}")
    return flags
