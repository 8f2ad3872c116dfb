"""The folder of a run: what each verb leaves for the next, and how files are written to it."""

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"  # in a folder that a verb writes; see `only_writer`
PATIENCE = 120.0  # seconds; a file server holds the locks of a node that it lost for 90 (NFS 4)


class RunError(ValueError):
    """A run that cannot go on; the message says which verb to run first, or what to change."""


@dataclass(frozen=True)
class Run:
    """Paths of a run, in the order in which the verbs write them."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def report(self) -> Path:
        return self.data / "report.json"  # written last by `prepare`

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The last, and the one before it."""
        return self.root / "checkpoints" / "last.pt", self.root / "checkpoints" / "previous.pt"

    @property
    def best(self) -> Path:
        return self.root / "checkpoints" / "best.pt"

    @property
    def members(self) -> list[Path]:
        """The checkpoints of an ensemble, in its order; none where one network was trained."""
        return sorted((self.root / "members").glob("*.pt"), key=lambda path: int(path.stem))

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb.id"  # by which Weights & Biases knows the run

    @property
    def summary(self) -> Path:
        return self.root / "training.json"  # written last by `train` and by `ensemble`

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"  # written by `evaluate`

    @property
    def model(self) -> Path:
        return self.root / "model.pt"  # written by `export`

    def read_json(self, path: Path, verb: str) -> Any:
        """What `verb` left in `path`.

        Raises:
            RunError: nothing there yet, or no JSON, as where it was cut off.
        """
        self.demand(path, verb)
        return whole_json(path, f"run 'python -m training {verb}' again")

    def demand(self, path: Path, verb: str) -> None:
        if not path.exists():
            raise RunError(f"{path}: not there yet; run 'python -m training {verb}' first")


@contextmanager
def only_writer(folder: Path, doing: str, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other processes from writing in `folder`, which is there. The lock ends with this
    process, however that ends.

    Args:
        doing: the verb, for those who have to wait.
        patience: seconds to wait for another process.

    Raises:
        RunError: another process has it; the message says which.
    """
    path = folder / LOCK
    deadline, told = time.monotonic() + patience, False
    while (file := claimed(path)) is None:
        holder = owner(path)
        if time.monotonic() >= deadline:
            raise RunError(
                f"{folder}: {holder} works there; wait until that has ended, or choose another "
                "folder with --run (make: RUN=)"
            )
        if not told:
            print(f"{doing}: {folder}: waiting for {holder}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.write(f"'{doing}', process {os.getpid()} of {socket.gethostname()}")
            file.flush()
        yield
    finally:
        if file.name != os.devnull:
            path.unlink(missing_ok=True)
        file.close()


def claimed(path: Path) -> IO[str] | None:
    """The locked file at `path`, empty; None where another process has it."""
    try:
        file = path.open("a")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return open(os.devnull, "a")  # whoever may not make it cannot write beside it either
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samefile(path, file.fileno())
    except (BlockingIOError, FileNotFoundError):  # the latter: its owner ended just now
        mine = False
    except OSError:  # a file system without locks, which is no reason not to work there
        mine = True
    if mine:
        file.truncate(0)
        return file
    file.close()
    return None


def owner(path: Path) -> str:
    """What the process that has the lock at `path` says of itself."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def whole_json(path: Path, advice: str) -> Any:
    """What is in `path`.

    Raises:
        RunError: no JSON, as where it was cut off; ends with `advice`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not whole ({error}); {advice}") from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, then put it in its place in one step, so that a
    crash or a full disk leaves the former file whole.

    Raises:
        RunError, OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter for the former
        problem = str(error).splitlines()[0] if str(error) else "unknown"
        kind = OSError if isinstance(error, OSError) else RunError
        free = shutil.disk_usage(path.parent).free / 1e6
        raise kind(
            f"{path}: cannot be written: {problem}; {free:.1f} MB are free there: make space or "
            "change what forbids it, then run the same again: what was there is whole"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
