"""Read what TorchServe writes: keep the end of it, show it, and find why a start failed.

The format of the lines is that of server/log4j2.xml. TorchServe logs all that a worker writes as
INFO; the worker tells the level of each line before it (handler/logs.py), and here it takes its
place.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper

from server.output import STDERR, escaped

_KEPT_LINES = 500
_REASON_CHARACTERS = 600
_PREFIX = r"^[\d:,T-]{19,} +[A-Z]+ +\S+ - "
_WORKER = " MODEL_LOG - "
_LEVELLED = re.compile(
    rf"^(\S+) +[A-Z]+ +{_WORKER.strip()} (DEBUG|INFO|WARNING|ERROR|CRITICAL)(?: |$)"
)
# The names of log4j where they are others.
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}
_FRAME = ("\tat ", "\t... ")
# TorchServe 0.12 logs this for whatever ended a worker, a handler's exception or a kill -9 alike.
_WORKER_DIED = "WorkerThread - Retry worker:"
# Printed by the Java runtime and TorchServe past log4j, at every start; and a client that went
# away, which any client can do as often as it likes.
_NOISE = re.compile(
    r"^WARNING: |^nvidia-smi not available|^Model server started\."
    r"| HttpRequestHandler - .*(Connection reset by peer|Broken pipe)"
)
# Any request that TorchServe 0.12 does not expect ends in an exception, whose message quotes it.
# That is no error of the server's, and no text of clients belongs in a log.
_QUOTING = re.compile(r"^(\S+) +ERROR +HttpRequestHandler - +([\w.$]+Exception)\b.*")
_QUERY = re.compile(r'( ACCESS_LOG - \S+ "\S+ [^"? ]*\?)[^" ]*')
# What TorchServe 0.12 says after the exception that says something, or where there was none.
_EMPTY = (
    "Load model failed: ",
    "RuntimeError: 500 - Unknown exception",
    "RuntimeError: 507 - System out of memory",
    "ModuleNotFoundError: No module named 'ts.torch_handler.",
)
_TRACEBACK = "Traceback (most recent call last):"
_TRACEBACK_END = (
    _TRACEBACK,
    "Backend worker process died.",
    "During handling of the above exception",
    "The above exception was the direct cause",
)


class ServerLog:
    """Follows a server's output to its end; lines are held back until `show`."""

    def __init__(self, stream: TextIOWrapper, show: bool) -> None:
        # Anything else that ends a line is part of one, and escaped.
        stream.reconfigure(newline="\n")
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._shown = show
        self._lock = threading.Lock()
        self.worker_died = False
        self._thread = threading.Thread(target=self._follow, name="server-log", daemon=True)
        self._thread.start()

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines that were written."""
        with self._lock:
            return tuple(self._lines)

    def show(self, shown: bool) -> None:
        """Show lines on standard error as they come, after those held back; or stop doing so."""
        with self._lock:
            if shown and not self._shown:
                for line in self._lines:
                    STDERR.say(line)
            self._shown = shown

    def close(self, timeout: float) -> None:
        """Wait for the end of the output, which is the end of the process, and let go of it."""
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._stream.close()

    def _follow(self) -> None:
        for text in self._stream:
            line = escaped(text.rstrip())
            if _NOISE.search(line):
                continue
            line = with_level(without_quotes(line))
            if _WORKER_DIED in line:
                self.worker_died = True
            with self._lock:
                self._lines.append(line)
                if self._shown:
                    STDERR.say(line)


def without_quotes(line: str) -> str:
    """Return a line without what a client said."""
    line = _QUOTING.sub(r"\1 WARN  HttpRequestHandler - a request ended in \2", line)
    return _QUERY.sub(r"\1...", line)


def with_level(line: str) -> str:
    """Return a line at the level that the worker gave it."""
    found = _LEVELLED.match(line)
    if found is None:
        return line
    time, level = found.groups()
    return f"{time} {_LEVELS.get(level, level):<5}{_WORKER}{line[found.end():]}"


def load_failure(lines: Sequence[str]) -> str:
    """Return in one line why a worker failed to load its model, from what the server wrote."""
    worker = [line.split(_WORKER, 1)[1] for line in lines if _WORKER in line]
    return _one_line(_exceptions(worker)) or exit_reason(lines)


def exit_reason(lines: Sequence[str]) -> str:
    """Return in one line why Java ended: what itself said last, whatever workers had to say."""
    java = (
        re.sub(_PREFIX, "", line)
        for line in lines
        if _WORKER not in line and _WORKER_DIED not in line and not line.startswith(_FRAME)
    )
    return _one_line(java) or "nothing was logged; was it killed, or out of memory?"


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    """Yield the last part of each traceback: the exception with its message, in one line."""
    in_frames = False
    message: list[str] = []
    for line in lines:
        if line.startswith(_TRACEBACK_END):
            yield " ".join(filter(None, message))
            message = []
            in_frames = line.startswith(_TRACEBACK)
        elif in_frames and not re.match(r"\s", line):
            in_frames = False
            message = [line]
        elif message:
            message.append(line.strip())
    yield " ".join(filter(None, message))


def _one_line(texts: Iterable[str]) -> str:
    telling = dict.fromkeys(text for text in texts if text and not text.startswith(_EMPTY))
    line = "; ".join(list(telling)[-3:])
    return line if len(line) <= _REASON_CHARACTERS else line[:_REASON_CHARACTERS] + "..."
