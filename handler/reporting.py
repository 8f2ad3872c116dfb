"""Brings what the service counts to TorchServe's Prometheus endpoint, from a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from handler.metrics import FROM_START, INTERVAL, Kind
from handler.service import Service

logger = logging.getLogger(__name__)

CEASED = 2.0  # seconds without a call after which no client can be waiting


class Calls:
    """Whether TorchServe is calling the handler: as a context manager, around each call."""

    def __init__(self) -> None:
        self.under_way = threading.Event()
        self.last = time.monotonic()

    def __enter__(self) -> None:
        self.under_way.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.last = time.monotonic()
        self.under_way.clear()

    def have_ceased(self) -> bool:
        """TorchServe calls again and again as long as there is a client, so that all have left."""
        return not self.under_way.is_set() and time.monotonic() - self.last > CEASED


class TorchServeSink:
    """Gives figures to TorchServe 0.12, each as a line of the worker's log that it reads."""

    def __init__(self, metrics: Any, model: dict[str, str]) -> None:
        # Only the worker has it; the tests of `Service` need no TorchServe.
        from ts.metrics.metric_type_enum import MetricTypes

        self.kinds = {"counter": MetricTypes.COUNTER, "gauge": MetricTypes.GAUGE}
        self.metrics = metrics
        self.model = model
        self.known: dict[str, Any] = {}

    def __call__(
        self, name: str, kind: Kind, labels: Sequence[str], values: Sequence[str], value: float
    ) -> None:
        if name not in self.known:
            self.known[name] = self.metrics.add_metric_to_cache(
                name, "count", ["model_name", "model_version", *labels], self.kinds[kind]
            )
        dimensions = [self.model["name"], self.model["version"], *values]
        self.known[name].add_or_update(value, dimensions)


def report(
    service: Service, calls: Calls, metrics: Any, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Tell TorchServe what was counted, once in `INTERVAL`, for ever. What cannot be told is told
    later; the log says so once, and again when it can."""
    for name, labels in FROM_START:
        service.metrics.count(name, 0, **labels)
    sink = None
    failing = False
    while True:
        sleep(INTERVAL)
        try:
            sink = sink or TorchServeSink(metrics, service.narrator.model)
            service.metrics.tell(sink, now_told(service, calls))
        except Exception:
            if not failing:
                logger.exception("metrics could not be told; they are counted until they can be")
            failing = True
        else:
            if failing:
                logger.warning("metrics are told again")
            failing = False


def now_told(service: Service, calls: Calls) -> dict[str, float]:
    """The gauges. If the last client left without a word, its request is forgotten at the next
    call only."""
    gauges = service.gauges()
    if calls.have_ceased():
        return dict.fromkeys(gauges, 0.0) | {"row_capacity": gauges["row_capacity"]}
    return gauges
