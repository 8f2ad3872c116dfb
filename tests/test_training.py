"""The verb train: what it computes, and that stopping, crashing and resuming change nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Toy, write_toy_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.train
from model import SpecialTokens
from training import __main__ as command_line
from training import checkpoint
from training.batches import Batch, collate
from training.evaluate import evaluate
from training.export import export
from training.prepare import prepare
from training.recipe import load
from training.run import Run, RunError
from training.scoring import perplexity, token_losses
from training.train import Interrupted, Trainer, train

RECIPE = """\
name: tiny
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
export: {max_source_length: 32, max_target_length: 32}
"""
KINDS = {
    "attention": """\
model:
  embedding_size: 16
  encoder_hidden_size: 12
  decoder_hidden_size: 20
  attention_size: 16
  dropout: 0.2
training:
  epochs: 2
  batch_tokens: 80
  learning_rate: 0.01
  schedule: linear
  warmup_steps: 5
  label_smoothing: 0.1
  validate_every: 15
""",
    "sutskever": """\
model:
  kind: sutskever
  bidirectional: false
  embedding_size: 16
  encoder_layers: 2
  encoder_hidden_size: 16
  decoder_layers: 2
  decoder_hidden_size: 16
  reverse_source: true
  dropout: 0.2
  initialisation: uniform
training:
  epochs: 1.75
  batch_tokens: 80
  optimizer: sgd
  learning_rate: 0.7
  schedule: halving
  halve_after_epoch: 0.5
  halve_every_epochs: 0.25
  clip_norm: 5
  loss_per: sentence
  validate_every: 15
""",
}
STOPS = (7, 24)  # neither where a line is logged nor where validation is done
SPEEDS = ("target_tokens_per_second", "source_tokens_per_second")


@dataclass(frozen=True)
class Tiny:
    """A recipe, and a run of it that is prepared."""

    file: Path
    run: Run

    def train(self, *, fresh: bool = False) -> checkpoint.Progress:
        return train(load(self.file), self.run, fresh)

    def trainer(self, *, fresh: bool = True) -> Trainer:
        return Trainer(load(self.file), self.run, fresh)

    def change(self, before: str, after: str) -> None:
        text = self.file.read_text()
        assert before in text
        self.file.write_text(text.replace(before, after))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats may depend on the number of threads, and other tests set it."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and what the verb prepare made of it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_toy_text(folder, pairs=240)
    for name in ("validation", "test"):
        for side in ("src", "tgt"):
            path = folder / f"{name}.{side}"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    (folder / "tiny.yaml").write_text(RECIPE + KINDS["attention"])
    prepare(load(folder / "tiny.yaml"), folder / "run")
    return folder


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Tiny:
    return copied(prepared, tmp_path / "tiny", "attention")


@pytest.fixture(scope="module")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    """A run of each kind that was never stopped."""
    torch.set_num_threads(1)
    runs = {}
    for kind in KINDS:
        runs[kind] = copied(prepared, tmp_path_factory.mktemp("straight") / kind, kind)
        runs[kind].train()
    return runs


def copied(prepared: Path, folder: Path, kind: str) -> Tiny:
    shutil.copytree(prepared, folder)
    (folder / "tiny.yaml").write_text(RECIPE + KINDS[kind])
    return Tiny(folder / "tiny.yaml", Run(folder / "run"))


def signal_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Ctrl-C during the updates before these steps."""
    update = Trainer.update

    def interrupted(self: Trainer, batch: Batch, rate: float) -> dict[str, float]:
        if self.progress.step + 1 in steps:
            signal.raise_signal(signal.SIGINT)
        return update(self, batch, rate)

    monkeypatch.setattr(Trainer, "update", interrupted)


