"""Part `engine`: target tokens a second of the whole engine, encoding included."""

import argparse
import statistics
import time
from typing import Any

from bench.gpu.ledger import Ledger, Record
from bench.gpu.models import TOKENS, Models, Recorded, decoded, random_sources, seconds
from bench.gpu.step import key_of
from handler.decoding import DecodingOptions

ROUNDS = 3  # of which the median is told, after one that warms up


def engine(a: argparse.Namespace, models: Models, ledger: Ledger) -> None:
    path = models.exported(a.size, a.vocabulary)
    for weights in a.formats:
        for beam in a.beams:
            for rows in [rows for rows in a.rows if rows >= beam]:
                key = {**key_of(a, weights, beam, rows), "part": "engine"}

                def make(weights: str = weights, beam: int = beam, rows: int = rows) -> Record:
                    return measured(models.loaded(path, weights), models, rows // beam, beam)

                ledger.measure(key, make)


def measured(model: Any, models: Models, n: int, beam: int) -> Record:
    """Sentences enough to fill `n` places four times, each with exactly as many tokens."""
    sources = random_sources(max(16, 4 * n), model.source_vocabulary)
    options = DecodingOptions(beam_size=beam, min_length=TOKENS, max_length=TOKENS)
    built: list[Recorded] = []
    recording = seconds(
        lambda: built.append(Recorded(model, n * beam, models.device, [beam])), models.device
    )
    (running,) = built
    tokens = TOKENS * len(sources)
    spent = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        made = sum(map(len, decoded(running, sources, options)))
        spent.append(time.perf_counter() - started)
        if made != tokens:
            raise RuntimeError(f"{made} tokens instead of {tokens}")
    return {
        "tokens_per_second": tokens / statistics.median(spent[1:]),
        "first_tokens_per_second": tokens / spent[0], "sentences": len(sources),
        "building_s": recording,
    }  # fmt: skip
