"""Brings what the service counts to TorchServe's Prometheus endpoint, from a thread of its own."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from handler.metrics import FROM_START, INTERVAL, Kind
from handler.service import Service

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


def report(service: Service, calls: Calls, metrics: Any) -> None:
    """Tell TorchServe what was counted, once in `INTERVAL`, for ever."""
    sink = TorchServeSink(metrics, service.narrator.model)
    for name, labels in FROM_START:
        service.metrics.count(name, 0, **labels)
    while True:
        time.sleep(INTERVAL)
        gauges = service.gauges()
        if calls.have_ceased():
            # The last client left without a word, and its request is forgotten at the next call.
            gauges = dict.fromkeys(gauges, 0.0) | {"row_capacity": gauges["row_capacity"]}
        service.metrics.tell(sink, gauges)
