"""What each ingredient of a recipe gives: it without one of them at a time, and with others.

    python -m bench.ablation RECIPE --data FOLDER [--set training.epochs=6] [NAME ...]

Every row is a training of its own, an ordinary run folder below --runs, alike in all but what its
name says (CHANGES below). What is finished is skipped and what was stopped goes on. --set changes
a key of all of them, such as the epochs, where the whole schedule would take too long. Decoded
with the recipe's beam and its length penalty, which was chosen for the recipe as it is.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.machine import described
from bench.paper import Training, learn
from training.recipe import Recipe, load
from training.run import Run
from training.signals import Interrupted

WHOLE = "recipe"
# The ingredients of recipes/multi30k_en_de.yaml one by one, then what it does not use.
CHANGES: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "no_average": ("training.average=0",),
    "no_label_smoothing": ("training.label_smoothing=0",),
    "no_tied_embeddings": ("model.tie_embeddings=none",),
    "no_variational_dropout": ("model.variational_dropout=false",),
    "no_recurrent_dropout": ("model.recurrent_dropout=0",),
    "no_dropout_of_words_and_output": ("model.embedding_dropout=0", "model.output_dropout=0"),
    "subword_sampling": ("training.subword_sampling=0.3",),
    "bpe": ("tokenizer.algorithm=bpe",),
    "attention_of_4_heads": ("model.attention_heads=4",),
    "additive_attention": ("model.attention=additive",),
    "layer_norm": ("model.layer_norm=true",),
    "word_dropout": ("model.word_dropout=0.1",),
    "residual": ("model.encoder_layers=2", "model.decoder_layers=2", "model.residual=true"),
    "inverse_sqrt": ("training.schedule=inverse_sqrt",),
    "one_cycle": ("training.schedule=one_cycle",),
    "r_drop": ("training.r_drop=2",),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True, help="folder of the text")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="common")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHANGES)}; all")
    a = parser.parse_intermixed_args()
    wanted = dict.fromkeys([WHOLE, *(a.names or CHANGES)])
    if unknown := [name for name in wanted if name not in CHANGES]:
        parser.error(f"NAME: got {', '.join(unknown)}; allowed: {', '.join(CHANGES)}")
    try:
        trainings = [
            Training(name, load(a.recipe, a.data, [*a.common, *CHANGES[name]]), Run(a.runs / name))
            for name in wanted
        ]
        learn(trainings, CHANGES, [trainings[0].recipe.scoring.beam_size])
    except Interrupted as stop:
        print(f"ablation: {stop}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    print(f"{described()}; `{' '.join(['python -m bench.ablation', *sys.argv[1:]])}`\n")
    print(table(trainings))
    return 0


def table(trainings: list[Training]) -> str:
    """BLEU and perplexity of each, and what its change gives against the recipe as it is."""
    rows = [
        "| | validation: BLEU | | perplexity | test: BLEU | |",
        "|---|---|---|---|---|---|",
    ]
    whole: dict[str, float] = {}
    for one in trainings:
        held = json.loads((one.run.root / "paper.json").read_text("utf-8"))
        bleu: dict[str, float] = held["bleu"][str(one.recipe.scoring.beam_size)]
        whole = whole or bleu
        cells = [
            f"{one.name}{changes(one.recipe, trainings[0].recipe)}",
            f"{bleu['validation']:.2f}", f"{bleu['validation'] - whole['validation']:+.2f}",
            f"{held['perplexity']['validation']:.2f}",
            f"{bleu['test']:.2f}", f"{bleu['test'] - whole['test']:+.2f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def changes(recipe: Recipe, whole: Recipe) -> str:
    """The keys in which a recipe differs, and their values."""
    other, found = whole.as_dict(), []
    for section, options in recipe.as_dict().items():
        if isinstance(options, dict):
            found += [f"{section}.{key}={told(value)}" for key, value in options.items()
                      if other[section][key] != value]  # fmt: skip
    return f": `{' '.join(found)}`" if found else ""


def told(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
