"""Pods, their metrics and their autoscaler, second by second."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy

from bench.autoscale.hpa import SYNC, Answer, Controller, Scaler, Target
from bench.autoscale.pod import Pod, Server
from bench.autoscale.prometheus import (
    LOOKBACK,
    History,
    Sample,
    arrivals,
    rate,
    saturation,
)

SCRAPE = 15  # s, of PodMonitoring
SETTLE = 15  # s, for which a pod that ends still answers (k8s/README.md, How a pod ends)
SHAPE = 7.0  # of the gamma distribution of work, see `Setup`
STEP = 1.01  # between the bounds of bins of latencies
LEAST, BINS = 1e-4, 1700  # s; the last bin begins at 2,200 s


@dataclass(frozen=True)
class Outage:
    """When nothing is scraped (`samples`: the collector is gone, and nothing is marked stale), or
    no query is answered (`answers`). s."""

    begin: float
    end: float
    kind: Literal["samples", "answers"] = "samples"


@dataclass(frozen=True)
class Trace:
    """What comes. rate: requests/s at each second; replicas: pods at its beginning."""

    name: str
    seconds: int
    rate: Callable[[float], float]
    replicas: int = 2
    outage: Outage | None = None


@dataclass(frozen=True)
class Setup:
    """start: s from the decision to a pod that serves. 8 is measured (k8s manifests: 6 to 8 s for
    the demo model, 2 cores), with image and node there; a node and an image add minutes.

    shape: of the gamma distribution of work; 1 is exponential, captions' lengths have 1 / 0.32^2 =
    10 (docs/results.md's test set). With 7, one simulated pod has p50 / p99 of 48 / 109 ms at 50 %
    load and 63 / 149 at 80, where 48 / 101 and 62 / 159 were measured; at 95 %, 101 / 294 against
    75 / 204, so near its capacity the simulated pod is the slower one.
    """

    server: Server
    start: float = 8.0
    shape: float = SHAPE
    seed: int = 1


@dataclass(frozen=True)
class Window:
    """`SYNC` s of a run, from `time` s. replicas: wanted; ready: that serve; p50, p99: s, of the
    requests answered in it, nan of none."""

    time: float
    replicas: int
    ready: int
    arrived: int
    refused: int
    p50: float
    p99: float


@dataclass
class Run:
    """arrived = completed + refused + in_system, at every moment."""

    scaler: str
    trace: Trace
    windows: list[Window] = field(default_factory=list)
    arrived: int = 0
    refused: int = 0
    completed: int = 0
    in_system: int = 0
    histogram: numpy.ndarray = field(default_factory=lambda: numpy.zeros(BINS, numpy.int64))

    def add(self, latencies: array[float]) -> None:
        """s, of requests answered."""
        values = numpy.asarray(latencies) / LEAST
        bins = numpy.log(numpy.maximum(values, 1)) / math.log(STEP)
        self.histogram += numpy.bincount(
            numpy.minimum(bins.astype(int), BINS - 1), minlength=BINS
        )

    def percentile(self, percent: float) -> float:
        """s, of all requests answered, to half a percent of itself; nan of none."""
        reached = numpy.cumsum(self.histogram)
        if not reached[-1]:
            return math.nan
        at = int(numpy.searchsorted(reached, percent / 100 * reached[-1]))
        return LEAST * STEP ** (at + 0.5)

    @property
    def pods(self) -> float:
        """Wanted on average."""
        return sum(one.replicas for one in self.windows) / len(self.windows)


@dataclass
class Member:
    """A pod of the Deployment. s: when it serves, and when it was told to end."""

    pod: Pod
    serves: float
    phase: int  # of its scrapes
    told: float | None = None
    history: History = field(default_factory=History)

    def gone(self, now: float) -> bool:
        return self.told is not None and now >= self.told + SETTLE and self.pod.in_system == 0


class Load:
    """The requests of a trace: times are Poisson's within each second, work is gamma distributed
    with mean 1. The same seed brings the same requests, however many pods there are."""

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.trace = trace
        self.shape = setup.shape
        self.draw = numpy.random.default_rng(setup.seed)
        self.route = numpy.random.default_rng([setup.seed, 1])

    def second(self, begin: int, pods: int) -> Iterator[tuple[list[float], list[float]]]:
        """Of each pod, arrivals in [begin, begin + 1) and their work; each request goes to a
        random pod. With no pod, one list that nobody serves."""
        count = int(self.draw.poisson(self.trace.rate(begin)))
        times = begin + numpy.sort(self.draw.random(count))
        work = self.draw.gamma(self.shape, 1 / self.shape, count)
        where = self.route.integers(max(pods, 1), size=count)
        for i in range(max(pods, 1)):
            here = where == i
            yield times[here].tolist(), work[here].tolist()


class Cluster:
    """One run of a trace under a scaler; `scaler` None: the pods stay as they are."""

    def __init__(self, setup: Setup, trace: Trace, scaler: Scaler | None) -> None:
        self.setup, self.trace, self.scaler = setup, trace, scaler
        self.controller = Controller(scaler) if scaler else None
        self.phases = numpy.random.default_rng([setup.seed, 2])
        self.replicas = trace.replicas
        self.members: list[Member] = []
        self.unserved = 0  # requests that found no pod
        self.past = Run(scaler.name if scaler else f"{trace.replicas} pods", trace)
        self.left: list[Member] = []  # gone, but still in a range
        for _ in range(trace.replicas):
            self.start(0.0)

    def run(self) -> Run:
        load = Load(self.trace, self.setup)
        before = (0, 0)
        for now in range(self.trace.seconds):
            if now % SYNC == 0 and now:
                before = self.record(now - SYNC, before)
                self.scale(now)
            serving = [one for one in self.members if one.told is None and one.serves <= now]
            parts = load.second(now, len(serving))
            if not serving:
                self.unserved += len(next(parts)[0])
            for member in self.members:
                times, work = next(parts) if member in serving else ([], [])
                member.pod.advance(times, work, now + 1)
            self.scrape(now + 1)
            self.bury(now + 1)
        self.record(self.trace.seconds - SYNC, before)
        return self.past

    def start(self, serves: float) -> None:
        pod = Pod(self.setup.server)
        pod.now = max(0.0, serves)
        self.members.append(Member(pod, serves, int(self.phases.integers(SCRAPE))))

    def scale(self, now: float) -> None:
        if self.controller is None:
            return
        alive = [one for one in self.members if one.told is None]
        ready = sum(one.serves <= now for one in alive)
        answers = {one.name: self.answer(one, now) for one in self.controller.scaler.targets}
        self.replicas = self.controller.decide(now, self.replicas, ready, answers)
        for _ in range(self.replicas - len(alive)):
            self.start(float(int(now + self.setup.start)))
        # A ReplicaSet ends those first that serve not yet, or for the shortest time.
        alive.sort(key=lambda one: one.serves)
        for one in alive[self.replicas :]:
            one.told = now if one.serves <= now else now - SETTLE

    def answer(self, target: Target, now: float) -> Answer:
        """What the metrics' server says, nothing where it cannot."""
        assert self.scaler is not None
        outage = self.trace.outage
        if outage and outage.kind == "answers" and outage.begin <= now < outage.end:
            return None
        window = self.scaler.window
        alive = [one.history for one in self.members if one.told is None]
        every = [one.history for one in (*self.members, *self.left)]
        if target.name == "saturation":
            return saturation(every, now, window, self.setup.server.rows)
        if target.name == "arrivals":
            return arrivals(every, now, window)
        if target.name == "queue rate":
            return [rate(one, lambda s: s.queue_microseconds, now, window) for one in alive]
        found = [one.last(now) for one in every]
        held = [one.queue_microseconds for one in found if one is not None]
        return sum(held) if held else None

    def scrape(self, now: int) -> None:
        outage = self.trace.outage
        if outage and outage.kind == "samples" and outage.begin <= now < outage.end:
            return
        for one in self.members:
            if now >= one.serves and (now - one.phase) % SCRAPE == 0:
                pod = one.pod
                sample = Sample(
                    now, pod.rows_in_use, pod.waiting, pod.pending, pod.arrived,
                    1e6 * pod.queue_seconds,
                )  # fmt: skip
                one.history.samples.append(sample)
                one.history.forget(now - LOOKBACK)

    def bury(self, now: float) -> None:
        for one in [one for one in self.members if one.gone(now)]:
            self.members.remove(one)
            one.history.stale = True
            self.left.append(one)

    def record(self, begin: float, before: tuple[int, int]) -> tuple[int, int]:
        everyone = [*self.members, *self.left]
        past = self.past
        past.arrived = sum(one.pod.arrived for one in everyone) + self.unserved
        past.refused = sum(one.pod.refused for one in everyone) + self.unserved
        past.completed = sum(one.pod.completed for one in everyone)
        past.in_system = sum(one.pod.in_system for one in everyone)
        latencies = array("d")
        for one in everyone:
            latencies.extend(one.pod.latencies)
            one.pod.latencies = array("d")
        past.add(latencies)
        p50, p99 = numpy.percentile(latencies, [50, 99]) if latencies else (math.nan, math.nan)
        ready = sum(one.told is None and one.serves <= begin for one in self.members)
        past.windows.append(
            Window(
                begin, self.replicas, ready, past.arrived - before[0], past.refused - before[1],
                float(p50), float(p99),
            )
        )  # fmt: skip
        return past.arrived, past.refused


def simulate(setup: Setup, trace: Trace, scaler: Scaler | None) -> Run:
    return Cluster(setup, trace, scaler).run()


def same(setup: Setup, trace: Trace, scalers: Sequence[Scaler]) -> list[Run]:
    """The same requests under each scaler."""
    return [simulate(setup, trace, one) for one in scalers]
