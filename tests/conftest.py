"""A toy language that is learnt in a minute: digit strings, translated by reading them backwards.

The run is made once for the whole session, by the verbs a user would type.
"""

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.recipe import Recipe, load
from training.run import Run

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """\
name: toy
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 271, target_vocabulary: 271}
model:
  kind: attention
  embedding_size: 32
  encoder_hidden_size: 48
  decoder_hidden_size: 64
  attention_size: 48
training:
  epochs: 6
  batch_tokens: 600
  learning_rate: 0.004
  schedule: linear
  warmup_steps: 50
  validate_every: 300
export: {max_source_length: 64, max_target_length: 64}
"""


def digits(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 8)))
        for _ in range(count)
    ]


def backwards(text: str) -> str:
    return text[::-1]


def write_toy_text(folder: Path, pairs: int = 20000) -> None:
    """Text of the toy language; no source of one set is in another."""
    seen: set[str] = set()
    for name, count, seed in (("test", 200, 1), ("validation", 200, 2), ("train", pairs, 3)):
        lines = [one for one in digits(count, seed) if one not in seen]
        seen |= set(lines)
        (folder / f"{name}.src").write_text("".join(f"{one}\n" for one in lines))
        (folder / f"{name}.tgt").write_text("".join(f"{backwards(one)}\n" for one in lines))


def run_verb(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """`python -m training ...` as a user types it."""
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False, **options
    )


@dataclass(frozen=True)
class Toy:
    """A finished run of the toy language."""

    recipe_file: Path
    recipe: Recipe
    run: Run
    store: Path  # holds seq2seq.mar


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_text(folder)
    recipe_file = folder / "toy.yaml"
    recipe_file.write_text(RECIPE)
    run, store = folder / "run", folder / "store"
    for verb in ("prepare", "train", "evaluate", "export", "archive"):
        more = ("--store", store) if verb == "archive" else ()
        done = run_verb(verb, recipe_file, "--run", run, *more)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
    return Toy(recipe_file, load(recipe_file), Run(run), store)
