"""`python -m training VERB RECIPE`: the verbs, in the order of the data."""

import argparse
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

from handler.fields import read
from training.recipe import Recipe, demand_text, load, separate
from training.run import Run, only_writer
from training.signals import Interrupted

VERBS = {
    "prepare": "clean the text, train the tokenizers, write token files",
    "train": "learn the weights; goes on where a former run stopped",
    "evaluate": "score the best weights on validation and test text",
    "export": "write the best weights as model.pt (TorchScript)",
    "archive": "build the .mar archive for TorchServe",
    "build": "do those of the five above that are not done for this recipe and its text",
    "folder": "tell the folder of the run",
    "ensemble": "make a run of several trained ones that translate together",
    "report": "write report/index.html: curves, scores, attention, translations",
    "translate": "translate standard input to standard output, line by line",
    "distill": "write the training text with a run's translations as its targets, for a student",
    "diversify": "train teachers of both directions; write their translations and the text as one",
}
STAGES = ("prepare", "train", "evaluate", "export", "archive")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("recipe", type=Path, help="YAML file, such as recipes/dates.yaml")
        verb.add_argument("--data", help="folder of the text; instead of the recipe's data.folder")
        verb.add_argument("--run", type=Path, help="folder of the run (default: runs/NAME)")
        verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                          help="change keys of the recipe, such as training.seed=2")
        if name in ("prepare", "train", "build"):
            verb.add_argument("--fresh", action="store_true", help="begin anew")
        if name in ("train", "build"):
            verb.add_argument("--accept-changes", action="store_true",
                              help="go on though the recipe's section training, or the number of "
                                   "processes, has changed")
            verb.add_argument("--wandb", action="store_true",
                              help="show figures in Weights & Biases too")
        if name == "train":
            verb.add_argument("--dry-run", action="store_true",
                              help="only tell parameters, memory and time; needs no data")
        if name == "build":
            verb.add_argument("--until", choices=STAGES, default=STAGES[-1],
                              help=f"the last stage (default: {STAGES[-1]})")
        if name == "translate":
            verb.add_argument("--options", default="{}", metavar="JSON",
                              help="options of the REST API, such as '{\"beam_size\": 5}'")
            verb.add_argument("--json", action="store_true",
                              help="write all that the server would tell of each line")
        if name == "ensemble":
            verb.add_argument("--members", type=Path, nargs="+", required=True, metavar="RUN",
                              help="folders of trained runs, such as runs/a runs/b")
        if name == "distill":
            verb.add_argument("--out", type=Path,
                              help="folder for the text (default: distilled in the run's folder)")
            verb.add_argument("--beam-size", type=int, default=5, help="default: 5")
            verb.add_argument("--interpolate", action="store_true",
                              help="of each beam take what is most like the reference")
        if name == "diversify":
            verb.add_argument("--forward", type=int, default=2, help="teachers; default: 2")
            verb.add_argument("--backward", type=int, default=1,
                              help="teachers that translate targets to sources; default: 1")
            verb.add_argument("--beam-size", type=int, default=5, help="default: 5")
        if name in ("export", "archive"):
            verb.add_argument("--weights", help="float32 or int8; instead of export.weights")
        if name in ("archive", "build"):
            verb.add_argument("--store", type=Path, default=Path("model-store"),
                              help="folder of the archive (default: model-store)")
    return top


def main() -> int:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if getattr(arguments, "weights", None):
            arguments.changes.append(f"export.weights={arguments.weights}")
        changes = [one for given in arguments.changes for one in separate(given)]
        recipe = load(arguments.recipe, arguments.data, changes)
        if arguments.data is not None:
            demand_text(recipe)
        return carry_out(arguments, recipe, Run(arguments.run or Path("runs") / recipe.name))
    except BrokenPipeError:
        # Whoever read the output has left. Python would fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{arguments.verb}: standard output was closed", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{arguments.verb}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{arguments.verb}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\n{arguments.verb}: stopped", file=sys.stderr)
        return 130


def carry_out(arguments: argparse.Namespace, recipe: Recipe, run: Run) -> int:
    """One verb. Imports are made here, so that help and mistakes are answered at once."""
    if arguments.verb == "folder":
        print(run.root)
    elif arguments.verb == "build":
        from training.stages import build

        build(recipe, run, arguments.until, stage_options(arguments))
    elif arguments.verb in STAGES:
        return one_stage(arguments, recipe, run)
    elif arguments.verb == "ensemble":
        from training.ensemble import ensemble

        run.root.mkdir(parents=True, exist_ok=True)
        with only_writer(run.root, "ensemble"):
            members = ensemble(recipe, run, [Run(path) for path in arguments.members])
        print(f"{run.root}: an ensemble of {members}")
    elif arguments.verb == "distill":
        from training.distill import DistillOptions, distill

        out = arguments.out or run.root / "distilled"
        given = {"beam_size": arguments.beam_size, "interpolate": arguments.interpolate}
        asked = read(DistillOptions, given)
        run.demand(run.summary, "train")
        out.mkdir(parents=True, exist_ok=True)
        with only_writer(out, "distill"):
            print(distill(recipe, run, out, asked))
    elif arguments.verb == "diversify":
        from training.diversify import DiversifyOptions, diversify

        names = ("forward", "backward", "beam_size")
        asked_of = read(DiversifyOptions, {name: getattr(arguments, name) for name in names})
        run.root.mkdir(parents=True, exist_ok=True)
        with only_writer(run.root, "diversify"):
            texts = diversify(recipe, run.root, asked_of)
        print(f"{run.root / 'recipe.yaml'}: the text {texts} times, for a student")
    elif arguments.verb == "report":  # without the lock: also of a run that is still training
        from training.report import report

        print(report(recipe, run))
    else:
        from training.translate import options_of, translate

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n", write_through=True)
        options = options_of(arguments.options)
        failed = translate(recipe, run, sys.stdin.buffer, sys.stdout, options, arguments.json)
        return 1 if failed else 0
    return 0


def one_stage(arguments: argparse.Namespace, recipe: Recipe, run: Run) -> int:
    """The verb of one stage, whatever is done before it."""
    if getattr(arguments, "dry_run", False):
        from training.dry_run import dry_run

        print(dry_run(recipe, run))
        return 0
    from training.stages import missing, perform, writing

    options = stage_options(arguments)
    with writing(arguments.verb, run):
        reasons = arguments.verb != "prepare" or missing("prepare", recipe, run, options)
        if reasons or options.fresh:
            perform(arguments.verb, recipe, run, options)
        else:  # it may not come out the same under a later version of this program
            print(f"{run.data}: is prepared already; --fresh prepares it anew")
    return 0


def stage_options(arguments: argparse.Namespace) -> Any:
    """The `StageOptions` that a verb has."""
    from training.stages import StageOptions

    names = ("fresh", "accept_changes", "wandb", "store")
    return StageOptions(**{one: getattr(arguments, one) for one in names if one in arguments})


if __name__ == "__main__":
    sys.exit(main())
