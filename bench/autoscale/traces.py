"""The load that is simulated, and the autoscalers that it meets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from bench.autoscale.cluster import Outage, Trace
from bench.autoscale.hpa import Scaler, Target, keda

DAY = 86_400
MINUTE = 60

# (s, requests/s), straight in between.
Points = tuple[tuple[float, float], ...]


def through(points: Points) -> Callable[[float], float]:
    def rate(now: float) -> float:
        for (left, low), (right, high) in itertools.pairwise(points):
            if now < right:
                return low + (high - low) * max(0.0, now - left) / (right - left)
        return points[-1][1]

    return rate


def day(now: float) -> float:
    """From 300 requests/s at 4:00 to 2,200 at 16:00, and a quarter more from 12:00 to 12:15."""
    base = 1250 - 950 * math.cos(2 * math.pi * (now - 4 * 3600) / DAY)
    return base * (1.25 if 12 * 3600 <= now < 12 * 3600 + 900 else 1.0)


def traces() -> tuple[Trace, ...]:
    """The day is a whole one; the others are as long as it takes to see the last pod go. In the
    outage 6 pods have what they need, and nothing is scraped from 10:00 to 30:00."""
    step = ((300.0, 400.0), (300.0, 1800.0), (1800.0, 1800.0), (1800.0, 400.0))
    ramp = ((300.0, 400.0), (1500.0, 2800.0), (2400.0, 2800.0), (3600.0, 400.0))
    return (
        Trace("step", 60 * MINUTE, stepped(step)),
        Trace("ramp", 90 * MINUTE, through(ramp)),
        Trace("day", DAY, day),
        Trace("outage", 60 * MINUTE, lambda _: 1900.0, 6, Outage(10 * MINUTE, 30 * MINUTE)),
    )


def stepped(points: Points) -> Callable[[float], float]:
    def rate(now: float) -> float:
        return [points[0][1], *(high for left, high in points if left <= now)][-1]

    return rate


def peers(bounds: Scaler) -> tuple[Scaler, Scaler]:
    """The two published autoscalers of TorchServe, with the bounds of this project's and with the
    behaviour that Kubernetes has where none is written. Both read ts_queue_latency_microseconds,
    simulated as TorchServe counts it without continuous batching, where it means something.

    pytorch/serve, kubernetes/hpa.yaml and adapter.yaml: External, Value 7000000m, of the counter
    itself: once its pods have waited 7 ms in all, it asks for more, and for ever. (Its API,
    autoscaling/v2beta2, ended with Kubernetes 1.26.)

    GoogleCloudPlatform/kubernetes-engine-samples, T5 with TorchServe, hpa.yaml: Pods, AverageValue
    30000 of what the Stackdriver adapter makes of the counter, a rate over 60 s: 30,000
    microseconds in a second are 0.03 requests that wait, by Little's law.
    """
    least, most = bounds.minimum, bounds.maximum
    return (
        Scaler("pytorch/serve", least, most, (Target("queue", "value", 7000.0),)),
        Scaler("Google's sample", least, most, (Target("queue rate", "pods", 30_000.0),)),
    )


def scalers() -> tuple[Scaler, ...]:
    ours = keda()
    return ours, *peers(ours)
