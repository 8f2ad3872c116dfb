"""What the server writes: lines for whoever reads them. It never waits for a reader.

A pipe whose reader has stopped takes 64 kB; after that a write to it waits for ever, and whoever
writes can neither serve nor stop. So a line goes out only where there is room. What had none is
counted, and the count is told when there is room again.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import threading

# Seconds to wait for a reader that is slow; of one that has stopped no other line waits.
_PATIENCE = 1.0
# Bytes for which a pipe that select finds writable has room (POSIX).
_PIECE = select.PIPE_BUF
# Control characters but the tab, and what else ends a line or turns its direction: a line from
# outside that has them could hide what it says, or look like several.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(line: str) -> str:
    r"""Return a line with its control characters as \x1b, for terminals and for people."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], line)


class Output:
    """One of this process' streams; `say` may be called by any thread.

    Args:
        name: of the stream in `sys`, `stdout` or `stderr`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._lost = 0  # lines since the last that was written
        self._cut = False  # whether the last line was written in part

    def say(self, line: str) -> None:
        """Write a line, escaped; without effect where nobody reads it."""
        stream, text = getattr(sys, self._name), escaped(line)
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a stream of Python's alone, or none
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(text, file=stream, flush=True)
            return
        # Another program can fill the pipe between a look at it and the write that follows; the
        # thread that waits then keeps the lock, and the others go on without it.
        if not self._lock.acquire(timeout=2 * _PATIENCE):
            return
        try:
            told = f"{self._lost} lines are lost that nobody read in time\n" if self._lost else ""
            begin = "\n" if self._cut else ""
            if self._write(number, f"{begin}{told}{text}\n".encode()):
                self._lost, self._cut = 0, False
            else:
                self._lost += 1
        finally:
            self._lock.release()

    def _write(self, number: int, data: bytes) -> bool:
        """Write as long as there is room; return whether all was written."""
        at = 0
        try:
            while at < len(data):
                patience = 0.0 if self._lost else _PATIENCE
                if not select.select([], [number], [], patience)[1]:
                    break
                at += os.write(number, data[at : at + _PIECE])
        except (OSError, ValueError):  # no reader any more
            return True
        self._cut = self._cut or 0 < at < len(data)
        return at == len(data)


STDOUT = Output("stdout")
STDERR = Output("stderr")
