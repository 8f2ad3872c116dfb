"""Sentence splitters compared: sentences that are easily split, boundaries that are known, time.

    python -m bench.sentences --cases FILE --text deu-eng.tsv:1:en --text deu-eng.tsv:2:de

Those that can be imported are compared; another version of one comes first on PYTHONPATH. Cases are
lines `language|text` or `language|text|sentences` (0: any number will do). Of a TSV of pairs, such
as Tatoeba's, a column is taken, of a language, and six of its texts make a paragraph: those that
end with a full stop or the like and have none inside, nor has their translation. Where yasbd-lib is
there, its titles and other abbreviations that never end a sentence are tried too, as they are
written and capitalised, before a name: in how many the text stays whole, the mean of 20 languages.
"""

import argparse
import functools
import importlib
import random
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from handler.sentences import Splitter

Split = Callable[[str], list[str]]
INSIDE = re.compile(r"[.?!…]['\"”“»]?\s+\S")
ENDS = re.compile(r"[.?!…。]['\"”“»]?$")
LANGUAGES = "nl it pt es fr de en pl cs tr sv da ro ru uk el sk bg id vi".split()  # noqa: SIM905
TOGETHER = 6
MOST = 3000  # texts of a column
HOSTILE = (".", '"', "(", "「", "«", "Mr. ", "A. ", "a")
SIZES = (5_000, 20_000)


def ours(language: str) -> Split:
    split = Splitter(language).split
    return lambda text: [one.text for one in split(text) if one.text]


def sentencex(module: Any, language: str) -> Split:
    return lambda text: list(module.segment(language, text))


def pysbd(module: Any, language: str) -> Split:
    codes = importlib.import_module("pysbd.languages").LANGUAGE_CODES
    known = language if language in codes else "en"
    segment = module.Segmenter(language=known, clean=False).segment
    return lambda text: list(segment(text))


def moses(module: Any, language: str) -> Split:
    try:
        splitter = module.SentenceSplitter(language=language)
    except module.SentenceSplitterException:
        splitter = module.SentenceSplitter(language="en")
    return lambda text: list(splitter.split(text))


def yasbd(module: Any, language: str) -> Split:
    known = module.get_supported_langs()
    segment = module.BoundaryDetector(language if language in known else "en").segment
    return lambda text: [str(one) for one in segment(text)]


def syntok(module: Any, language: str) -> Split:
    analyze = importlib.import_module("syntok.segmenter").analyze
    return lambda text: [
        "".join(token.spacing + token.value for token in one)
        for paragraph in analyze(text) for one in paragraph
    ]


PEERS: dict[str, tuple[str, Callable[[Any, str], Split]]] = {
    "sentencex": ("sentencex", sentencex), "pysbd": ("pysbd", pysbd),
    "sentence-splitter": ("sentence_splitter", moses), "yasbd-lib": ("yasbd", yasbd),
    "syntok": ("syntok", syntok),
}


def found() -> dict[str, Callable[[str], Split]]:
    """A splitter of each language, by the name and version of what splits."""
    splitters: dict[str, Callable[[str], Split]] = {}
    if not Splitter().missing:  # beside another version of sentencex
        splitters["handler/sentences.py"] = ours
    for name, (module, make) in PEERS.items():
        try:
            imported = importlib.import_module(module)
        except ImportError:
            continue
        splitters[f"{name} {metadata.version(name)}"] = functools.partial(make, imported)
    return splitters


def bare(text: str) -> str:
    return "".join(text.split())


def ends(sentences: list[str]) -> set[int]:
    """Where sentences end, in characters that are no space; but for the last."""
    places, count = set(), 0
    for one in sentences:
        count += len(bare(one))
        places.add(count)
    return places - {0, count}


def cases(path: Path) -> list[tuple[str, str, int]]:
    rows = [line.split("|") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) > 1 and not row[0].startswith("#")]
    read = [(row[0], row[1], int(row[2]) if len(row) > 2 else 1) for row in rows]
    return [one for one in read if one[2]]


def paragraphs(named: str) -> tuple[str, list[list[str]]]:
    """The language and the paragraphs of `FILE:COLUMN:LANGUAGE`."""
    path, column, language = named.rsplit(":", 2)
    pairs = (line.split("\t")[:2] for line in Path(path).read_text(encoding="utf-8").splitlines())
    mine = int(column) - 1
    texts = [
        pair[mine] for pair in pairs
        if ENDS.search(pair[mine]) and not any(INSIDE.search(one) for one in pair)
    ]
    texts = list(dict.fromkeys(texts))
    random.Random(1).shuffle(texts)
    texts = texts[:MOST]
    return language, [texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER)]


def abbreviated() -> dict[str, list[str]]:
    """Single sentences of each language, with an abbreviation of yasbd-lib's before a name."""
    try:
        rules = importlib.import_module("yasbd.rules")
    except ImportError:
        return {}
    sentences = {}
    for code in LANGUAGES:
        one = rules.load_rule(code, ext_registry={})
        words = {word for word in one.TITLE_ABBRVS | one.INLINE_ONLY_ABBRVS if " " not in word}
        words |= {word[:1].upper() + word[1:] for word in words}
        sentences[code] = [f"So {word}. Demir so." for word in sorted(words)]
    return sentences


def whole(make: Callable[[str], Split], sentences: dict[str, list[str]]) -> float:
    """The share of single sentences that stay whole, the mean of the languages."""
    shares = []
    for code, texts in sentences.items():
        split = make(code)
        shares.append(sum(not ends(split(text)) for text in texts) / len(texts))
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], help="FILE:COLUMN:LANGUAGE")
    given = parser.parse_args()
    told, known = cases(given.cases), [paragraphs(one) for one in given.text]
    held_out = abbreviated()
    for name, make in found().items():
        right = sum(len(ends(make(code)(text))) + 1 == count for code, text, count in told)
        print(f"{name}: cases {right} of {len(told)}", end="")
        for language, texts in known:
            split, hit, wrong, missed, size = make(language), 0, 0, 0, 0
            began = time.process_time()
            for one in texts:
                true, got = ends(one), ends(split(" ".join(one)))
                hit += len(true & got)
                wrong += len(got - true)
                missed += len(true - got)
                size += sum(map(len, one))
            spent = time.process_time() - began
            print(f"; {language} precision {hit / max(1, hit + wrong):.4f}, recall "
                  f"{hit / max(1, hit + missed):.4f}, {spent / size * 1e6:.2f} ms/kB", end="")
        if held_out:
            print(f"; abbreviations kept {whole(make, held_out):.3f}", end="")
        grown = []
        for pattern in HOSTILE:
            spent_on = []
            for size in SIZES:
                began = time.process_time()
                make("en")((pattern * size)[:size])
                spent_on.append(time.process_time() - began)
            grown.append((spent_on[1] / max(spent_on[0], 1e-4), spent_on[1], pattern))
        worst = max(grown, key=lambda one: one[1])
        print(f"; slowest of 20,000 characters: {worst[1]:.3f} s, {worst[0]:.0f} times a quarter "
              f"of it, {worst[2]!r} again and again")


if __name__ == "__main__":
    main()
