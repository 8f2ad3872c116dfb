"""bench.paper: what its trainings differ in, what it says of numbers, and that it goes on."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_toy_text
from hypothesis import given
from hypothesis import strategies as st

from bench import ablation, paper
from bench.paper import CHANGES, RECIPE
from bench.paper_findings import (
    ENSEMBLE,
    FORWARD,
    FOUR_LAYERS,
    ONE_LAYER,
    PAIR,
    REVERSED,
    bounds,
    decoded_file,
    report,
)
from handler.integrity import sha256
from training.prepare import prepare
from training.recipe import ScoringOptions, load
from training.run import write_json

TOY = """\
name: toy
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
model:
  kind: sutskever
  bidirectional: false
  embedding_size: 8
  encoder_layers: 2
  encoder_hidden_size: 8
  decoder_layers: 2
  decoder_hidden_size: 8
  reverse_source: true
training: {epochs: 1, batch_tokens: 400, validate_every: 100, warmup_steps: 5, device: cpu}
scoring: {length_penalty: 0.0, tokenize: none}
export: {max_source_length: 32, max_target_length: 12}
"""
FINDINGS = (
    "Reversing the source lowers perplexity", "Reversing the source raises BLEU",
    "Each further layer lowers perplexity", "A beam of 2 gives one model",
    "A beam of 2 gives the ensemble of 5", "An ensemble of 5 is better",
    "Long sentences are translated as well",
)  # fmt: skip


def test_trainings_differ_in_what_is_compared_and_in_nothing_else() -> None:
    recipes = {name: load(RECIPE, None, changes).as_dict() for name, changes in CHANGES.items()}
    base = recipes[REVERSED[0]]
    different = {
        name: {
            f"{section}.{key}": value
            for section in ("data", "cleaning", "tokenizer", "model", "training", "scoring")
            for key, value in other[section].items()
            if base[section][key] != value
        }
        for name, other in recipes.items()
    }
    assert base["model"]["reverse_source"]
    assert base["model"]["encoder_layers"] == 2
    assert different.pop(FORWARD) == {"model.reverse_source": False}
    assert different.pop(ONE_LAYER) == {"model.encoder_layers": 1, "model.decoder_layers": 1}
    assert different.pop(FOUR_LAYERS) == {"model.encoder_layers": 4, "model.decoder_layers": 4}
    assert [different.pop(name) for name in REVERSED[1:]] == [
        {"training.seed": seed} for seed in (2, 3, 4, 5)
    ]
    assert different == {REVERSED[0]: {}}


def test_searching_is_the_papers() -> None:
    scoring = load(RECIPE).scoring
    assert (scoring.beam_size, scoring.length_penalty) == (12, 0.0)
    assert (scoring.tokenize, scoring.lowercase) == ("none", True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 8))
def test_buckets_hold_every_sentence_once(words: list[int], count: int) -> None:
    found = bounds(words, count)
    assert 1 <= len(found) <= count
    assert found[0][0] == min(words)
    assert found[-1][1] == max(words)
    for (_, last), (first, _) in itertools.pairwise(found):
        assert first == last + 1
    most = max(Counter(words).values())
    sizes = [sum(first <= one <= last for one in words) for first, last in found]
    assert min(sizes) > 0
    # A bucket ends with the length that fills it.
    assert max(sizes) <= len(words) / count + 1 + most * count


def test_buckets_are_about_equal_where_lengths_allow() -> None:
    words = [length for length in range(5, 35) for _ in range(10)]
    sizes = [sum(a <= one <= b for one in words) for a, b in bounds(words, 6)]
    assert sizes == [50] * 6


def write(runs: Path, name: str, perplexity: float | None, bleu: tuple[float, ...]) -> None:
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    both = {} if perplexity is None else {"test": perplexity, "validation": perplexity}
    scores = {beam: {"test": one, "validation": one} for beam, one in zip((12, 2, 1), bleu)}
    (folder / "paper.json").write_text(json.dumps({"perplexity": both, "bleu": scores}))
    text = "a b c d\n" * 6 + "a b c d e f g h\n" * 6
    for beam, _ in zip((12, 2, 1), bleu):
        (folder / decoded_file("test", beam)).write_text(text)
    (folder / "data").mkdir(exist_ok=True)
    for side in ("source", "target"):
        (folder / "data" / f"test.{side}").write_text(text)


def write_all(runs: Path) -> None:
    """Numbers in which every finding holds."""
    for i, name in enumerate(REVERSED):
        write(runs, name, 8.0 + i / 10, (30.0 + i / 10, 29.7, 29.0))
    write(runs, FORWARD, 9.0, (26.0, 25.0, 24.0))
    write(runs, ONE_LAYER, 9.1, (28.0,))
    write(runs, FOUR_LAYERS, 7.0, (31.0,))
    write(runs, PAIR, None, (32.0,))
    # The decoded text above is the reference: BLEU 100 in every bucket.
    write(runs, ENSEMBLE, None, (34.0, 33.7, 33.0))


def verdicts(runs: Path) -> dict[str, str]:
    """Of each finding, the last sentence told of it."""
    text = report(runs, ScoringOptions(tokenize="none"))
    lines = [line[2:] for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == len(FINDINGS)
    found = {}
    for finding, line in zip(FINDINGS, lines):
        assert line.startswith(finding)
        found[finding] = line
    return found


def test_findings_that_hold_are_said_to(tmp_path: Path) -> None:
    write_all(tmp_path)
    for line in verdicts(tmp_path).values():
        assert ". Holds" in line, line
        assert "but within" not in line


@pytest.mark.parametrize(
    ("finding", "name", "perplexity", "bleu"),
    [
        (0, FORWARD, 7.9, (26.0,)),
        (1, FORWARD, 9.0, (31.0,)),
        (2, ONE_LAYER, 8.0, (28.0,)),
        (2, FOUR_LAYERS, 8.3, (28.0,)),
        (4, ENSEMBLE, None, (34.0, 33.2, 33.0)),
        (4, ENSEMBLE, None, (32.0, 33.2, 33.0)),
        (4, ENSEMBLE, None, (33.001, 33.2, 33.0)),
        (5, ENSEMBLE, None, (30.0, 29.9, 29.0)),
        (6, ENSEMBLE, None, (101.5, 101.4, 101.0)),
    ],
)
def test_a_finding_that_does_not_hold_is_said_not_to(
    tmp_path: Path, finding: int, name: str, perplexity: float | None, bleu: tuple[float, ...]
) -> None:
    write_all(tmp_path)
    write(tmp_path, name, perplexity, bleu)
    assert ". Does not hold" in verdicts(tmp_path)[FINDINGS[finding]]


@pytest.mark.parametrize(
    ("finding", "name", "perplexity", "bleu"),
    [
        (0, FORWARD, 8.3, (26.0,)),
        (1, FORWARD, 9.0, (30.1,)),
        (2, FOUR_LAYERS, 8.1, (30.0,)),
        (5, ENSEMBLE, None, (30.3, 30.0, 29.0)),
    ],
)
def test_a_difference_as_small_as_that_of_seeds_does_not_count(
    tmp_path: Path, finding: int, name: str, perplexity: float | None, bleu: tuple[float, ...]
) -> None:
    write_all(tmp_path)
    write(tmp_path, name, perplexity, bleu)
    assert "Holds in direction, but within what a seed" in verdicts(tmp_path)[FINDINGS[finding]]


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    write(tmp_path, REVERSED[0], 8.0, (30.0,))
    text = report(tmp_path, ScoringOptions(tokenize="none"))
    assert text.count("not measured yet") == len(FINDINGS)
    assert "| reversed source, 2 layers | 12 | 30.00 | 30.00 | 8.00 | 8.00 |" in text
    assert "| ensemble of 5 reversed | 12 | - | - |" in text
    assert report(tmp_path / "none", ScoringOptions()).count("not measured yet") == len(FINDINGS)


def write_little_text(folder: Path) -> None:
    write_toy_text(folder, 300)
    for name in ("validation", "test"):
        for side in ("src", "tgt"):
            path = folder / f"{name}.{side}"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))


def test_it_goes_on_where_it_was_and_decodes_again_only_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_little_text(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    runs = tmp_path / "runs"
    given = ["--recipe", str(tmp_path / "toy.yaml"), "--runs", str(runs)]

    def call(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["paper", *given, *more])
        assert paper.main() == 0
        return capsys.readouterr().out

    assert "0 of 8 trainings finished" in call("--table")
    first = call("--data", str(tmp_path))
    assert "8 of 8 trainings finished" in first
    assert "not measured yet" not in first
    kept = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert first == call("--data", str(tmp_path)) == call("--table")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}

    # Other weights of a member: it and the ensembles that it is in are scored again, no others.
    second, other = (runs / name / "checkpoints" / "best.pt" for name in (REVERSED[1], FORWARD))
    again = load(tmp_path / "toy.yaml", str(tmp_path), ("training.seed=2", "training.epochs=2"))
    paper.train(again, paper.Run(runs / REVERSED[1]), accept_changes=True)
    assert second.stat().st_mtime_ns != kept[second]
    monkeypatch.setitem(CHANGES, REVERSED[1], ("training.seed=2", "training.epochs=2"))
    call("--data", str(tmp_path))
    changed = {path.parent.name for path, when in kept.items()
               if path.name == "paper.json" and path.stat().st_mtime_ns != when}  # fmt: skip
    assert changed == {REVERSED[1], PAIR, ENSEMBLE}
    told = json.loads((runs / REVERSED[1] / "paper.json").read_text())
    assert told["weights"] == [sha256(second)]
    assert other.stat().st_mtime_ns == kept[other]


def test_text_is_needed_to_train_and_a_wrong_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["paper", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        paper.main()
    monkeypatch.setattr("sys.argv", ["paper", "--runs", str(tmp_path), "--data", "nowhere"])
    assert paper.main() == 1
    assert "nowhere" in capsys.readouterr().err


def test_ingredients_are_left_out_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_little_text(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    runs = tmp_path / "runs"
    monkeypatch.setattr(
        "sys.argv",
        ["ablation", str(tmp_path / "toy.yaml"), "--data", str(tmp_path), "--runs", str(runs),
         "--set", "training.label_smoothing=0.1", "no_label_smoothing"],
    )  # fmt: skip
    assert ablation.main() == 0
    first = capsys.readouterr().out
    assert "| recipe |" in first
    assert "| no_label_smoothing: `training.label_smoothing=0` |" in first
    kept = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert ablation.main() == 0
    assert capsys.readouterr().out == first
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_each_way_of_training_has_a_budget_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_little_text(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    trainings = []
    for name, change in (
        ("once", "seed=1"), ("other_seed", "seed=2"), ("twice", "r_drop=2"), ("over", "seed=3"),
    ):  # fmt: skip
        recipe = load(tmp_path / "toy.yaml", str(tmp_path), (f"training.{change}",))
        trainings.append(paper.Training(name, recipe, paper.Run(tmp_path / name)))
        prepare(recipe, trainings[-1].run.root)
    write_json(trainings[-1].run.summary, {})
    speeds = iter((100.0, 50.0))
    monkeypatch.setattr(paper, "speed", lambda one, pairs: next(speeds))
    told = re.findall(r"(\w+): (?:\d+ minutes, (\d+) words/s|finished)", paper.budget(trainings))
    assert told == [("once", "100"), ("other_seed", "100"), ("twice", "50"), ("over", "")]


def test_an_ingredient_that_is_not_known_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["ablation", "toy.yaml", "--data", ".", "salt"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "NAME: got salt; allowed: recipe, no_average" in capsys.readouterr().err
