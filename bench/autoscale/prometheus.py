"""What is known of the pods, and when: samples, and the functions of PromQL that the queries use.

Ranges are open at their beginning, as since Prometheus 3. What a pod that has gone once said stays
in a range until it is older than that; in an instant it is not seen any more (it is marked stale).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LOOKBACK = 300.0  # s, in which an instant takes the last sample
SEEN = 45.0  # s, in which the guard of the queries looks for a scrape


@dataclass(frozen=True)
class Sample:
    """What one scrape of a pod reads; counters since its start."""

    time: float  # s
    rows_in_use: float = 0
    waiting: float = 0
    pending: float = 0
    arrivals: float = 0  # counter
    queue_microseconds: float = 0  # counter


Read = Callable[[Sample], float]


@dataclass
class History:
    """The samples of one pod, in order of time."""

    samples: list[Sample] = field(default_factory=list)
    stale: bool = False  # gone, and seen to be

    def within(self, now: float, window: float) -> list[Sample]:
        """Samples of (now - window, now]."""
        begin = bisect_right(self.samples, now - window, key=lambda one: one.time)
        return [one for one in self.samples[begin:] if one.time <= now]

    def last(self, now: float) -> Sample | None:
        found = [] if self.stale else self.within(now, LOOKBACK)
        return found[-1] if found else None

    def forget(self, before: float) -> None:
        while self.samples and self.samples[0].time < before:
            self.samples.pop(0)


def avg_over_time(history: History, read: Read, now: float, window: float) -> float | None:
    values = [read(one) for one in history.within(now, window)]
    return sum(values) / len(values) if values else None


def rate(history: History, read: Read, now: float, window: float) -> float | None:
    """Per second, extrapolated to the ends of the window as Prometheus does
    (promql/functions.go, extrapolatedRate). Counters here never start anew: a pod's end with it."""
    found = history.within(now, window)
    if len(found) < 2:
        return None
    first, last = found[0], found[-1]
    grown, sampled = read(last) - read(first), last.time - first.time
    between = sampled / (len(found) - 1)
    before, after = first.time - (now - window), now - last.time
    before = between / 2 if before >= 1.1 * between else before
    after = between / 2 if after >= 1.1 * between else after
    if grown > 0:  # it was 0 once, and never less
        before = min(before, sampled * read(first) / grown)
    return grown * (sampled + before + after) / sampled / window


def summed(values: Sequence[float | None]) -> float | None:
    """PromQL's sum: of the series that there are; nothing where there is none."""
    found = [one for one in values if one is not None]
    return sum(found) if found else None


def guarded(answer: float | None, histories: Sequence[History], now: float) -> float | None:
    """`answer or 0 * sum(min by (pod) (last_over_time(up[45s])) == 1)`. Both ports of a pod are
    scraped at once here, and always answer."""
    if answer is not None:
        return answer
    return 0.0 if any(one.within(now, SEEN) for one in histories) else None


def saturation(
    histories: Sequence[History], now: float, window: float, rows: int
) -> float | None:
    """The query of that name of autoscale-keda-gmp: pods' worth of rows; None where there is no
    answer."""
    parts = [
        summed([avg_over_time(one, read, now, window) for one in histories])
        for read in (lambda s: s.rows_in_use, lambda s: s.waiting, lambda s: s.pending)
    ]
    held = [one for one in parts if one is not None]
    answer = sum(held) / rows if len(held) == len(parts) else None
    return guarded(answer, histories, now)


def arrivals(histories: Sequence[History], now: float, window: float) -> float | None:
    """The query of that name, requests/s."""
    found = summed([rate(one, lambda s: s.arrivals, now, window) for one in histories])
    return guarded(found, histories, now)
