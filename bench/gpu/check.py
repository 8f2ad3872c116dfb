"""Part `check`: whether sentences come out as on a CPU in float32, and alone as in company."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from bench.gpu.ledger import Ledger, Record
from bench.gpu.models import (
    CPU,
    EOS,
    TOKENS,
    KernelByKernel,
    Models,
    Recorded,
    decoded,
    random_sources,
)
from handler.decoding import DecodingOptions, Engine
from handler.decoding.model import load
from handler.decoding.static_lane import StaticLane

VOCABULARY = 8000
TOGETHER = 16  # sentences
SOME = 12


def check(a: argparse.Namespace, models: Models, ledger: Ledger) -> None:
    path, sources, told = asked(a, models)
    expected: dict[int, list[list[int]]] = {}
    for weights in a.formats:
        for beam in a.beams:
            for way in ("recorded", "kernel by kernel"):
                key = {"part": "check", "model": told, "sentences": len(sources),
                       "format": weights, "beam": beam, "way": way}  # fmt: skip

                def make(weights: str = weights, beam: int = beam, way: str = way) -> Record:
                    options = DecodingOptions(beam_size=beam, max_length=2 * TOKENS)
                    if beam not in expected:
                        engine = Engine(load(str(path), CPU), TOGETHER * beam)
                        expected[beam] = decoded(engine, sources, options)
                    model = models.loaded(path, weights)
                    return compared(model, models.device, way, sources, options, expected[beam])

                ledger.measure(key, make)


def asked(a: argparse.Namespace, models: Models) -> tuple[Path, list[list[int]], str]:
    """A model, what it is to translate, and how both are called."""
    if a.model is None:
        vocabulary = min(VOCABULARY, a.vocabulary)
        sources = random_sources(a.sentences, vocabulary, shortest=5)
        return models.exported(a.check_size, vocabulary), sources, f"random {a.check_size}"
    from handler.tokenizer import Tokenizer  # which needs sentencepiece

    tokenizer = Tokenizer(a.source_tokenizer)
    lines = [line for line in a.text.read_text("utf-8").split("\n") if line.strip()]
    sources = [[*tokenizer.encode(line), EOS] for line in lines[: a.sentences]]
    return a.model, sources, "trained"


def compared(
    model: Any, device: torch.device, way: str, sources: list[list[int]],
    options: DecodingOptions, expected: list[list[int]],
) -> Record:  # fmt: skip
    """Of one engine: together, and one after the other."""
    beam = options.beam_size
    engine: Engine
    if way == "recorded":
        engine = Recorded(model, TOGETHER * beam, device, [beam])
    else:
        engine = KernelByKernel(model, TOGETHER * beam, device)
    together = decoded(engine, sources, options)
    # Kernel by kernel a sentence takes a quarter of a second.
    some = sources if way == "recorded" else sources[:SOME]
    alone = [decoded(engine, [one], options)[0] for one in some]
    found: Record = {
        "as_cpu": share(together, expected), "as_alone": share(together[: len(some)], alone),
    }  # fmt: skip
    runner: Any = engine.runner
    if way == "recorded":
        lane: StaticLane = runner.static[beam]
        found |= {"invariant": runner.invariant, "tiled": lane.tiled,
                  "equal_rows": equal_rows(lane)}  # fmt: skip
    return found


def share(found: list[list[int]], expected: list[list[int]]) -> float:
    return sum(map(list.__eq__, found, expected)) / len(found)


@torch.inference_mode()
def equal_rows(lane: StaticLane) -> str:
    """Of how many numbers of rows the logits of the first sentence are those that it has in the
    largest step, to the bit. Nobody is in the lane."""
    generator = torch.Generator().manual_seed(2)
    for table in [*lane.state, *lane.attended]:
        drawn = torch.randn(table.shape, generator=generator)
        table.copy_(drawn if table.is_floating_point() else torch.ones_like(drawn))
    said = []
    for count in lane.grid.sentences:
        rows = count * lane.kind.width
        previous = lane.board.columns.previous[:count]
        logits, _ = lane.logits(
            previous, [t[:rows] for t in lane.state], count, lane.grid.sources[0]
        )
        said.append(logits[: lane.kind.width].cpu())
    equal = sum(torch.equal(one, said[-1]) for one in said[:-1])
    return f"{equal} of {len(said) - 1}"


def rows_of(text: str) -> tuple[int, int]:
    """The two numbers of what `equal_rows` says."""
    equal, count = map(int, re.findall(r"\d+", text))
    return equal, count