def signalled(tiny: Tiny, step: int, which: signal.Signals) -> subprocess.CompletedProcess[str]:
    """`python -m training train` in a process that sends itself a signal at a step."""
    program = f"""
import os, sys
from training.train import Trainer
update = Trainer.update
def signalling(self, batch, rate):
    if self.progress.step + 1 == {step}:
        os.kill(os.getpid(), {int(which)})
    return update(self, batch, rate)
Trainer.update = signalling
from training.__main__ import main
sys.exit(main())
"""
    command = [sys.executable, "-c", program, "train", str(tiny.file), "--run", str(tiny.run.root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300, check=False
    )


def figures(run: Run) -> list[dict[str, Any]]:
    """What metrics.jsonl says, speeds left out."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit by bit, in whatever nesting."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            assert_equal(one, other, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(a: Run, b: Run) -> None:
    for one, other in ((a.last, b.last), (a.best, b.best)):
        contents = checkpoint.load(one), checkpoint.load(other)
        for content in contents:
            del content["progress"]["seconds"]
            content["progress"]["sums"].pop("seconds", None)
            del content["recipe"]["data"]["folder"]
        assert_equal(*contents)
    assert figures(a) == figures(b)
    summaries = [json.loads(run.summary.read_text()) for run in (a, b)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


def board(run: Run) -> dict[tuple[str, int], float]:
    """What TensorBoard shows."""
    shown = EventAccumulator(str(run.tensorboard))
    shown.Reload()
    return {
        (name, event.step): event.value
        for name in shown.Tags()["scalars"]
        for event in shown.Scalars(name)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_twice_is_the_same_run(
    kind: str,
    straight: dict[str, Tiny],
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = copied(prepared, tmp_path / "tiny", kind)
    signal_at(monkeypatch, *STOPS)
    for step in STOPS:
        torch.manual_seed(step)  # whatever the process did before
        with pytest.raises(Interrupted, match=f"stopped at step {step}; train again to go on"):
            tiny.train()
        assert not tiny.run.summary.exists()
    assert tiny.train().finished == straight[kind].train().finished
    assert_same_run(tiny.run, straight[kind].run)


def test_a_run_that_was_stopped_after_an_epoch_is_the_same_run(
    straight: dict[str, Tiny], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(tiny.trainer().sampler.batches(0))
    signal_at(monkeypatch, whole)
    with pytest.raises(Interrupted):
        tiny.train()
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_ctrl_c_on_the_command_line(straight: dict[str, Tiny], tiny: Tiny) -> None:
    done = signalled(tiny, 24, signal.SIGINT)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "train: stopped at step 24; train again to go on"
    assert "Traceback" not in done.stderr
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_killed_run_goes_on(straight: dict[str, Tiny], tiny: Tiny) -> None:
    done = signalled(tiny, 24, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.load(tiny.run.last)["progress"]["step"] == 15
    with tiny.run.metrics.open("a") as file:
        file.write('{"step": 20, "los')  # a line cut off
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they were begun
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)
    assert board(tiny.run).keys() == board(straight["attention"].run).keys()


@pytest.mark.parametrize("saves", [0, 1, 2, 3])
def test_a_run_killed_while_saving_goes_on(
    straight: dict[str, Tiny], tiny: Tiny, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    save = Trainer.save
    done = []

    def dying(self: Trainer, path: Path) -> None:
        if len(done) == saves:
            raise SystemExit
        done.append(path)
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", dying)
        with pytest.raises(SystemExit):
            tiny.train()
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_run_killed_before_its_summary_is_finished(
    straight: dict[str, Tiny], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(training.train, "write_json", dying)
        with pytest.raises(SystemExit):
            tiny.train()
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_second_train_does_nothing(straight: dict[str, Tiny]) -> None:
    tiny = straight["attention"]
    former = {p: p.read_bytes() for p in tiny.run.root.rglob("*") if p.is_file()}
    assert tiny.train().finished == "2 epochs are done"
    assert {p: p.read_bytes() for p in tiny.run.root.rglob("*") if p.is_file()} == former


def test_fresh_begins_anew(straight: dict[str, Tiny], tmp_path: Path) -> None:
    shutil.copytree(straight["attention"].file.parent, tmp_path / "tiny")
    tiny = Tiny(tmp_path / "tiny" / "tiny.yaml", Run(tmp_path / "tiny" / "run"))
    tiny.change("epochs: 2\n", "epochs: 1\n")
    with pytest.raises(RunError, match=r"training\.epochs: 2\.0 -> 1\.0.*--fresh"):
        tiny.train()
    tiny.run.scores.write_text("{}")  # of the former weights
    tiny.run.model.write_text("")
    assert tiny.train(fresh=True).finished == "1 epochs are done"
    assert not tiny.run.scores.exists()
    assert not tiny.run.model.exists()
    steps = [line["step"] for line in figures(tiny.run)]
    assert steps == sorted(steps)
    assert max(step for _, step in board(tiny.run)) == max(steps)
    tiny.change("epochs: 1\n", "epochs: 2\n")
    tiny.train(fresh=True)
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_spoilt_checkpoint_loses_nothing(
    straight: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(straight["attention"].file.parent, tmp_path / "tiny")
    tiny = Tiny(tmp_path / "tiny" / "tiny.yaml", Run(tmp_path / "tiny" / "run"))
    tiny.run.last.write_bytes(tiny.run.last.read_bytes()[:5000])
    former = {p: p.read_bytes() for p in tiny.run.root.rglob("*") if p.is_file()}
    code, error = verb(monkeypatch, capsys, "train", tiny)
    assert code == 1
    assert error.startswith(f"train: {tiny.run.last}: not a whole checkpoint")
    assert {p: p.read_bytes() for p in tiny.run.root.rglob("*") if p.is_file()} == former


def test_text_prepared_otherwise_is_refused(tiny: Tiny) -> None:
    tiny.change("source_vocabulary: 271", "source_vocabulary: 280")
    with pytest.raises(RunError, match=r"source_vocabulary: 271 -> 280.*training prepare' again"):
        tiny.train()


def test_weights_of_other_data_are_refused(straight: dict[str, Tiny], tmp_path: Path) -> None:
    shutil.copytree(straight["attention"].file.parent, tmp_path / "tiny")
    tiny = Tiny(tmp_path / "tiny" / "tiny.yaml", Run(tmp_path / "tiny" / "run"))
    for side in ("src", "tgt"):
        with (tiny.file.parent / f"train.{side}").open("a") as file:
            file.write("7\n")
    recipe = load(tiny.file)
    prepare(recipe, tiny.run.root)
    for call in (train, evaluate, export):
        with pytest.raises(RunError, match=r"pt was trained otherwise: the prepared data"):
            call(recipe, tiny.run)


def test_a_loss_that_is_no_number_stops(
    straight: dict[str, Tiny], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = training.train.token_losses
    calls = []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return losses(*arguments) * (float("nan") if len(calls) == 18 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(training.train, "token_losses", failing)
        with pytest.raises(RunError) as caught:
            tiny.train()
    message = str(caught.value)
    assert message.startswith("step 17: the loss is nan")
    assert f"{tiny.run.last} holds the last good state" in message
    assert "Lower training.learning_rate" in message
    assert checkpoint.load(tiny.run.last)["progress"]["step"] == 15
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


def test_a_loss_that_is_no_number_at_once_promises_no_checkpoint(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    with torch.no_grad():
        trainer.network.generator.bias.fill_(float("inf"))
    with pytest.raises(RunError, match=r"step 0: the loss is nan") as caught:
        trainer.train()
    assert "last.pt" not in str(caught.value)


def test_too_little_memory_is_explained(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(training.train, "token_losses", failing)
    with pytest.raises(RunError, match=r"step 0: CUDA out of .* Lower training\.batch_tokens"):
        tiny.train()


@pytest.mark.parametrize("by", ["perplexity", "bleu"])
def test_patience(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    tiny.change("validate_every: 15", f"validate_every: 2\n  patience: 2\n  select_by: {by}")
    scores = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    score = next(scores)

    def validation(*_: object) -> float:
        return score if by == "perplexity" else -score

    validate = Trainer.validate

    def next_score(self: Trainer, log: Any) -> None:
        nonlocal score
        validate(self, log)
        score = next(scores)

    monkeypatch.setattr(Trainer, "validate", next_score)
    if by == "perplexity":
        monkeypatch.setattr(training.train, "perplexity", validation)
    else:
        monkeypatch.setattr(Trainer, "bleu", validation)
    progress = tiny.train()
    assert progress.finished == f"no better {by} in 2 validations since step 4"
    assert (progress.step, progress.best_step) == (8, 4)
    assert checkpoint.load(tiny.run.best)["progress"]["step"] == 4
    summary = json.loads(tiny.run.summary.read_text())
    assert (summary["steps"], summary["best_step"], summary[by]) == (8, 4, 2.0)


def test_a_stop_when_all_is_done_is_no_interruption(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.change("validate_every: 15", "validate_every: 2\n  patience: 1")
    monkeypatch.setattr(training.train, "perplexity", lambda *_: 2.0)
    signal_at(monkeypatch, 4)
    assert tiny.train().finished == "no better perplexity in 1 validations since step 2"
    assert tiny.run.summary.exists()


def test_a_part_of_an_epoch(tiny: Tiny) -> None:
    batches = len(tiny.trainer().sampler.batches(0))
    tiny.change("epochs: 2", "epochs: 0.5")
    progress = tiny.train()
    assert progress.finished == "0.5 epochs are done"
    assert progress.step == -(-batches // 2)


def test_no_gpu(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny.trainer().device == torch.device("cpu")
    tiny.change("epochs: 2", "epochs: 2\n  device: cuda")
    with pytest.raises(RunError, match=r"training\.device: got 'cuda', but torch sees no GPU.*cpu"):
        tiny.train()


def test_a_validation_sentence_that_the_model_may_not_read(tiny: Tiny) -> None:
    tiny.change("max_source_length: 32", "max_source_length: 4")
    with pytest.raises(RunError, match=r"export\.max_source_length: got 4; allowed: at least \d+"):
        tiny.train()


def test_metrics_and_tensorboard_show_the_same(straight: dict[str, Tiny]) -> None:
    run = straight["attention"].run
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"training", "validation"}
    expected = {
        (f"{line['kind']}/{name}", line["step"]): value
        for line in lines
        for name, value in line.items()
        if name not in ("step", "epoch", "kind")
    }
    assert {name for name, _ in expected} == {
        "training/loss", "training/learning_rate", "training/gradient_norm",
        *(f"training/{name}" for name in SPEEDS), "validation/perplexity", "validation/bleu",
    }  # fmt: skip
    shown = board(run)
    assert shown.keys() == expected.keys()
    for key, value in expected.items():
        assert shown[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_the_gradient_is_scaled_down_only_where_it_is_larger(
    prepared: Path, tmp_path: Path, kind: str, clip_norm: float
) -> None:
    tiny = copied(prepared, tmp_path / "tiny", kind)
    trainer = tiny.trainer()
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters())
    object.__setattr__(trainer.options, "clip_norm", clip_norm)
    batch = trainer.batch(trainer.pairs, trainer.sampler.batches(0)[0])
    former = [p.detach().clone() for p in trainer.network.parameters()]
    given = trainer.update(batch, 1.0)
    steps = [b - a.detach() for a, b in zip(trainer.network.parameters(), former)]
    length = float(torch.stack([step.norm() for step in steps]).norm())
    assert length == pytest.approx(min(given["norm"], clip_norm), rel=1e-2)
    assert 1e-3 < given["norm"] < 1e6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_losses_by_hand(prepared: Path, tmp_path: Path, kind: str) -> None:
    trainer = copied(prepared, tmp_path / "tiny", kind).trainer()
    network = trainer.network.eval()
    network.generator.weight.mul_(50)  # far from uniform, so that smoothing shows
    index = torch.tensor(random.Random(1).sample(range(len(trainer.pairs)), 9))
    batch = collate(trainer.pairs, index, SpecialTokens())
    alone, spread = 0.0, 0.0
    for i in index.tolist():
        source, target = (
            tokens[offsets[i] : offsets[i + 1]].tolist()
            for tokens, offsets in (
                (trainer.pairs.source_tokens, trainer.pairs.source_offsets),
                (trainer.pairs.target_tokens, trainer.pairs.target_offsets),
            )
        )
        logits = network(
            torch.tensor([source]), torch.tensor([len(source)]),
            torch.tensor([[2, *target]]), torch.tensor([len(target) + 1]),
        )  # fmt: skip
        log_p = torch.log_softmax(logits[0].double(), 1)
        for j, token in enumerate([*target, 3]):
            alone -= float(log_p[j, token])
            spread -= float(log_p[j].mean())
    assert float(token_losses(network, batch)) == pytest.approx(alone, rel=1e-5)
    smoothed = 0.9 * alone + 0.1 * spread
    assert smoothed != pytest.approx(alone, rel=1e-3)
    assert float(token_losses(network, batch, 0.1)) == pytest.approx(smoothed, rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    with torch.no_grad():
        trainer.network.generator.weight.zero_()
        trainer.network.generator.bias.zero_()
    assert perplexity(trainer.network, trainer.held_out_batches()) == pytest.approx(271, rel=1e-5)


def test_the_loss_is_per_token_or_per_sentence(prepared: Path, tmp_path: Path) -> None:
    trainer = copied(prepared, tmp_path / "tiny", "sutskever").trainer()
    batch = trainer.batch(trainer.pairs, trainer.sampler.batches(0)[0])
    norms = {}
    for per in ("token", "sentence"):
        object.__setattr__(trainer.options, "loss_per", per)
        torch.manual_seed(1)  # of dropout
        norms[per] = trainer.update(batch, 0.0)["norm"]
    tokens, sentences = int(batch.target_lengths.sum()), batch.source.size(0)
    assert norms["sentence"] / norms["token"] == pytest.approx(tokens / sentences, rel=1e-4)


def verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, tiny: Tiny
) -> tuple[int, str]:
    """Exit code and standard error of a verb."""
    monkeypatch.setattr(sys, "argv", ["x", name, str(tiny.file), "--run", str(tiny.run.root)])
    code = command_line.main()
    return code, capsys.readouterr().err


def test_verbs_out_of_order_say_which_is_missing(
    straight: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained = straight["attention"]
    empty = Tiny(trained.file, Run(tmp_path / "empty"))
    for tiny, expected in (
        (empty, {"train": "prepare", "evaluate": "train", "export": "train"}),
        (empty, {"archive": "export", "translate": "export"}),
        (trained, {"export": "evaluate", "archive": "export", "translate": "export"}),
    ):
        for name, missing in expected.items():
            code, error = verb(monkeypatch, capsys, name, tiny)
            assert code == 1
            assert error.startswith(f"{name}: ")
            assert error.endswith(f"not there yet; run 'python -m training {missing}' first\n")
            assert error.count("\n") == 1
    assert not empty.run.root.exists()


def test_a_toy_language_is_learnt(toy: Toy) -> None:
    scores = toy.run.read_json(toy.run.scores, "evaluate")
    assert scores["validation_perplexity"] < 1.2
    assert scores["test"]["exact_match"] >= 0.95
