"""Part `step`: milliseconds of a recorded step, beside the least that they can be."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.ledger import Ledger, Record
from bench.gpu.models import (
    FORMATS,
    TOKENS,
    Models,
    Recorded,
    median_seconds,
    profiled,
    random_sources,
    seconds,
    synchronised,
)
from handler.decoding import DecodingOptions
from handler.decoding.graphs import Called, CudaGraphs, bucket
from handler.decoding.model import encode_batch
from handler.decoding.sentence import Sentence
from handler.decoding.static_lane import StaticLane

CALLS = 30  # of which the median is told
STEPS = 8  # of a call
TOLD = 40  # characters of a kernel's name


def step(a: argparse.Namespace, models: Models, ledger: Ledger) -> None:
    device = models.device
    ledger.measure({"part": "step", "ceiling": "copy"}, lambda: bandwidth(device))
    for weights in a.formats:
        key = {"part": "step", "ceiling": "product", "format": weights}

        def product(weights: str = weights) -> Record:
            return products(device, weights)

        ledger.measure(key, product)
    path = models.exported(a.size, a.vocabulary)
    for weights in a.formats:
        for beam in a.beams:
            for rows in [rows for rows in a.rows if rows >= beam]:
                key = key_of(a, weights, beam, rows)

                def make(weights: str = weights, beam: int = beam, rows: int = rows) -> Record:
                    model = models.loaded(path, weights)
                    found = measured(model, device, rows // beam, beam, max(a.rows))
                    floor = floor_of(ledger, *models.read[path], weights, rows // beam, beam)
                    return {**found, "floor_ms": floor}

                ledger.measure(key, make)


def key_of(a: argparse.Namespace, weights: str, beam: int, rows: int) -> Record:
    return {"part": "step", "size": a.size, "vocabulary": a.vocabulary, "format": weights,
            "beam": beam, "rows": rows // beam * beam}  # fmt: skip


def floor_of(
    ledger: Ledger, weights_read: int, attention: int, weights: str, n: int, beam: int
) -> float | None:
    """Milliseconds: all weights and memory are read once, and multiplied by.

    Args:
        weights_read: numbers that a step multiplies by; attention: its size.
        weights: the number format; n: sentences.
    """
    copy = ledger.of({"part": "step", "ceiling": "copy"})
    product = ledger.of({"part": "step", "ceiling": "product", "format": weights})
    if copy is None or product is None:
        return None
    memory = 2 * n * TOKENS * attention  # keys and values
    bytes_read = (weights_read + memory) * FORMATS[weights]
    operations = 2 * n * beam * (weights_read + 2 * TOKENS * attention)
    return 1e3 * max(
        bytes_read / copy["bytes_per_second"], operations / product["operations_per_second"]
    )


def measured(model: Any, device: torch.device, n: int, beam: int, most: int) -> Record:
    """A step of `n` sentences in a lane for `most` rows."""
    engine = Recorded(model, most, device, [beam], called=True)
    runner: Any = engine.runner
    lane: StaticLane = runner.static[beam]
    count = fill(lane, model, n)
    compute = lane.replays[count, bucket(TOKENS, lane.grid.sources)]
    recorder = CudaGraphs(device) if device.type == "cuda" else Called()
    replays: list[Callable[[], None]] = []
    with torch.inference_mode():
        recording = seconds(lambda: replays.append(recorder.record(compute)), device)
        (replay,) = replays

        def several() -> None:
            for _ in range(STEPS):
                replay()

        spent = []
        for _ in range(CALLS if device.type == "cuda" else 3):
            again(lane, n)
            spent.append(seconds(several, device))
        again(lane, n)
        kernels, busy = profiled(several, device)
    ms = 1e3 * statistics.median(spent) / STEPS
    found: Record = {
        "ms": ms, "computed_rows": count * beam, "tiled": lane.tiled, "recording_s": recording,
        "tokens_per_second_allowed": 1e3 * n / ms,
    }  # fmt: skip
    if kernels:
        found |= {
            "kernels": sum(kernels.values()) / STEPS,
            "busy_ms": 1e3 * busy / STEPS,
            "gaps": max(0.0, 1 - 1e3 * busy / STEPS / ms),
            "names": {key[:TOLD]: count / STEPS for key, count in kernels.items()},
        }
    return found


@torch.inference_mode()
def fill(lane: StaticLane, model: Any, n: int) -> int:
    """Put sentences into a lane that may not end within a call; the places of its step."""
    sources = random_sources(n, model.source_vocabulary)
    options = DecodingOptions(beam_size=lane.kind.width, min_length=TOKENS)
    members = [Sentence(i, one, options, 2 * TOKENS, []) for i, one in enumerate(sources)]
    memory, state = encode_batch(model, sources, lane.device)
    lane.add(members, state, memory.attended)
    return bucket(n, lane.grid.sentences)


def again(lane: StaticLane, n: int) -> None:
    """From the first token on, so that nobody comes to an end."""
    lane.board.made.zero_()
    lane.board.over[:n] = False
    synchronised(lane.device)


def bandwidth(device: torch.device) -> Record:
    """Of a copy that reads and writes half a GiB (little on a CPU)."""
    size = 1 << (29 if device.type == "cuda" else 22)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = median_seconds(lambda: target.copy_(source), device, 10)
    return {"bytes_per_second": 2 * size / spent}


def products(device: torch.device, weights: str) -> Record:
    """Of a square product of random numbers."""
    size = 8192 if device.type == "cuda" else 256
    x = torch.randn(size, size, device=device, dtype=getattr(torch, weights))
    return {"operations_per_second": 2 * size**3 / median_seconds(lambda: x @ x, device, 10)}
