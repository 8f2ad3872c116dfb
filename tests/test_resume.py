"""The law of resuming: a run that was stopped anywhere is the run that was not, to the last bit."""

import functools
import json
import signal

import pytest
import torch
from tiny_run import (
    KINDS,
    StraightRuns,
    Tiny,
    assert_equal,
    assert_same_run,
    at_step,
    contents,
    in_process,
    signal_at,
    verb,
)

import training.train
from training import checkpoint
from training.evaluate import evaluate
from training.recipe import load
from training.run import LOCK, RunError, only_writer
from training.signals import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_twice_is_the_same_run(
    kind: str, straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = (7, 17)  # neither where a line is logged nor where validation is done
    expected = straight[kind]
    tiny.of_kind(kind)
    signal_at(monkeypatch, lambda step: step in stops)
    for step in stops:
        torch.manual_seed(step)  # whatever the process did before
        with pytest.raises(Interrupted, match=f"stopped at step {step}; the same command goes on"):
            tiny.train()
        assert checkpoint.load(tiny.run.checkpoints[0])["progress"]["step"] == step
        assert not tiny.run.summary.exists()
    assert tiny.train().finished == expected.train().finished
    assert_same_run(tiny.run, expected.run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_after_every_update_is_the_same_run(
    kind: str, straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight[kind]
    tiny.of_kind(kind)
    signal_at(monkeypatch, lambda step: True)
    stops = 0
    while not tiny.run.summary.exists():
        try:
            tiny.train()
        except Interrupted:
            stops += 1
    assert stops == json.loads(tiny.run.summary.read_text())["steps"]
    assert_same_run(tiny.run, expected.run)


def test_the_kinds_differ_in_what_resuming_must_restore(straight: StraightRuns) -> None:
    held = {kind: contents(straight[kind].run.checkpoints[0]) for kind in KINDS}
    assert held["everything"]["average"]
    assert held["everything"]["progress"]["step"] == held["attention"]["progress"]["step"] / 2
    network = held["everything"]["network"].values()
    learnt = [w for w in network if w.shape[0] > 0]
    assert any(
        not torch.equal(w, a) for w, a in zip(learnt, held["everything"]["average"])
    )


def test_ctrl_c_on_the_command_line(straight: StraightRuns, tiny: Tiny) -> None:
    done = in_process(tiny, at_step(24, f"os.kill(os.getpid(), {int(signal.SIGINT)})"))
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "train: stopped at step 24; the same command goes on"
    assert "Traceback" not in done.stderr
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


@pytest.mark.parametrize(
    ("kind", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)]
)
def test_only_a_second_ctrl_c_stops_at_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals, error: type[BaseException]
) -> None:
    """Under torchrun and a job scheduler, two SIGTERMs come at once."""
    update = training.train.Trainer.update

    def twice(self: training.train.Trainer, *arguments: object) -> dict[str, float]:
        for _ in range(2):
            signal.raise_signal(kind)
        return update(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training.train.Trainer, "update", twice)
    former = signal.getsignal(kind)
    with pytest.raises((KeyboardInterrupt, Interrupted)) as stopped:
        tiny.train()
    assert stopped.type is error
    assert signal.getsignal(kind) == former
    assert tiny.run.checkpoints[0].exists() == (error is Interrupted)


def test_a_stop_when_all_is_done_is_no_interruption(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.change("validate_every: 15", "validate_every: 2\n  patience: 1")
    monkeypatch.setattr(training.train, "perplexity", lambda *_: 2.0)
    signal_at(monkeypatch, lambda step: step == 4)
    assert tiny.train().finished == "no better perplexity in 1 validations since step 2"
    assert tiny.run.summary.exists()


def test_a_run_killed_before_its_summary_is_finished(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(training.train, "write_json", dying)
        with pytest.raises(SystemExit):
            tiny.train()
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_second_train_does_nothing(straight: StraightRuns) -> None:
    tiny = straight["attention"]
    former = tiny.files()
    assert tiny.train().finished == "2 epochs are done"
    assert tiny.files() == former


def test_a_finished_run_may_be_on_another_device(straight: StraightRuns, tiny: Tiny) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "moved")
    tiny.change("epochs: 2\n", "epochs: 2\n  device: cpu\n")
    former = tiny.files()
    assert tiny.train(accept_changes=True).finished == "2 epochs are done"
    assert tiny.files() == former


# A changed recipe


def test_a_changed_recipe_is_refused_and_said(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tiny = straight["attention"].copy(tiny.file.parent / "changed")
    tiny.change("epochs: 2\n", "epochs: 3\n")
    former = tiny.files()
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 1
    assert "last.pt was trained otherwise: training.epochs: 2.0 -> 3.0. Change that back" in error
    assert "--accept-changes" in error
    assert tiny.files() == former
    code, error = verb(monkeypatch, capsys, tiny, "train", "--accept-changes")
    assert code == 0
    assert error.splitlines()[0] == "train: changed: training.epochs: 2.0 -> 3.0"
    code, error = verb(monkeypatch, capsys, tiny, "train")  # it is that recipe's run now
    assert (code, error) == (0, "")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("attention_size: 16", "attention_size: 8", "model.attention_size: 16 -> 8"),
        ("source_vocabulary: 300", "source_vocabulary: 301", "prepared otherwise"),
    ],
)
def test_only_the_section_training_may_change(
    straight: StraightRuns, tiny: Tiny, before: str, after: str, said: str
) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "changed")
    tiny.change(before, after)
    former = tiny.files()
    with pytest.raises(RunError, match=said):
        tiny.train(accept_changes=True)
    assert tiny.files() == former


