"""The verb train: its loop, and that it learns."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy
from tiny_run import StraightRuns, Tiny, assert_same_run, board, figures, verb

import training.train
from training import checkpoint
from training.lines import LineError
from training.loading import Loader
from training.memory import enough_memory
from training.run import Run, RunError
from training.scoring import perplexity
from training.train import Trainer, tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fresh_begins_anew(straight: StraightRuns, tiny: Tiny) -> None:
    expected = straight["attention"]
    tiny = expected.copy(tiny.file.parent / "fresh")
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
    assert_same_run(tiny.run, expected.run)


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


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_part_of_an_epoch(tiny: Tiny, accumulate: int) -> None:
    batches = len(tiny.trainer().sampler.batches(0))
    tiny.change("epochs: 2", f"epochs: 0.5\n  accumulate: {accumulate}")
    progress = tiny.train()
    assert progress.finished == "0.5 epochs are done"
    assert progress.step == -(-batches // (2 * accumulate))


def test_an_epoch_is_each_batch_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where accumulate does not divide it, too: the last update then has fewer."""
    tiny.change("epochs: 2", "epochs: 2\n  accumulate: 3")
    update = Trainer.update
    numbers: list[list[int]] = []
    sentences = 0

    def watched(self: Trainer, batches: Any, rate: float, own: Any) -> dict[str, float]:
        nonlocal sentences
        numbers.append([number for number, _ in own])
        for batch, (_, index) in zip(batches, own, strict=True):
            assert batch.source.size(0) == len(index)
            sentences += len(index)
        return update(self, batches, rate, own)

    monkeypatch.setattr(Trainer, "update", watched)
    trainer = tiny.trainer()
    counts = [len(trainer.sampler.batches(epoch)) for epoch in (0, 1)]
    trainer.train()
    assert [n for each in numbers for n in each] == [n for count in counts for n in range(count)]
    assert counts[0] % 3 != 0
    assert [len(each) for each in numbers[: -(-counts[0] // 3)]][-2:] == [3, counts[0] % 3]
    assert sentences == 2 * len(trainer.pairs.pairs)


def test_the_summary_says_what_was_trained(straight: StraightRuns) -> None:
    tiny = straight["attention"]
    summary = json.loads(tiny.run.summary.read_text())
    [score] = [
        line["perplexity"] for line in figures(tiny.run)
        if line["kind"] == "validation" and line["step"] == summary["best_step"]
    ]  # fmt: skip
    assert summary["perplexity"] == score
    trainer = tiny.trainer(fresh=False)
    assert summary["parameters"] == sum(p.numel() for p in trainer.network.parameters())
    assert summary["precision"] in ("float32", "bfloat16")
    assert summary["ended"] == "2 epochs are done"


# Too little memory


@contextmanager
def memory_for_more(size: int) -> Iterator[None]:
    """At most `size` bytes beside those that this process has."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def test_a_model_that_memory_does_not_hold(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory_for_more(2 << 30):
        change = ("--set", "model.decoder_hidden_size=60000")
        code, error = verb(monkeypatch, capsys, tiny, "train", *change)
    assert code == 1
    assert error.count("\n") == 1
    assert error.startswith("train: making the network: ")
    assert "can't allocate memory" in error
    assert "Lower the sizes of the model (model.decoder_hidden_size, " in error


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


@pytest.mark.parametrize(
    ("where", "name", "said"),
    [
        (Loader, "on_device", "step 0"),
        (training.train, "perplexity", "validation at step 15"),
        (Trainer, "bleu", "validation at step 15"),
    ],
)
def test_batches_that_memory_does_not_hold(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, where: object, name: str, said: str
) -> None:
    monkeypatch.setattr(where, name, no_memory)
    with pytest.raises(RunError) as caught:
        tiny.train()
    assert str(caught.value).startswith(
        f"{said}: CUDA out of memory. Tried to allocate 9 GiB. Lower training.batch_tokens "
    )
    assert "--accept-changes" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError("std::bad_alloc"), torch.OutOfMemoryError("CUDA out of memory"),
        LineError("line 1: decoding failed: OutOfMemoryError"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_has_many_forms(error: Exception) -> None:
    with pytest.raises(RunError, match=r"^this: .*\. Do that$"), enough_memory("this", "Do that"):
        raise error


# Text to be scored that is too long


@pytest.mark.parametrize("name", ["validation", "test"])
def test_text_that_the_model_may_not_read_is_said_before_training(tiny: Tiny, name: str) -> None:
    path = tiny.run.data / f"{name}.source"
    lines = path.read_text().splitlines()
    lines[6] = "abcdefgh" * 20
    path.write_text("".join(f"{line}\n" for line in lines))
    length = len(tokenizers(tiny.run)[0].encode(lines[6])) + 1
    with pytest.raises(RunError) as caught:
        tiny.train()
    assert str(caught.value) == (
        f"export.max_source_length: got 32; allowed: at least {length}, as line 7 of {path} has so "
        "many tokens with EOS; or split that line in the text and prepare again"
    )
    assert not tiny.run.checkpoints[0].parent.exists()


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    with torch.no_grad():
        trainer.network.generator.weight.zero_()
        trainer.network.generator.bias.zero_()
    batches = trainer.held_out.every(trainer.options.batch_tokens)
    assert perplexity(trainer.network, batches) == pytest.approx(300, rel=1e-5)


def test_verbs_out_of_order_say_which_is_missing(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained = straight["attention"]
    empty = Tiny(tiny.file, Run(tiny.file.parent / "empty"))
    for one, expected in (
        (empty, {"train": "prepare", "evaluate": "train", "export": "train"}),
        (empty, {"archive": "export", "translate": "export"}),
        (trained, {"export": "evaluate", "archive": "export", "translate": "export"}),
    ):
        for name, missing in expected.items():
            code, error = verb(monkeypatch, capsys, one, name)
            assert code == 1
            assert error.startswith(f"{name}: ")
            assert error.endswith(f"not there yet; run 'python -m training {missing}' first\n")
            assert error.count("\n") == 1
    assert not empty.run.root.exists()


def test_a_toy_language_is_learnt(toy: Toy) -> None:
    scores = toy.run.read_json(toy.run.scores, "evaluate")
    assert scores["validation_perplexity"] < 1.2
    assert scores["test"]["exact_match"] >= 0.95


def test_a_long_source_is_cut_where_it_is_named(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer()
    monkeypatch.setattr(trainer.source, "decode", lambda _: "x" * 81)
    assert trainer.shown(0) == "x" * 79 + "…"
    monkeypatch.setattr(trainer.source, "decode", lambda _: "x" * 80)
    assert trainer.shown(0) == "x" * 80
