"""The sections of a report: what is told of a run, and which verb makes what is missing."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import yaml

from training.log import LOG_EVERY
from training.recipe import Recipe
from training.report import figures, page
from training.report.analysis import (
    RESAMPLES,
    Translation,
    by_frequency,
    by_length,
    examples,
    seen_words,
    words_of,
)
from training.report.attention import Alignment, alignments
from training.report.curves import Curves
from training.report.figures import Picture
from training.report.known import Known
from training.report.page import Html
from training.run import Run
from training.scoring import decoded_scores
from training.tokens import TokenPairs

PACKAGES = ("torch", "sentencepiece", "sacrebleu", "matplotlib")
HEAT_MAPS = 6
FILES = ("model.pt", "checkpoints/best.pt", "archive/seq2seq.mar")


@dataclass(frozen=True)
class Section:
    identity: str
    title: str
    parts: list[Html]
    pictures: Sequence[Picture] = ()


def build(recipe: Recipe, run: Run) -> tuple[Html, list[Picture]]:
    """The page of a run, and the pictures on it."""
    known = Known(recipe, run)
    sections = [
        scores(known), training(known), lengths(known), frequencies(known), attention(known),
        translations(known), sizes(known), described(known),
    ]  # fmt: skip
    shown = [page.section(one.identity, one.title, *one.parts) for one in sections]
    contents = [(one.identity, one.title) for one in sections]
    html = page.document(f"Report of {recipe.name}", shown, contents)
    return html, [picture for one in sections for picture in one.pictures]


def scores(known: Known) -> Section:
    """scores.json, and whether it is of the weights that are kept now."""
    told, parts = known.scores, list[Html]()
    if told is None:
        return Section("scores", "Scores", [page.missing("Scores", "evaluate")])
    test = told["test"]
    parts.append(page.tiles([
        ("BLEU (test)", f"{test['bleu']:.2f}"), ("chrF (test)", f"{test['chrf']:.2f}"),
        ("exact match (test)", f"{test['exact_match']:.2%}"),
        ("perplexity (validation)", f"{told['validation_perplexity']:.3f}"),
        *([("training", duration(known.summary["seconds"]))] if known.summary else []),
    ]))  # fmt: skip
    parts.append(page.table(
        ["text", "sentences", "BLEU", "chrF", "exact match"],
        [[name, f"{told[name]['sentences']:,}", f"{told[name]['bleu']:.2f}",
          f"{told[name]['chrf']:.2f}", f"{told[name]['exact_match']:.2%}"]
         for name in ("validation", "test")],
    ))  # fmt: skip
    parts.append(page.paragraph(
        f"Weights of step {told['step']:,}. BLEU and chrF from 0 to 100. Signature of BLEU: "
        f"{test['bleu_signature']}"
    ))  # fmt: skip
    parts += [page.note(one) for one in stale(known, told)]
    return Section("scores", "Scores", parts)


def stale(known: Known, told: dict[str, Any]) -> list[str]:
    """Where scores, hypotheses and model are not of the same weights."""
    found = []
    if known.best_step not in (None, told["step"]):
        found.append(
            f"The scores are of step {told['step']:,}, and the weights kept since are of step "
            f"{known.best_step:,}: run 'python -m training evaluate' again."
        )
    if known.card is not None and known.card["step"] != told["step"]:
        found.append(
            f"model.pt has the weights of step {known.card['step']:,}: run 'python -m training "
            "export' again."
        )
    if known.translations:
        now = decoded_scores(
            [one.hypothesis for one in known.translations],
            [one.reference for one in known.translations], known.recipe.scoring,
        )  # fmt: skip
        then = told["test"]
        if max(abs(now.bleu - then["bleu"]), abs(now.chrf - then["chrf"])) > 0.005:
            found.append(
                f"test.decoded gives BLEU {now.bleu:.2f} ({now.bleu_signature}) and chrF "
                f"{now.chrf:.2f}, not what the table says: run 'python -m training evaluate' again."
            )
    return found


def training(known: Known) -> Section:
    """The curves."""
    curves, summary, options = known.curves, known.summary, known.recipe.training
    parts = []
    if summary is None:
        parts.append(page.note(
            f"Training has not ended; the last step that is logged is {curves.last_step:,}. "
            "'python -m training train' goes on."
        ))  # fmt: skip
    else:
        parts.append(page.paragraph(
            f"{summary['steps']:,} steps in {duration(summary['seconds'])}: {summary['ended']}. "
            f"The weights of step {summary['best_step']:,} were kept, the best by validation "
            f"{options.select_by}."
        ))  # fmt: skip
    if curves.unreadable:
        parts.append(page.note(
            f"metrics.jsonl: {curves.unreadable} of its lines cannot be read and are left out, "
            "such as the last of a run that was cut off."
        ))  # fmt: skip
    panels = figures.panels(curves, known.best_step, options.clip_norm)
    if not panels:
        parts.append(page.note(
            f"No curves yet: the first figures are logged after {LOG_EVERY} steps."
        ))  # fmt: skip
        return Section("training", "Training", parts)
    objective = any(line.name == "objective" for line in panels[0].lines)
    captions = {
        "loss": f"Of training: means over {LOG_EVERY} steps, with dropout; "
        + "the objective, label smoothing and the like included, is what is minimised. " * objective
        + "Of validation text: without dropout, the logarithm of the perplexity.",
        "gradient_norm": f"Mean of {LOG_EVERY} steps; longer gradients are cut to "
        f"{options.clip_norm:g}.",
        "speed": "While training; validation is not counted.",
    }
    pictures = [
        figures.picture(one.name, partial(figures.draw_panel, one)) for one in panels
    ]
    parts.append(page.grid(
        page.figure(drawn, f"{one.title}, {one.unit}, over training steps",
                    page.text(captions.get(one.name, "")))
        for one, drawn in zip(panels, pictures)
    ))  # fmt: skip
    parts.append(validations(curves))
    return Section("training", "Training", parts, pictures)


def validations(curves: Curves) -> Html:
    rows = [
        [f"{one['step']:,}", f"{one.get('perplexity', 0):.3f}", f"{one.get('bleu', 0):.2f}"]
        for one in curves.lines["validation"]
    ]
    if not rows:
        return page.missing("Figures of validation", "train")
    return page.details("Validations as a table", page.table(["step", "perplexity", "BLEU"], rows))


def lengths(known: Known) -> Section:
    """BLEU by length of the source."""
    identity, title = "length", "BLEU by source length"
    if known.translations is None:
        return Section(identity, title, [page.missing("Translations of the test set", "evaluate")])
    buckets = by_length(known.translations, [len(ids) for ids in known.encoded])
    picture = figures.picture("bleu_by_length", partial(figures.draw_lengths, buckets))
    caption = page.text(
        "Test set, in buckets of about as many sentences. Bars: 95 % interval of "
        f"{RESAMPLES:,} bootstrap samples of the sentences (Koehn 2004). Tokens are those of the "
        "source's tokenizer."
    )
    rows = [
        [one.name, f"{one.sentences:,}", f"{one.bleu:.2f}", f"{one.low:.2f} to {one.high:.2f}"]
        for one in buckets
    ]
    shown = page.figure(picture, "BLEU of each bucket of source length; figures in the table",
                        caption)  # fmt: skip
    head = ["source tokens", "sentences", "BLEU", "95 % interval"]
    return Section(identity, title, [page.grid([shown, page.table(head, rows)])], [picture])


def frequencies(known: Known) -> Section:
    """Word accuracy by frequency in training."""
    identity, title = "frequency", "Accuracy of words by frequency"
    if known.translations is None:
        return Section(identity, title, [page.missing("Translations of the test set", "evaluate")])
    words = words_of(known.recipe.scoring)
    seen, every = seen_words(TokenPairs.load(known.run.data / "train.tokens"), known.target, words)
    buckets = by_frequency(known.translations, seen, words)
    picture = figures.picture("f1_by_frequency", partial(figures.draw_frequencies, buckets))
    counted = "the training text" if every == 1 else f"every {every}th training pair"
    caption = page.text(
        f"F1 of the target words of the test set (arXiv 1903.07926), by how often they stand in "
        f"{counted} as the tokenizer normalises it; n words of the references. Words are those "
        f"that BLEU counts (scoring.tokenize: {known.recipe.scoring.tokenize}); 13a leaves text "
        "without spaces in one piece."
    )
    rows = [
        [one.name, f"{one.references:,}", f"{one.hypotheses:,}", f"{one.matches:,}",
         f"{one.f1:.3f}"]
        for one in buckets
    ]  # fmt: skip
    shown = page.figure(picture, "F1 of each bucket of frequency; figures in the table", caption)
    head = ["times seen", "in references", "in translations", "in both", "F1"]
    return Section(identity, title, [page.grid([shown, page.table(head, rows)])], [picture])


def attention(known: Known) -> Section:
    """Heat maps of a few lines of the test set."""
    identity, title = "attention", "Attention"
    if known.recipe.model.kind != "attention" and not known.run.members:
        return Section(identity, title, [page.paragraph(
            f"A model of kind {known.recipe.model.kind} has no attention."
        )])  # fmt: skip
    if not (known.run.best.exists() or known.run.members):
        return Section(identity, title, [page.missing("Weights of a first validation", "train")])
    step, found = alignments(known.recipe, known.run, known.encoded, HEAT_MAPS)
    parts = [page.paragraph(
        f"What each token of a translation attends to, weights of step {step:,}; each row sums to "
        "1. Lines of the test set, drawn at random among short ones. ▁ stands for a space."
    )]  # fmt: skip
    if not found:
        parts.append(page.paragraph("None of them has a translation to show."))
    references, sources, pictures = known.text("target"), known.text("source"), []
    for number, one in enumerate(found, 1):
        picture = figures.heat_map(f"attention_{number}", one)
        pictures.append(picture)
        rows = [
            ("source", sources[one.index]), ("reference", references[one.index]),
            ("translation", one.translation),
        ]  # fmt: skip
        parts.append(page.figure(
            picture, f"Heat map of attention, {len(one.target)} target tokens by "
            f"{len(one.source)} source tokens, of the sentences below", Html(""), wide=True,
        ))  # fmt: skip
        if picture.missing:
            parts += unreadable(one, picture.missing)
        parts.append(page.pair(f"line {one.index + 1:,} of the test set", rows))
    return Section(identity, title, parts, pictures)


def unreadable(one: Alignment, lacking: frozenset[str]) -> list[Html]:
    """Says which tokens the numbers in a heat map stand for; the reader's browser has fonts."""
    points = sorted(f"U+{ord(character):04X}" for character in lacking)
    more = f" and {len(points) - 8} more" if len(points) > 8 else ""
    numbered = [
        (f"{side} tokens", "   ".join(
            f"#{number} {token}" for number, token in enumerate(tokens, 1) if lacking & set(token)
        ))
        for side, tokens in (("source", one.source), ("target", one.target))
        if lacking & set("".join(tokens))
    ]  # fmt: skip
    return [
        page.note(
            f"No font of the machine that made this report has {', '.join(points[:8])}{more}; the "
            "figure has the numbers of such tokens instead. With a font that has them (on Debian: "
            "apt install fonts-noto-cjk) 'python -m training report' shows the tokens."
        ),
        page.pair("tokens by number, from 1", numbered),
    ]


