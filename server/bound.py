"""Become another program, which the kernel kills when the process that started this one dies.

    python -I -S bound.py PID PROGRAM ARGUMENT ...

PID is of that process. It runs by itself, in a Python that imports nothing else, because in a
process of several threads nothing can be done safely between fork and exec. The kernel looks at the
thread that started this one.
"""

import ctypes
import os
import signal
import sys

PDEATHSIG = 1  # of prctl(2); it outlasts exec


def main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"process {parent} died before {command[0]} was started")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
