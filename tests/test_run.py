"""The folder of a run: files of it that are spoilt, and one process at a time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment

from training.recipe import load
from training.run import LOCK, Run, RunError, only_writer, write_text
from training.train import train

HOLD = """
import sys
from pathlib import Path
from training.run import only_writer
with only_writer(Path(sys.argv[1]), 'train', float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    write_text(run.report, "{}")
    return run


@pytest.mark.parametrize("content", [b"", b'{"recipe": {"na', b"\xff"])
def test_a_file_that_is_cut_off_is_named_with_its_verb(run: Run, content: bytes) -> None:
    run.report.write_bytes(content)
    with pytest.raises(RunError) as caught:
        run.read_json(run.report, "prepare")
    message = str(caught.value)
    assert message.startswith(f"{run.report}: not whole (")
    assert message.endswith("; run 'python -m training prepare' again")


def test_one_that_waits_has_its_turn(run: Run) -> None:
    with only_writer(run.root, "train"):
        other = other_process(run, 60)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    held, said = other.communicate(timeout=60)
    assert held == "held\n"
    assert said == f"train: {run.root}: waiting for 'train', process {os.getpid()} of " + (
        f"{socket.gethostname()}\n"
    )


def other_process(run: Run, patience: float) -> subprocess.Popen[str]:
    """One that has the lock until its standard input ends, or says why it has not."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root), str(patience)],
        cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_another_process_is_kept_out_until_this_one_has_ended(run: Run) -> None:
    with only_writer(run.root, "train"):
        _, said = other_process(run, 0).communicate(timeout=60)
        mine = f"'train', process {os.getpid()} of {socket.gethostname()}"
        assert f"RunError: {run.root}: {mine} works there; wait until that has ended" in said
    assert not (run.root / LOCK).exists()
    held, said = other_process(run, 0).communicate(timeout=60)
    assert (held, said) == ("held\n", "")


def test_a_killed_process_leaves_no_lock(run: Run) -> None:
    with other_process(run, 0) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="works there"), only_writer(run.root, "train", 0):
            pass
        other.kill()
    assert (run.root / LOCK).exists()
    with only_writer(run.root, "train"):
        pass
    assert not (run.root / LOCK).exists()


def test_a_lock_whose_file_its_owner_removed_is_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or whoever comes next would make a new file, and have a lock as well."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (run.root / LOCK).unlink())
    with (
        pytest.raises(RunError, match="another process works there"),
        only_writer(run.root, "train", 0),
    ):
        pass


def test_a_file_system_without_locks_is_no_reason_not_to_train(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with only_writer(run.root, "train"):
        pass


def test_a_folder_without_text_gets_no_lock(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path / "none"), load(ROOT / "recipes" / "dates.yaml")
    with pytest.raises(RunError, match="run 'python -m training prepare' first"):
        train(recipe, run)
    assert not run.root.exists()
