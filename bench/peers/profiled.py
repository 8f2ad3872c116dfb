"""Where the time of our own decoding goes, by torch's profiler: `bench.decoding --profile`."""

import time
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.peers.job import Job, Sizes, timed
from bench.peers.ours import Ours
from bench.peers.ours_int8 import OursInt8

NAMED = 6  # operators that are told by name
CALLS = {"encode": ("encode",), "step": ("step", "best")}  # methods of model.pt, by their column


def measure(jobs: Iterable[Job]) -> None:
    """Print a row for each job and each of our number formats.

    The profiler itself takes time, most where operators are many and small, so that the rest is
    rather less than told. Shares are of time that passed, so nothing else should run.
    """
    print("| size | weights | | batch | tokens/s | encoder | step | the rest | operators |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    decoders: dict[tuple[Sizes, type[Ours]], Ours] = {}
    for job in jobs:
        for kind in (Ours, OursInt8):
            if (job.sizes, kind) not in decoders:
                torch.manual_seed(1)
                decoders[job.sizes, kind] = kind(job.sizes)
            print(row(decoders[job.sizes, kind], job), flush=True)


def row(decoder: Ours, job: Job) -> str:
    rate = timed(decoder, job)  # without the profiler
    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        decoder.decode(sorted(job.sources, key=len, reverse=True), job)
        whole = time.perf_counter() - started
    events = {one.key: one for one in found.key_averages()}
    share = {
        column: sum(events[name].cpu_time_total for name in names if name in events) / 1e6 / whole
        for column, names in CALLS.items()
    }
    methods = {name for names in CALLS.values() for name in names}
    operators = sorted(
        (one for one in events.values() if one.key not in methods),
        key=lambda one: one.self_cpu_time_total, reverse=True,
    )[:NAMED]  # fmt: skip
    cells = [
        f"{job.sizes.layers}x{job.sizes.hidden_size}",
        "int8" if decoder.int8 else "float32",
        "greedy" if job.beam_size == 1 else f"beam {job.beam_size}",
        str(job.batch), f"{rate:.0f}",
        *(f"{one:.0%}" for one in share.values()),
        f"{1 - sum(share.values()):.0%}",
        ", ".join(f"{one.key} {one.self_cpu_time_total / 1e6 / whole:.0%}" for one in operators),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