def translations(known: Known) -> Section:
    """The best and the worst, and a few of the others."""
    identity, title = "translations", "Translations"
    if known.translations is None:
        return Section(identity, title, [page.missing("Translations of the test set", "evaluate")])
    found = examples(known.translations)
    parts = [page.paragraph(
        "Of the test set, by sentence chrF; BLEU of a sentence is smoothed. Of equally good ones "
        "the longest come first."
    )]  # fmt: skip
    for name, shown in (("Worst", found.worst), ("Best", found.best), ("Random", found.drawn)):
        parts.append(page.element("h3", page.text(f"{name} ({len(shown)})")))
        parts += [beside(one) for one in shown]
    if not found.worst:
        parts.append(page.paragraph("All others equal their references."))
    return Section(identity, title, parts)


def beside(one: Translation) -> Html:
    """A translation beside its source and its reference."""
    heading = f"chrF {one.chrf:.1f}, BLEU {one.bleu:.1f}; line {one.index + 1:,} of the test set"
    return page.pair(heading, [
        ("source", one.source), ("reference", one.reference), ("translation", one.hypothesis),
    ])  # fmt: skip


def sizes(known: Known) -> Section:
    """Text, tokenizers, weights and files."""
    told = known.prepared["training_pairs"]
    dropped = ", ".join(f"{name}: {n:,}" for name, n in told["dropped"].items() if n)
    rows = [
        ("training pairs", f"{told['kept']:,} of {told['read']:,}"),
        ("dropped", dropped or "none"),
        ("source vocabulary", f"{known.source.size:,}"),
        ("target vocabulary", f"{known.target.size:,}"),
    ]
    if known.summary is not None:
        rows.append(("parameters", f"{known.summary['parameters']:,}"))
        rows.append(("training time", duration(known.summary["seconds"])))
    for name in FILES:
        path = known.run.root / name
        if path.exists():
            rows.append((name, f"{path.stat().st_size / 1e6:.1f} MB"))
    here = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]
    rows.append(("versions, of this report", ", ".join(here)))
    if known.card is not None:
        made = ", ".join(f"{name} {one}" for name, one in known.card["versions"].items())
        rows.append(("versions, of model.pt", made))
    parts = [page.facts(rows), *(page.note(one) for one in told["warnings"])]
    return Section("sizes", "Sizes and versions", parts)


def described(known: Known) -> Section:
    """The recipe, and what model.pt says of itself."""
    recipe = known.recipe.as_dict()
    del recipe["data"]["folder"]  # a path of this machine, no business of who is sent the page
    written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    parts = [page.details("Recipe, defaults included", page.listing(written))]
    if known.card is None:
        parts.append(page.missing("The model card", "export"))
    else:
        card = json.dumps(known.card, indent=1, ensure_ascii=False)
        parts.append(page.details("Model card, as in model.pt", page.listing(card)))
    return Section("recipe", "Recipe and model card", parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
