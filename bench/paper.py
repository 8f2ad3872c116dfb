"""What Sutskever, Vinyals and Le 2014 (arXiv 1409.3215) found, looked for in a small corpus.

    python -m bench.paper --data FOLDER            train and score what is not there yet, then tell
    python -m bench.paper --table                  tell what there is so far

Every training is an ordinary run folder below --runs. What is finished is skipped and what was
stopped goes on, so after Ctrl-C or a crash the same command is given again. Parameters are those
of the recipe but for the one that is compared. Below the table stands whether each finding holds.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.machine import described
from bench.paper_findings import (
    BEAMS,
    ENSEMBLE,
    FORWARD,
    FOUR_LAYERS,
    ONE_LAYER,
    PAIR,
    REVERSED,
    decoded_file,
    report,
)
from handler.integrity import sha256
from model import ModelOptions, Network, SpecialTokens
from training.batches import Batch, BatchSampler
from training.corpus import Pair, sentences
from training.ensemble import ensemble
from training.evaluate import best_model, perplexity
from training.learner import Learner
from training.loading import Loader
from training.prepare import prepare
from training.recipe import Recipe, TrainingOptions, load
from training.run import Run, write_json, write_text
from training.scoring import score_text
from training.signals import Interrupted
from training.tokenizer import encoder
from training.tokens import TokenPairs
from training.train import choose_device, tokenizers, train

RECIPE = Path(__file__).parents[1] / "recipes" / "paper_multi30k_de_en.yaml"
SETS = ("validation", "test")
# What each training changes in the recipe; those that most findings need come first.
CHANGES: dict[str, tuple[str, ...]] = {
    REVERSED[0]: ("training.seed=1",),
    FORWARD: ("training.seed=1", "model.reverse_source=false"),
    ONE_LAYER: ("training.seed=1", "model.encoder_layers=1", "model.decoder_layers=1"),
    FOUR_LAYERS: ("training.seed=1", "model.encoder_layers=4", "model.decoder_layers=4"),
    **{name: (f"training.seed={seed}",) for seed, name in enumerate(REVERSED[1:], 2)},
}
PROBE, WARM = 12, 3  # updates that the speed is measured by, and those before them
BESIDE = 1.2  # validating, saving and scoring, on top of learning


@dataclass(frozen=True)
class Training:
    """One training, or an ensemble of several: its recipe and its folder."""

    name: str
    recipe: Recipe
    run: Run

    @property
    def finished(self) -> bool:
        return self.run.summary.exists()

    def done(self) -> float:
        """The part of its epochs that is over, 0..1."""
        if not self.run.metrics.exists():
            return 0.0
        told = self.run.metrics.read_text("utf-8").splitlines()
        epochs = [json.loads(one)["epoch"] for one in told if one.endswith("}")]
        return (epochs[-1] - 1) / self.recipe.training.epochs if epochs else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of train.de, train.en, val.*, test_2016_flickr.*")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--table", action="store_true", help="only tell what there is so far")
    arguments = parser.parse_args()
    if not arguments.data and not arguments.table:
        parser.error("--data is needed: the folder of the text")
    try:
        trainings = [
            Training(name, load(arguments.recipe, arguments.data, changes),
                     Run(arguments.runs / name))
            for name, changes in CHANGES.items()
        ]  # fmt: skip
        if not arguments.table:
            replicate(trainings, arguments.runs)
    except Interrupted as stop:
        print(f"paper: {stop}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npaper: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{described()}; {spent(trainings)}\n")
    print(report(arguments.runs, trainings[0].recipe.scoring))
    return 0


def spent(trainings: Sequence[Training]) -> str:
    """How much of it is done, and what training took."""
    finished = [one for one in trainings if one.finished]
    seconds = sum(json.loads(one.run.summary.read_text("utf-8"))["seconds"] for one in finished)
    return f"{len(finished)} of {len(trainings)} trainings finished, {seconds / 60:.0f} minutes"


def replicate(trainings: Sequence[Training], runs: Path) -> None:
    """Train and score what is not there yet."""
    learn(trainings, CHANGES, BEAMS)
    seeds = [one for one in trainings if one.name in REVERSED]
    for name, members, beams in ((PAIR, seeds[:2], BEAMS[-1:]), (ENSEMBLE, seeds, BEAMS)):
        run = Run(runs / name)
        if [sha256(path) for path in run.members] != [sha256(one.run.best) for one in members]:
            ensemble(trainings[0].recipe, run, [one.run for one in members])
        score(Training(name, trainings[0].recipe, run), beams)


def learn(
    trainings: Sequence[Training], changes: Mapping[str, Sequence[str]], beams: Sequence[int]
) -> None:
    """Prepare, train and score what is not there yet; `changes` are told, by name."""
    for one in trainings:
        if not one.run.report.exists():
            prepare(one.recipe, one.run.root)
    print(budget(trainings), file=sys.stderr, flush=True)
    for one in trainings:
        if not one.finished:
            print(f"{one.name}: {', '.join(changes[one.name])}", file=sys.stderr, flush=True)
            train(one.recipe, one.run)
        score(one, beams)


def budget(trainings: Sequence[Training]) -> str:
    """Minutes that each training still needs, at the speed of a few updates made now."""
    speeds: dict[tuple[ModelOptions, TrainingOptions], float] = {}
    rows: list[str] = []
    total = 0.0
    for one in trainings:
        if one.finished:
            rows.append(f"  {one.name}: finished")
            continue
        pairs = TokenPairs.load(one.run.data / "train.tokens")
        tokens = float(pairs.target_lengths().sum()) * one.recipe.training.epochs
        alike = one.recipe.model, replace(one.recipe.training, seed=1)
        if alike not in speeds:
            speeds[alike] = speed(one, pairs)
        minutes = (1 - one.done()) * tokens / speeds[alike] / 60 * BESIDE
        total += minutes
        rows.append(f"  {one.name}: {minutes:.0f} minutes, {speeds[alike]:.0f} words/s")
    rows.append(f"  in all about {total:.0f} minutes, scoring included")
    return "\n".join(["budget, by the speed of a few updates:", *rows])


def speed(training: Training, pairs: TokenPairs) -> float:
    """Target tokens a second of a new network; nothing is kept of what it learns."""
    options = training.recipe.training
    device = choose_device(options)
    source, target = tokenizers(training.run)
    network = Network(training.recipe.model, source.size, target.size).to(device)
    learner = Learner(network, options)
    loader = Loader(pairs, (source, target), device)
    sampler = BatchSampler(pairs, options.batch_tokens, options.batch_sentences, options.seed)
    tokens, since = 0.0, time.monotonic()
    for step, index in enumerate(sampler.batches(0)[: WARM + PROBE]):
        if step == WARM:
            tokens, since = 0.0, time.monotonic()
        tokens += learner.update([loader.batch(index)], step, options.learning_rate)["tokens"]
    return tokens / (time.monotonic() - since)


def score(system: Training, beams: Sequence[int]) -> None:
    """Write what a trained run or an ensemble reaches on validation and test text: paper.json in
    its folder, and what was decoded beside it. What is there already of the same weights is kept.
    """
    recipe, run = system.recipe, system.run
    path = run.root / "paper.json"
    weights = [sha256(one) for one in run.members or [run.best]]
    held = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if held.get("weights") == weights and all(str(beam) in held["bleu"] for beam in beams):
        return
    device = choose_device(recipe.training)
    model, _ = best_model(recipe, run, device)
    if held.get("weights") != weights:
        found = {name: perplexity(model, batches(system, name, device)) for name in SETS}
        held = {"weights": weights, "perplexity": found, "bleu": {}}
    source, target = tokenizers(run)
    for beam in beams:
        told = {}
        for name in SETS:
            text, references = sentences(run.data, name)
            scores, decoded = score_text(
                model, source, target, text, references, device, recipe.scoring, beam, show=True
            )
            write_text(run.root / decoded_file(name, beam), "".join(f"{one}\n" for one in decoded))
            told[name] = scores.bleu
            held["signature"] = scores.bleu_signature
        held["bleu"][str(beam)] = told
        write_json(path, held)
        print(f"{system.name}, beam {beam}: BLEU {told['test']:.2f}", file=sys.stderr, flush=True)


def batches(system: Training, name: str, device: torch.device) -> Iterator[Batch]:
    """The batches of a set, for its perplexity."""
    ids = [
        encoder(system.run.tokenizer / f"{side}.model")(text)
        for side, text in zip(Pair._fields, sentences(system.run.data, name))
    ]
    pairs = TokenPairs.of(zip(*ids), SpecialTokens())
    loader = Loader(pairs, tokenizers(system.run), device)
    return loader.every(system.recipe.training.batch_tokens)


if __name__ == "__main__":
    sys.exit(main())
