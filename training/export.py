"""Verb `export`: the best weights as model.pt, TorchScript with its model card inside."""

import json
import platform
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from handler.decoding import DecodingOptions, Engine, decode_in_order, native
from handler.decoding.model import load, packed
from handler.integrity import sha256
from handler.tokenizer import Tokenizer
from model import FORMAT_VERSION
from model.native import NoCompiler, build
from model.quantized import quantized
from model.serving import scripted
from model.shortlist import Shortlist
from training import checkpoint
from training.evaluate import Origin, best_model, scored_otherwise
from training.lexicon import shortlist
from training.recipe import Recipe
from training.run import Run, RunError, write_atomically
from training.tokens import TokenPairs
from training.train import tokenizers

# Of a recipe, as a model's card tells them.
SECTIONS = tuple(one.name for one in fields(Recipe) if one.name != "name")
LIBRARIES = Path(__file__).parent.parent / "build" / "native"


def export(recipe: Recipe, run: Run) -> Path:
    """Write model.pt and check that what was written decodes as the network does. Beside it lies
    the library that makes it fast on a CPU, where this machine can compile it.

    Raises:
        RunError: nothing trained yet, scores of other weights or options, a shortlist for an
            ensemble, or a file that decodes otherwise.
    """
    run.demand(run.summary, "train")
    model: Any
    model, origin = best_model(recipe, run)
    scores = run.read_json(run.scores, "evaluate")
    if changed := scored_otherwise(scores, recipe, origin):
        raise RunError(
            f"{run.scores}: was made otherwise: {'; '.join(changed)}. Change that back, or run "
            "'python -m training evaluate' again"
        )
    library(run).unlink(missing_ok=True)
    if recipe.export.weights == "int8":
        model = quantized(model, shortlist_of(recipe, run))
    compiled(library(run))
    model.card = json.dumps(card(recipe, run, origin), indent=1, ensure_ascii=False)
    write_atomically(run.model, lambda temporary: scripted(model).save(str(temporary)))
    check(model, run.model)
    return run.model


def shortlist_of(recipe: Recipe, run: Run) -> Shortlist | None:
    """The shortlist that the recipe asks for, learnt from the training text.

    Raises:
        RunError: an ensemble, which needs the probabilities of all tokens.
    """
    options = recipe.export.shortlist
    if options is None:
        return None
    if run.members:
        raise RunError(
            "export.shortlist: got one for an ensemble; allowed: null, as the mean of its members "
            "needs the probabilities of all tokens"
        )
    source, target = tokenizers(run)
    ids = {piece: i for i, piece in enumerate(target.pieces(range(target.size)))}
    same = [ids.get(piece, 0) for piece in source.pieces(range(source.size))]
    same[: Tokenizer.EOS] = [0] * Tokenizer.EOS
    pairs = TokenPairs.load(run.data / "train.tokens")
    return shortlist(pairs, torch.tensor(same), target.size, options)


def library(run: Run) -> Path:
    """Where the native operators lie that go with model.pt."""
    return run.root / native.library()


def compiled(path: Path) -> None:
    """Put the library of the native operators at `path`, or say why there is none."""
    try:
        shutil.copy(build(LIBRARIES, native.library()), path)
    except NoCompiler as error:
        print(
            f"export: {error}: the model works, but slower on a CPU, with int8 weights several "
            "times; export it on a machine with a compiler, of the kind that serves",
            file=sys.stderr,
        )
    native.enable(path.parent)


def exported(run: Run, device: torch.device) -> Any:
    """The model that `export` wrote.

    Raises:
        RunError: nothing exported yet, or tokenizers in the run folder that are not the model's.
    """
    run.demand(run.model, "export")
    try:
        model = load(str(run.model), device)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        raise RunError(
            f"{run.model}: not a whole model ({problem}); run 'python -m training export' again"
        ) from None
    digests = json.loads(model.card)["data_digests"]["tokenizer"]
    changed = [name for name, one in digests.items() if sha256(run.tokenizer / name) != one]
    if changed:
        raise RunError(
            f"{run.tokenizer}: {', '.join(changed)} changed since {run.model.name} was trained; "
            "train with --fresh, evaluate and export again"
        )
    return model


def exported_otherwise(
    card: dict[str, Any], recipe: Recipe, sections: tuple[str, ...] = SECTIONS
) -> list[str]:
    """What of `sections` of the recipe, and of its text, is not what a model was made by, as its
    card tells. The card of an ensemble leaves out what its members may differ in."""
    then = card["recipe"]
    changed = checkpoint.differences(then, recipe, tuple(one for one in sections if one in then))
    if sections == SECTIONS and card["name"] != recipe.name:
        changed.append(f"name: {card['name']!r} -> {recipe.name!r}")
    return changed + checkpoint.changed_text(card["data_digests"]["text"], recipe)


def outdated(recipe: Recipe, run: Run) -> list[str]:
    """Why what was exported has to be exported again; nothing where it need not.

    Raises:
        RunError: see `best_model`.
    """
    try:
        told = json.loads(exported(run, torch.device("cpu")).card)
    except ValueError as error:  # not whole, of other tokenizers, or of an unknown format
        return [str(error)]
    now = json.loads(json.dumps(card(recipe, run, best_model(recipe, run)[1])))
    made_of = ("step", "members", "data_digests", "scores")
    return exported_otherwise(told, recipe) + [
        f"{key} of its card: changed since" for key in made_of if told.get(key) != now.get(key)
    ]


def demand_own(model: Any, recipe: Recipe, run: Run, sections: tuple[str, ...] = SECTIONS) -> None:
    """Whether the model that was exported is that of `recipe`.

    Raises:
        RunError: other values in `sections`, or other text; the message names them.
    """
    if changed := exported_otherwise(json.loads(model.card), recipe, sections):
        raise RunError(
            f"{run.model} was exported otherwise: {'; '.join(changed)}. Change that back, choose "
            "another folder with --run (make: RUN=), or make again what depends on it with "
            "'python -m training build' (make mar)"
        )


def card(recipe: Recipe, run: Run, origin: Origin) -> dict[str, Any]:
    """Where a model comes from and how good it is. What members of an ensemble may differ in is
    told of each of them."""
    described = recipe.as_dict()
    del described["data"]["folder"]  # a path of the machine that trained, nobody else's business
    ensemble = {}
    if run.members:
        del described["model"], described["training"]
        ensemble["members"] = [
            {
                "step": one.step,
                "sha256": one.sha256,
                "recipe": {name: one.recipe[name] for name in ("model", "training")},
            }
            for one in origin.members
        ]
    return {
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "version": recipe.export.version,
        "weights": recipe.export.weights,
        "shortlist": described["export"]["shortlist"],
        "recipe": described,
        "step": origin.step,
        **ensemble,
        "data_digests": origin.digests,
        "scores": run.read_json(run.scores, "evaluate"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
    }


def check(model: Any, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    longest = min(20, model.max_source_length)
    sources = [
        [*torch.randint(4, model.source_vocabulary, (n,), generator=generator).tolist(), 3]
        for n in range(1, longest)
    ]
    cpu = torch.device("cpu")
    expected, got = (
        list(decode_in_order(Engine(one, rows=4), sources, DecodingOptions()))
        for one in (packed(model, cpu), load(str(path), cpu))
    )
    if got != expected:
        path.unlink()
        raise RunError(f"{path}: the exported model decodes otherwise than the network; removed")