def test_more_epochs_go_on_where_the_fewer_ended(tiny: Tiny) -> None:
    tiny.change("schedule: linear", "schedule: constant")
    longer = tiny.copy(tiny.file.parent / "longer")
    longer.change("epochs: 2\n", "epochs: 3\n")
    longer.train()
    tiny.train()
    tiny.run.scores.write_text("{}")  # of the former weights
    tiny.change("epochs: 2\n", "epochs: 3\n")
    assert tiny.train(accept_changes=True).finished == "3 epochs are done"
    assert not tiny.run.scores.exists()
    one, other = (contents(each.run.checkpoints[0]) for each in (tiny, longer))
    for part in ("network", "optimizer"):
        assert_equal(one[part], other[part])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("learning_rate: 0.01", "learning_rate: 0.01\n  optimizer: sgd"),
        ("learning_rate: 0.01", "learning_rate: 0.01\n  average: 0.9"),
        ("batch_tokens: 80", "batch_tokens: 200"),
        ("validate_every: 15", "validate_every: 15\n  select_by: bleu"),
    ],
)
def test_training_goes_on_under_other_options(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    with monkeypatch.context() as patched:
        signal_at(patched, lambda step: step == 17)
        with pytest.raises(Interrupted):
            tiny.train()
    tiny.change(before, after)
    progress = tiny.train(accept_changes=True)
    assert progress.finished == "2 epochs are done"
    assert progress.step > 17
    assert progress.best_step > 15 or "bleu" not in after
    evaluate(load(tiny.file), tiny.run)


def test_weights_of_before_a_change_may_stay_the_best(tiny: Tiny) -> None:
    best = tiny.train().best_step
    tiny.change("epochs: 2\n", "epochs: 3\n")
    tiny.change("learning_rate: 0.01", "learning_rate: 1.0e-30")
    assert tiny.train(accept_changes=True).best_step == best
    evaluate(load(tiny.file), tiny.run)
    assert tiny.run.read_json(tiny.run.scores, "evaluate")["step"] == best


# Another number of processes, another precision


def stopped_with(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, **other: object) -> None:
    """A run that was stopped at step 7, as one whose checkpoint says this."""
    with monkeypatch.context() as patched:
        signal_at(patched, lambda step: step == 7)
        with pytest.raises(Interrupted):
            tiny.train()
    last = tiny.run.checkpoints[0]
    held = {**checkpoint.load(last), **other}
    checkpoint.write(last, {key: value for key, value in held.items() if value is not None})


def test_only_one_process_trains_in_a_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.train.only_writer", functools.partial(only_writer, patience=0))
    with only_writer(tiny.run.root, "evaluate"), pytest.raises(RunError, match="works there"):
        tiny.train()
    assert not tiny.run.checkpoints[0].exists()
    tiny.train()
    assert not (tiny.run.root / LOCK).exists()


def test_another_number_of_processes_is_refused_unless_accepted(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_with(tiny, monkeypatch, processes=8)
    former = tiny.files()
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert (code, error) == (
        1,
        f"train: {tiny.run.root}: processes: got 1; allowed: 8, as the run was trained by so many: "
        "an update would be of 1 batches instead of 8. Start 8, or train with --accept-changes; "
        "--set training.accumulate=8 with it keeps an update's size\n",
    )
    assert tiny.files() == former
    change = ("--accept-changes", "--set", "training.accumulate=8")
    code, error = verb(monkeypatch, capsys, tiny, "train", *change)
    assert code == 0
    assert "train: changed: processes: 8 -> 1; batches an update: 8 -> 8\n" in error
    assert checkpoint.load(tiny.run.checkpoints[0])["processes"] == 1


def test_a_finished_run_may_be_read_by_another_number_of_processes(
    straight: StraightRuns, tiny: Tiny
) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "fewer")
    last = tiny.run.checkpoints[0]
    checkpoint.write(last, {**checkpoint.load(last), "processes": 8})
    former = tiny.files()
    assert tiny.train().finished == "2 epochs are done"
    assert tiny.files() == former


def test_another_precision_is_said(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_with(tiny, monkeypatch, precision="bfloat16")
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 0
    assert error.splitlines()[0] == "train: changed: precision: bfloat16 -> float32"


def test_a_checkpoint_from_before_these_were_kept_goes_on(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_with(tiny, monkeypatch, processes=None, precision=None)
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)
