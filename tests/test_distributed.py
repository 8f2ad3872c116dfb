"""Two processes that torchrun starts learn what one learns from the same batches."""

import subprocess
import sys

import pytest
import torch
from tiny_run import (
    ROOT,
    Tiny,
    assert_same_run,
    at_step,
    command,
    contents,
    environment,
    figures,
)

from training import checkpoint
from training.distributed import Processes, processes
from training.recipe import load
from training.run import RunError
from training.signals import Interrupted
from training.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = 7
# The group's threads, should one be there when the interpreter ends: it aborts the process where it
# then asks for the interpreter's lock.
LEFT = """
import atexit, pathlib
@atexit.register
def left():
    threads = [one.read_text() for one in pathlib.Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in one for one in threads):
        print("left:", *threads, file=sys.stderr)
"""
# What a job scheduler does: SIGTERM to every process, and torchrun sends its own on. The second
# process hears of it from the first alone.
TERMINATED = f"""
{LEFT}
import os, signal, time
def terminated(first):
    if not first:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    for process in (os.getpid(), os.getppid()):
        os.kill(process, signal.SIGTERM)
    time.sleep(2)  # until torchrun's has come, too
{at_step(STOP, "terminated(self.processes.first)")}
"""


def torchrun(
    tiny: Tiny, hook: str | None = None, count: int = 2, *more: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m training train`, or a script with these lines before it."""
    # Without --, torchrun takes --run for the beginning of an option of its own.
    what = ["-m", "--", "training"]
    if hook is not None:
        script = tiny.file.with_name("hooked.py")
        script.write_text(
            f"import sys\n{hook}\nfrom training.__main__ import main\nsys.exit(main())\n"
        )
        what = ["--", str(script)]
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={count}", *what, *command(tiny, "train", *more),
        ],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip


def exact(tiny: Tiny) -> Tiny:
    """Without dropout, whose masks differ from process to process, and in float32. The first epoch
    has an odd number of batches: in its last update one of two processes has none."""
    tiny.change("dropout: 0.2", "dropout: 0.0")
    tiny.change("batch_tokens: 80", "batch_tokens: 84\n  precision: fp32\n  average: 0.9")
    counts = [len(tiny.trainer().sampler.batches(epoch)) for epoch in (0, 1)]
    assert counts[0] % 2 == 1
    return tiny


@pytest.fixture(scope="module")
def together(
    prepared: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tiny, subprocess.CompletedProcess[str]]:
    """A run of two processes that was never stopped."""
    tiny = exact(prepared.copy(tmp_path_factory.mktemp("together") / "tiny"))
    return tiny, torchrun(tiny, LEFT)


def test_two_processes_learn_what_one_learns_from_two_batches(
    together: tuple[Tiny, subprocess.CompletedProcess[str]], tiny: Tiny
) -> None:
    both, done = together
    assert done.returncode == 0, done.stderr
    assert "left:" not in done.stderr
    exact(tiny).change("epochs: 2", "epochs: 2\n  accumulate: 2")
    before = [p.detach().clone() for p in tiny.trainer().network.parameters()]
    tiny.train()
    ours, theirs = (contents(one.run.checkpoints[0]) for one in (tiny, both))
    assert ours["progress"]["step"] == theirs["progress"]["step"]
    # accumulate is the one difference of the recipes
    for part in ("network", "average"):
        a, b = ours[part], theirs[part]
        for key in a if part == "network" else range(len(a)):
            assert torch.allclose(a[key], b[key], rtol=1e-3, atol=2e-5), (part, key)
    moved = [float((a - b).abs().max()) for a, b in zip(before, ours["network"].values())]
    assert max(moved) > 0.05
    for one, other in zip(figures(tiny.run), figures(both.run), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert other == pytest.approx(one, rel=1e-4)


def test_only_the_first_process_writes_and_speaks(
    together: tuple[Tiny, subprocess.CompletedProcess[str]],
) -> None:
    tiny, done = together
    assert done.stdout.splitlines() == ["finished at step 20: 2 epochs are done; best at step 20"]
    validations = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert len(validations) == 2
    assert [line["step"] for line in figures(tiny.run)] == [15, 20, 20]
    assert len(list(tiny.run.tensorboard.iterdir())) == 1
    assert not list(tiny.run.root.rglob(".*"))
    assert checkpoint.load(tiny.run.checkpoints[0])["processes"] == 2


def test_processes_that_were_stopped_go_on_as_if_they_were_not(
    together: tuple[Tiny, subprocess.CompletedProcess[str]], tiny: Tiny
) -> None:
    exact(tiny)
    done = torchrun(tiny, TERMINATED)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert said == [f"train: stopped at step {STOP}; the same command goes on"]
    assert "left:" not in done.stderr
    assert "KeyboardInterrupt" not in done.stderr
    assert checkpoint.load(tiny.run.checkpoints[0])["progress"]["step"] == STOP
    done = torchrun(tiny)
    assert done.returncode == 0
    assert_same_run(tiny.run, together[0].run)


def test_a_process_that_dies_ends_the_others(tiny: Tiny) -> None:
    hook = at_step(STOP, "0 if self.processes.first else os.kill(os.getpid(), 9)")
    done = torchrun(exact(tiny), hook)
    assert done.returncode == 1
    assert "train: process 0: another process has ended, and said why; train again" in done.stderr
    assert "training/train.py" not in done.stderr  # no traceback of ours
    assert not tiny.run.summary.exists()


# The second process has every other batch of an epoch. Its loss makes that of all no number.
SPOILT = f"""
import training.learner
batch_loss = training.learner.batch_loss
def spoilt(*arguments):
    loss, surprise = batch_loss(*arguments)
    return loss * float("nan"), surprise
{at_step(STOP, "0 if self.processes.first else setattr(training.learner, 'batch_loss', spoilt)")}
"""


def test_the_batch_of_the_process_whose_loss_is_no_number_is_named(tiny: Tiny) -> None:
    number = 2 * (STOP - 1) + 1
    pairs = exact(tiny).trainer().sampler.batches(0)[number]
    done = torchrun(tiny, SPOILT)
    assert done.returncode == 1
    said = {line for line in done.stderr.splitlines() if line.startswith("train: ")}
    assert len(said) == 1  # the same, whichever of them torchrun ends first
    assert f"in epoch 1, batch {number + 1} (pairs {int(pairs[0]) + 1} '" in said.pop()


# Without processes


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes(gpu=False) as mine:
        assert mine == Processes()
        assert mine.first
        assert mine.total(1.5, 2) == [1.5, 2]
        assert mine.shared({"a": 1}) == {"a": 1}
        assert mine.gathered("a") == ["a"]


def test_processes_that_see_different_folders_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "total", lambda self, *figures: [2.0 * f + 5 for f in figures])
    with pytest.raises(RunError, match="different steps; allowed: one folder that all machines"):
        Trainer(load(tiny.file), tiny.run, True)


@pytest.mark.parametrize("stopped", [True, False])
def test_only_the_first_process_returns(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The command line, which tells how training ended, is theirs too."""

    def end(self: Trainer) -> None:
        if stopped:
            raise Interrupted

    monkeypatch.setattr(Trainer, "__init__", lambda *_: None)
    monkeypatch.setattr(Trainer, "train", end)
    for rank, error in ((0, Interrupted), (1, SystemExit)):
        one = Processes(rank, 2)
        monkeypatch.setattr("training.train.processes", lambda gpu, one=one: Entered(one))
        if rank == 0 and not stopped:
            train(load(tiny.file), tiny.run)
            continue
        with pytest.raises(error) as ended:
            train(load(tiny.file), tiny.run)
        if rank == 1:
            assert ended.value.code == (130 if stopped else None)  # type: ignore[attr-defined]


class Entered:
    """A context that gives `what`."""

    def __init__(self, what: Processes) -> None:
        self.what = what

    def __enter__(self) -> Processes:
        return self.what

    def __exit__(self, *_: object) -> None:
        pass
