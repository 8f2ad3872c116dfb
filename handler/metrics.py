"""What the service counts, and when it is told.

Each figure that is told costs TorchServe a line on the worker's standard output, so observations
are summed up here and told together, at most once in `INTERVAL`, whatever the load.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

INTERVAL = 1.0  # seconds; Prometheus reads every 15
PREFIX = "seq2seq_"
# Seconds; upper bounds of buckets. A step is a hundredth of a sentence.
STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WAIT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# Counters that alerts and dashboards ask for, and labels that are known. Told as 0 from the start:
# Prometheus sees nothing grow before it has read it once.
FROM_START: tuple[tuple[str, dict[str, str]], ...] = (
    ("requests_total", {"outcome": "ok"}),
    ("requests_total", {"outcome": "failed"}),
    ("refusals_total", {"reason": "Unauthorized"}),
    ("cancellations_total", {}),
    ("tokens_total", {"side": "source"}),
    ("tokens_total", {"side": "target"}),
)

Kind = Literal["counter", "gauge"]
Series = tuple[str, tuple[str, ...], tuple[str, ...]]  # name, label names, label values
# name, kind, label names, label values, value: an increment of a counter, or a gauge as it is
Sink = Callable[[str, Kind, Sequence[str], Sequence[str], float], None]


class Metrics:
    """Counters, histograms and gauges. One thread may count while another tells."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[Series, float] = defaultdict(float)
        self._told: dict[str, float] = {}

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to the counter `name`."""
        with self._lock:
            self._counts[name, tuple(labels), tuple(labels.values())] += value

    def observe(
        self, name: str, seconds: float, buckets: Sequence[float], times: int = 1
    ) -> None:
        """Add to the histogram `name` so many times: counters name_bucket, name_sum and
        name_count, which is what Prometheus makes of its own histograms. TorchServe's have fixed
        buckets, and take a line for each observation."""
        with self._lock:
            for bound in buckets:
                within = times if seconds <= bound else 0
                self._counts[f"{name}_bucket", ("le",), (f"{bound:g}",)] += within
            self._counts[f"{name}_bucket", ("le",), ("+Inf",)] += times
            self._counts[f"{name}_sum", (), ()] += times * seconds
            self._counts[f"{name}_count", (), ()] += times

    def tell(self, sink: Sink, gauges: dict[str, float]) -> None:
        """Give `sink` what was counted since the last call, and the gauges that have changed.

        Raises:
            Exception: the first that `sink` raised. All others have been told nevertheless; what
                was not is counted again, and told the next time.
        """
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        problem: Exception | None = None
        for series, value in counts.items():
            name, labels, values = series
            try:
                sink(PREFIX + name, "counter", labels, values, value)
            except Exception as error:
                problem = problem or error
                with self._lock:
                    self._counts[series] += value
        for name, value in gauges.items():
            if self._told.get(name) != value:
                try:
                    sink(PREFIX + name, "gauge", (), (), value)
                except Exception as error:
                    problem = problem or error
                else:
                    self._told[name] = value
        if problem is not None:
            raise problem
