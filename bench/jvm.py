"""Java as TorchServe's frontend had it before, beside what server/jvm.py gives it.

    python -m bench.jvm VARIANT serve ...       as python -m server serve ...
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from server.__main__ import main
from server.jvm import jvm_flags
from server.memory import Shares

Flags = Callable[[Shares, int, Path, Path | None], list[str]]

VARIANTS: dict[str, Flags] = {
    "java's choice": lambda memory, *_: [f"-Xmx{memory.heap}m", "-XX:+ExitOnOutOfMemoryError"],
    "flags": lambda memory, cpus, *_: jvm_flags(memory, cpus, Path("/nowhere"), None),
    "flags, classes": jvm_flags,
}

if __name__ == "__main__":
    with patch("server.torchserve.jvm_flags", VARIANTS[sys.argv[1]]):
        sys.exit(main(sys.argv[2:]))
