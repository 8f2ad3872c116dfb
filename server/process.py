"""What a running server owns on its machine: a directory and a group of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from server.errors import ServerError

# A killed process is gone within this; a zombie that nobody buries is not worth a longer wait.
GONE_SECONDS = 5.0
# TorchServe's own shutdown takes about 2.5 s; what has not gone by then is killed.
STOP_SECONDS = 15.0
_POLL_SECONDS = 0.01
# sun_path holds 104 bytes on macOS (108 on Linux), its end mark included.
_SOCKET_PATH_BYTES = 103
_BOUND = Path(__file__).with_name("bound.py").resolve()


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a server to end; not that of a terminal that closes, where nohup says
    so."""
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
    kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return asked if kept else (*asked, signal.SIGHUP)


def bound(command: list[str], lasting: bool = False) -> list[str]:
    """Return `command` such that the kernel kills its process when this one dies, of whatever; see
    bound.py. As it is where there is no such thing (macOS), and in a thread that may end before.

    Args:
        lasting: this thread does not end before the command does; the main thread never does.
    """
    lasting = lasting or threading.current_thread() is threading.main_thread()
    if not sys.platform.startswith("linux") or not lasting:
        return command
    return [sys.executable, "-I", "-S", str(_BOUND), str(os.getpid()), *command]


def private_directory(parent: Path | None, worker_port: int) -> Path:
    """Make the directory for unpacked archives and for the workers' sockets, .ts.sock.PORT.

    It is one server's own: two that share it would meet in the socket files.
    """
    places = [parent] if parent is not None else [Path(tempfile.gettempdir()), Path("/tmp")]
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
        try:
            directory = Path(tempfile.mkdtemp(prefix="seq2serve-", dir=place.resolve()))
        except OSError as error:
            raise ServerError(
                f"state directory {place} cannot be written ({error.strerror}): choose another"
            ) from error
        if len(os.fsencode(directory / f".ts.sock.{worker_port}")) <= _SOCKET_PATH_BYTES:
            return directory
        directory.rmdir()
    raise ServerError(
        f"state directory {places[0].resolve()} has too long a path for a socket, of which "
        f"{_SOCKET_PATH_BYTES} bytes are allowed: choose a shorter one"
    )


def end_group(process: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> None:
    """End a process and all others of its group, and wait until they are gone.

    Args:
        seconds: that the process has to end by itself; then it is killed.
    """
    try:
        process.terminate()
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Workers that outlived Java are in its group; Java itself, if it did not listen.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        # Where we are process 1, as in a container, the orphaned workers are ours to bury.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-process.pid, os.WNOHANG)
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(_POLL_SECONDS)
