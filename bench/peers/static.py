"""Continuous refill against static batches, the same engine, at the lengths of real sentences.

- continuous: the engine is given the sentences in the order of the text and takes the next one as
  soon as rows are free;
- static: a batch is admitted only when all of the one before it have ended, in the order of the
  text, which is what a server without refill can do;
- sorted: static batches of the sentences sorted by length, as toolkits do offline; a server cannot
  sort what has not arrived.

Static batches too stop computing the rows of sentences that have ended, so what refilling gains is
fuller steps, and what it costs is encoding few sentences at a time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.peers.job import batches
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import load
from handler.tokenizer import Tokenizer

Way = Callable[[Any, list[list[int]], int, DecodingOptions], list[list[int]]]


def continuous(
    model: Any, sources: list[list[int]], batch: int, options: DecodingOptions
) -> list[list[int]]:
    """The best hypothesis of each source, `batch` sentences at a time."""
    engine = Engine(model, rows=batch * options.beam_size)
    return [event.results[0].tokens for event in decode_in_order(engine, sources, options)]


def static(
    model: Any, sources: list[list[int]], batch: int, options: DecodingOptions
) -> list[list[int]]:
    """As `continuous`, in batches that none joins."""
    engine = Engine(model, rows=batch * options.beam_size)
    return [
        event.results[0].tokens
        for together in batches(sources, batch)
        for event in decode_in_order(engine, together, options)
    ]


def by_length(
    model: Any, sources: list[list[int]], batch: int, options: DecodingOptions
) -> list[list[int]]:
    """As `static`, in batches of sentences of similar lengths."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)
    found = static(model, [sources[i] for i in order], batch, options)
    return [tokens for _, tokens in sorted(zip(order, found))]


WAYS: dict[str, Way] = {"sorted": by_length, "static": static, "continuous": continuous}


def measure(arguments: argparse.Namespace) -> None:
    """Print a row for each number of threads, beam and batch."""
    model = load(str(arguments.model), torch.device("cpu"))
    sources = encoded(arguments, model)
    mean = statistics.mean(len(source) for source in sources)
    print(
        f"{len(sources)} sentences, {mean:.1f} tokens on average with EOS; a second, median of "
        f"{arguments.rounds} rounds\n"
    )
    columns = "".join(f" {way}: sentences | tokens |" for way in WAYS)
    print(f"| threads | | batch | target tokens on average |{columns} continuous / static "
          "| continuous / sorted | same output |")
    print("|" + "---|" * 13, flush=True)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for beam_size in arguments.beams:
            for batch in arguments.batches or [16, 64]:
                row = measured(model, sources, batch, beam_size, arguments.rounds)
                print(f"| {threads} {row}", flush=True)


def encoded(arguments: argparse.Namespace, model: Any) -> list[list[int]]:
    """The sentences of the text that the model can read, as ids with EOS."""
    tokenizer = Tokenizer(str(arguments.source_tokenizer))
    texts = [line for line in arguments.text.read_text("utf-8").split("\n") if line.strip()]
    sources = [[*tokenizer.encode(text), model.eos_id] for text in texts]
    readable = [source for source in sources if len(source) <= model.max_source_length]
    return readable[: arguments.sentences]


def measured(
    model: Any, sources: list[list[int]], batch: int, beam_size: int, rounds: int
) -> str:
    """All ways in turn; the cells of the row after the first."""
    options = DecodingOptions(beam_size=beam_size)
    rounds_of: dict[str, list[float]] = {name: [] for name in WAYS}
    outputs: dict[str, list[list[int]]] = {}
    for way in WAYS.values():
        way(model, sources[:batch], batch, options)
    for _ in range(rounds):
        for name, way in WAYS.items():
            started = time.perf_counter()
            outputs[name] = way(model, sources, batch, options)
            rounds_of[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(spent) for name, spent in rounds_of.items()}
    count = len(sources)
    tokens = {name: sum(map(len, output)) for name, output in outputs.items()}
    same = sum(a == b == c for a, b, c in zip(*outputs.values())) / count
    rates = [f"{count / seconds[name]:.0f} | {tokens[name] / seconds[name]:.0f}" for name in WAYS]
    ratios = [f"{seconds[name] / seconds['continuous']:.2f}" for name in ("static", "sorted")]
    search = "greedy" if beam_size == 1 else f"beam {beam_size}"
    mean = tokens["continuous"] / count
    return f"| {search} | {batch} | {mean:.1f} | {' | '.join([*rates, *ratios])} | {same:.1%} |"
