"""One server as a queue: rows that share a processor whose speed depends on how many are in use.

A request has work S, of mean 1. With n rows in use a pod completes X(n) requests/s, each row works
at X(n) / n, and whoever finds all rows in use waits in order of arrival. With exponential S this is
a birth-death process (Kleinrock, Queueing Systems I, 3.2): p(n) ~ prod_k rate / X(min(k, rows)).
"""

from __future__ import annotations

import heapq
import itertools
import re
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from handler.decoding.cuda_runner import FEWEST_ROWS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Server:
    """What one pod can do.

    rates: requests/s that are completed with 1, 2, ... rows in use; as many as there are rows.
    live: requests that the handler has at most, rows in use included.
    queue: requests that wait in TorchServe beyond those; further ones are answered 503.
    round_seconds: of decoding between two looks at TorchServe's queue.
    """

    rates: tuple[float, ...]
    live: int
    queue: int
    round_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates: got {self.rates}; allowed: one or more, each above 0")
        if self.live < self.rows or self.queue < 0:
            raise ValueError(
                f"live, queue: got {self.live}, {self.queue}; allowed: live from "
                f"{self.rows} (rows), queue from 0"
            )

    @property
    def rows(self) -> int:
        return len(self.rates)

    @property
    def capacity(self) -> float:
        """Requests/s with every row in use."""
        return self.rates[-1]


def measured(
    results: Path = ROOT / "docs" / "results.md",
    config: Path = ROOT / "handler" / "model-config.yaml",
) -> Server:
    """The server of docs/results.md, Multi30k model, with the limits of model-config.yaml.

    X(n) goes straight from point to point: one client (closed loop), 50, 80 and 95 % load, where
    n = requests/s * p50 by Little's law (the median for the mean), and the capacity at full rows.
    Closed loops of 8 and 32 clients are left out: their clients were threads of Python that shared
    the cores, and made 359 requests/s where the open loop made 371 with fewer rows in use.

    Raises:
        ValueError: a table is not there.
    """
    text = results.read_text(encoding="utf-8")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    rows = int(settings["handler"]["rows"] or FEWEST_ROWS)  # on a CPU
    alone = _found(r"^Multi30k model.*?^\| TorchServe \| 1 \| ([\d.]+) \|", text, results)
    capacity = _found(r"^\| continuous batching \| ([\d.]+) \|", text, results)
    points = [(0.0, 0.0), (1.0, alone)]
    points += [
        (rate * p50 / 1000, rate) for rate, p50, _ in latencies(results).values()
    ]
    points.append((rows, capacity))
    return Server(
        rates=tuple(_between(points, n) for n in range(1, rows + 1)),
        live=int(settings["batchSize"]),
        queue=int(settings["jobQueueSize"]),
        round_seconds=float(settings["handler"]["round_ms"]) / 1000,
    )


def latencies(results: Path = ROOT / "docs" / "results.md") -> dict[str, tuple[float, ...]]:
    """Requests/s, p50 and p99 ms of each share of the capacity, of docs/results.md's open loop."""
    text = results.read_text(encoding="utf-8").partition("## Under load")[2]
    line = r"^\| (\d+%) \| ([\d.]+) \| (\d+) / (\d+) \|"
    found = re.findall(line, text, re.MULTILINE)
    if not found:
        raise ValueError(f"{results}: no latencies at shares of the capacity below '## Under load'")
    return {share: tuple(map(float, numbers)) for share, *numbers in found}


def _found(pattern: str, text: str, where: Path) -> float:
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"{where}: nothing matches {pattern}")
    return float(match[1])


def _between(points: Sequence[tuple[float, float]], n: float) -> float:
    for (left, low), (right, high) in itertools.pairwise(points):
        if n <= right:
            return low + (high - low) * (n - left) / (right - left)
    return points[-1][1]


class Pod:
    """The requests of one server.

    Attributes:
        latencies: seconds from arrival to answer, of those completed since it was last emptied.
        arrived, refused, completed: requests, counted from the start.
        queue_seconds: of all requests that left TorchServe's queue, what they waited in it: until
            there was a place among the live ones, and half a round until the handler looks.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.now = 0.0  # s
        self.latencies = array("d")
        self.arrived = self.refused = self.completed = 0
        self.queue_seconds = 0.0
        self._done = 0.0  # work that a row which was always in use has done
        self._running: list[tuple[float, float]] = []  # heap: _done at its end; arrival
        self._waiting: deque[tuple[float, float]] = deque()  # arrival, work
        self._speeds = [0.0, *(x / (n + 1) for n, x in enumerate(server.rates))]

    @property
    def rows_in_use(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Live requests without a row."""
        return min(len(self._waiting), self.server.live - self.server.rows)

    @property
    def pending(self) -> int:
        """Requests in TorchServe's queue."""
        return len(self._waiting) - self.waiting

    @property
    def in_system(self) -> int:
        return len(self._running) + len(self._waiting)

    def advance(self, arrivals: Sequence[float], work: Sequence[float], until: float) -> None:
        """Serve until `until`, s; `arrivals` ascend from now to there, each with its work."""
        running, waiting, rows = self._running, self._waiting, self.server.rows
        room = self.server.live + self.server.queue - rows
        ahead = self.server.live - rows
        for arrival, size in zip(arrivals, work):
            self._serve(arrival)
            if len(running) < rows:
                heapq.heappush(running, (self._done + size, arrival))
            elif len(waiting) < room:
                waiting.append((arrival, size))
            else:
                self.refused += 1
                continue
            if len(waiting) <= ahead:
                self.queue_seconds += self.server.round_seconds / 2
        self.arrived += len(arrivals)
        self._serve(until)

    def _serve(self, until: float) -> None:
        running, waiting, speeds = self._running, self._waiting, self._speeds
        now, done = self.now, self._done
        ahead = self.server.live - self.server.rows
        while running:
            speed = speeds[len(running)]
            end, arrival = running[0]
            then = now + (end - done) / speed
            if then > until:
                done += (until - now) * speed
                break
            now, done = then, end
            self.latencies.append(now - arrival)
            self.completed += 1
            if waiting:
                arrival, size = waiting.popleft()
                heapq.heapreplace(running, (done + size, arrival))
                if len(waiting) >= ahead:  # one more has become live
                    entered = waiting[ahead - 1][0] if ahead else arrival
                    self.queue_seconds += now - entered + self.server.round_seconds / 2
            else:
                heapq.heappop(running)
        self.now, self._done = until, done
