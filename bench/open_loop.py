"""Continuous batching against dynamic batching, under load that does not wait for answers.

    python -m bench.open_loop STORE SOURCE [--litserve PYTHON]

Three systems serve the model of STORE/seq2seq.mar: the archive as it is; the same archive with
TorchServe's dynamic batching (bench/dynamic_batching.py); and LitServe with model.pt and a plain
loop (bench/plain_server.py), where PYTHON, of an environment of its own, has litserve, torch and
sentencepiece. Requests of one sentence each, drawn from SOURCE, arrive at random (Poisson) whether
earlier ones are answered or not. Latency counts from when a request was due, so that a client that
is held up hides nothing. A request that fails is later than any other.

All systems run at once, but all except the measured one are stopped (SIGSTOP): LitServe's worker
looks for requests a thousand times a second. The clients are another process on the same machine.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from bench.load import Load, Outcome, generated, percentile, pin
from bench.machine import described
from bench.systems import System, ask, dynamic, plain, torchserve

LOADS = (0.5, 0.8, 0.95)
TUNED_AT = 0.8  # of our capacity: where the peers' batch size and delay are chosen
STRIDE = 1.2  # between rates that are searched, until one is met and one is not
TOLERANCE = 0.03  # of a rate that is searched for
PROBES = 7  # at most, of one search


class Bench:
    """Measures systems, and remembers what it measured by system and requests/s."""

    def __init__(
        self, pool: ProcessPoolExecutor, texts: list[str], seconds: float,
        options: dict[str, object],
    ) -> None:
        self.pool = pool
        self.texts = texts
        self.seconds = seconds
        self.options = options
        self.found: dict[tuple[str, float], list[Outcome]] = {}
        self.lag = 0.0  # ms, the worst of all measurements

    def measure(
        self, system: System, rate: float = 0.0, seed: int = 0, clients: int = 0,
        seconds: float | None = None, give_up: float = math.inf, stream: bool = False,
    ) -> Outcome:
        """One measurement of a system, which is awake only meanwhile; arguments as of `Load`."""
        options = {**self.options, "stream": True} if stream else self.options
        requests = [system.request(text, options) for text in self.texts]
        load = Load(
            system.port, requests, seconds or self.seconds, seed, rate, clients, give_up
        )
        with system.awake():
            outcome = self.pool.submit(generated, load).result()
        self.lag = max(self.lag, outcome.lag)
        asked = f"{rate:.1f} requests/s" if rate else f"{clients} clients"
        told = f"p50 {outcome.p(50):.0f} ms, p99 {outcome.p(99):.0f} ms"
        told += " (gave up)" if outcome.gave_up else ""
        if not rate:
            told += f", {outcome.capacity:.1f} requests/s"
        if outcome.failures:
            told += f", failures {dict(outcome.failures)}"
        say(f"{system.name}{' (stream)' if stream else ''}: {asked}: {told}")
        return outcome

    def record(self, system: System, rate: float, seed: int, stream: bool = False) -> None:
        """Measure, and remember for the tables."""
        name = f"{system.name} (stream)" if stream else system.name
        outcome = self.measure(system, rate, seed, stream=stream)
        self.found.setdefault((name, rate), []).append(outcome)

    def warm(self, system: System) -> None:
        """Let everything be compiled that is, for small batches and large ones.

        Raises:
            RuntimeError: two clients were refused; a benchmark of errors means nothing.
        """
        for clients in (2, 64):
            outcome = self.measure(system, clients=clients, seconds=min(3.0, self.seconds))
            if clients == 2 and outcome.failures:
                raise RuntimeError(f"{system.name}: {dict(outcome.failures)}")

    def median(self, name: str, rate: float, percent: int) -> float:
        """ms, of the rounds."""
        return statistics.median(one.p(percent) for one in self.found[name, rate])

    def first(self, name: str, rate: float, percent: int) -> float:
        """ms to the first event of a stream, median of the rounds."""
        return statistics.median(percentile(one.first, percent) for one in self.found[name, rate])

    def cell(self, name: str, rate: float) -> str:
        failed = sum(one.failures.total() for one in self.found[name, rate])
        told = f"{self.median(name, rate, 50):.0f} / {self.median(name, rate, 99):.0f}"
        return f"{told} ({failed} failed)" if failed else told

    def search(self, system: System, target: float) -> "Search":
        """Where to look for the highest rate at which p99 stays within `target` ms."""
        known = [(rate, self.median(name, rate, 99))
                 for name, rate in self.found if name == system.name]
        failed = min((rate for rate, p99 in known if p99 > target), default=math.inf)
        below = [rate for rate, _ in known if rate < failed]
        return Search(max(below) if below else failed / STRIDE)


@dataclass
class Search:
    """For the highest rate that is met, requests/s: by strides until one rate is met and one is
    not, then by halves. `low` is the result, 0 where no rate was met."""

    rate: float
    low: float = 0.0
    high: float = math.inf

    @property
    def over(self) -> bool:
        return self.high - self.low <= TOLERANCE * self.high < math.inf

    def learn(self, met: bool) -> None:
        if met:
            self.low = self.rate
        else:
            self.high = self.rate
        if self.low == 0.0:
            self.rate /= STRIDE
        elif self.high == math.inf:
            self.rate *= STRIDE
        else:
            self.rate = (self.low + self.high) / 2


def tuned(
    bench: Bench, make: Callable[[int, int], AbstractContextManager[System]],
    batches: list[tuple[int, int]], rate: float,
) -> AbstractContextManager[System]:
    """The system with the batch size and delay whose p99 is lowest at `rate`."""
    tried = []
    for size, delay in batches:
        with make(size, delay) as system:
            bench.warm(system)
            outcome = bench.measure(system, rate)
            tried.append((outcome.p(99), outcome.p(50), size, delay))
    return make(*min(tried)[2:])


def streams(system: System, text: str) -> bool:
    with system.awake():
        status, kind, body = ask(
            system.port, "POST", system.path, {"text": text, "stream": True}
        )
    if status == 200 and kind == "text/event-stream":
        return True
    say(f"{system.name} does not stream: {status} {kind} {body[:200]}")
    return False


def translated(bench: Bench, system: System, texts: list[str]) -> list[str]:
    """What a system answers to each text, asked one at a time."""
    found = []
    with system.awake():
        for text in texts:
            status, _, body = ask(system.port, "POST", system.path, {"text": text, **bench.options})
            if status != 200:
                raise RuntimeError(f"{system.name}: {status}: {body[:500]}")
            answer = json.loads(body)
            found.append(answer.get("translation") or answer["translations"][0][0]["text"])
    return found


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def pair(text: str) -> tuple[int, int]:
    size, delay = text.split(":")
    return int(size), int(delay)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.open_loop", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("source", type=Path, help="text to send, a sentence a line")
    parser.add_argument("--litserve", type=Path, help="python that has litserve; none: no such row")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--clients", type=int, default=128, help="of the closed loop for capacity")
    parser.add_argument("--batches", type=pair, nargs="+", default=[(16, 5), (64, 5), (64, 20)],
                        metavar="SIZE:MS", help="of the peers, of which the best is taken")
    parser.add_argument("--target-ms", type=float, help="of p99; default: twice ours at 50 %% load")
    parser.add_argument("--cpus", type=int, default=0,
                        help="of the servers, the clients get the others; 0: all share all")
    a = parser.parse_args()
    texts = [line for line in a.source.read_text("utf-8").split("\n") if line.strip()]
    archive = a.store / "seq2seq.mar"
    free = sorted(os.sched_getaffinity(0)) if a.cpus else []
    if a.cpus and not 0 < a.cpus < len(free):
        parser.error(f"--cpus: got {a.cpus}; allowed: 1 to {len(free) - 1}")
    about = f"{described()}; `{' '.join(['python -m bench.open_loop', *sys.argv[1:]])}`"
    with ExitStack() as stack:
        others = set(free[a.cpus:])
        pool = stack.enter_context(
            ProcessPoolExecutor(1, get_context("spawn"), initializer=pin, initargs=(others,))
        )
        pin(set(free[:a.cpus]))
        bench = Bench(pool, texts, a.seconds, {"beam_size": a.beam} if a.beam > 1 else {})
        ours = stack.enter_context(torchserve("continuous batching", a.store))
        bench.warm(ours)
        rate = TUNED_AT * bench.measure(ours, clients=a.clients).capacity
        makers = [lambda size, delay: dynamic(archive, size, delay)]
        if a.litserve is not None:
            makers.append(
                lambda size, delay: plain("litserve", a.litserve, archive, a.beam, size, delay)
            )
        systems = [ours]
        for make in makers:
            systems.append(stack.enter_context(tuned(bench, make, a.batches, rate)))
            bench.warm(systems[-1])
        print(f"{about}\n")
        compare(bench, systems, a.rounds, a.clients, a.target_ms)


def compare(
    bench: Bench, systems: list[System], rounds: int, clients: int, target: float | None
) -> None:
    """Measure in rounds in which the systems take turns, and print the tables."""
    ours, peers = systems[0], systems[1:]
    answers = [translated(bench, system, bench.texts[:50]) for system in systems]
    capacity = {
        system.name: statistics.median(found)
        for system, found in zip(systems, zip(*(
            [bench.measure(one, clients=clients, seed=i).capacity for one in systems]
            for i in range(rounds)
        )))
    }
    streaming = streams(ours, bench.texts[0])
    for i in range(rounds):
        for load in LOADS:
            for system in systems:
                for rate in dict.fromkeys((capacity[ours.name], capacity[system.name])):
                    bench.record(system, load * rate, i)
            if streaming:
                bench.record(ours, load * capacity[ours.name], i, stream=True)
    shared = {load: load * capacity[ours.name] for load in LOADS}
    if target is None:
        target = 2 * bench.median(ours.name, shared[0.5], 99)
    best: dict[str, list[float]] = {system.name: [] for system in systems}
    for i in range(rounds):
        searches = [bench.search(system, target) for system in systems]
        for _ in range(PROBES):  # in turns here too, as the machine is not alike at all times
            for system, search in zip(systems, searches):
                if not search.over:
                    outcome = bench.measure(system, search.rate, rounds + i, give_up=target)
                    search.learn(outcome.p(99) <= target)
        for system, search in zip(systems, searches):
            best[system.name].append(search.low)

    print(f"| system | capacity requests/s | ours / it | requests/s at p99 <= {target:.0f} ms "
          "| ours / it |")
    print("|---|---|---|---|---|")
    for system in systems:
        own, reached = capacity[system.name], statistics.median(best[system.name])
        ratio = statistics.median(
            one / other if other else math.inf
            for one, other in zip(best[ours.name], best[system.name])
        )
        print(f"| {system.name} | {own:.1f} | {capacity[ours.name] / own:.2f} | {reached:.1f} "
              f"| {ratio:.2f} |")

    print("\nLatency at shares of our capacity, p50 / p99 ms:\n")
    print("| load | requests/s |" + "".join(f" {system.name} |" for system in systems))
    print("|---|---|" + "---|" * len(systems))
    for load, rate in shared.items():
        cells = "".join(f" {bench.cell(system.name, rate)} |" for system in systems)
        print(f"| {load:.0%} | {rate:.1f} |{cells}")

    print("\nLatency of each at shares of its own capacity:\n")
    print("| load | system | requests/s | p50 / p99 ms |")
    print("|---|---|---|---|")
    for load in LOADS:
        for system in systems:
            rate = load * capacity[system.name]
            print(f"| {load:.0%} | {system.name} | {rate:.1f} | {bench.cell(system.name, rate)} |")

    print("\nTime to first token at shares of our capacity, p50 / p99 ms; of a system that does "
          "not stream it is the whole latency:\n")
    if streaming:
        print("| load | ours, stream: first | ours, stream: whole |"
              + "".join(f" {peer.name} |" for peer in peers))
        print("|---|---|---|" + "---|" * len(peers))
        for load, rate in shared.items():
            name = f"{ours.name} (stream)"
            first = " / ".join(f"{bench.first(name, rate, p):.0f}" for p in (50, 99))
            cells = "".join(f" {bench.cell(peer.name, rate)} |" for peer in peers)
            print(f"| {load:.0%} | {first} | {bench.cell(name, rate)} |{cells}")
    else:
        print("not measured: this archive does not stream.")

    same = (
        f"{sum(one == other for one, other in zip(answers[0], of_peer))} by {peer.name}"
        for peer, of_peer in zip(peers, answers[1:])
    )
    print(f"\nOf {len(answers[0])} sentences, answered as by ours: {', '.join(same)}. 99 % of "
          f"requests were sent at most {bench.lag:.1f} ms late, in the worst measurement.")


if __name__ == "__main__":
    main()
