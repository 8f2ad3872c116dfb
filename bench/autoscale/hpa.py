"""Kubernetes' arithmetic: how many pods a HorizontalPodAutoscaler wants, and how fast.

As in kubernetes/pkg/controller/podautoscaler (horizontal.go, replica_calculator.go; 1.31 and
later), and KEDA's fallback (pkg/fallback, 2.18 and later: before, thresholds were whole numbers).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bench.autoscale.pod import ROOT
from bench.autoscale.prometheus import SEEN

MANIFEST = ROOT / "k8s" / "components" / "autoscale-keda-gmp" / "scaledobject.yaml"
SYNC = 15.0  # s, --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance

Answer = float | Sequence[float | None] | None  # a sum; or one of each pod; or an error


@dataclass(frozen=True)
class Policy:
    """At most so many pods, or so many percent of them, within `period` s."""

    kind: Literal["Pods", "Percent"]
    value: int
    period: float


@dataclass(frozen=True)
class Behavior:
    """Of one direction. window: s, of which the most cautious recommendation counts; widest:
    whether the policy that allows most decides, or the one that allows least."""

    window: float
    policies: tuple[Policy, ...]
    widest: bool = True


# What holds where a manifest says nothing.
UP = Behavior(0.0, (Policy("Pods", 4, 15.0), Policy("Percent", 100, 15.0)))
DOWN = Behavior(300.0, (Policy("Percent", 100, 15.0),))


@dataclass(frozen=True)
class Target:
    """A metric and what it should be. sum: External, AverageValue, the sum over all pods against
    `value` for each; value: External, Value, against `value` whatever the pods; pods: the mean of
    what each pod says."""

    name: str
    kind: Literal["sum", "value", "pods"]
    value: float


@dataclass(frozen=True)
class Fallback:
    """KEDA's, with behavior currentReplicasIfHigher: from failure `failures` + 1 on."""

    failures: int
    replicas: int


@dataclass(frozen=True)
class Scaler:
    """What a manifest says. window: s, of its queries' ranges."""

    name: str
    minimum: int
    maximum: int
    targets: tuple[Target, ...]
    up: Behavior = UP
    down: Behavior = DOWN
    fallback: Fallback | None = None
    window: float = 60.0


def keda(path: Path = MANIFEST) -> Scaler:
    """The ScaledObject of a file.

    Raises:
        ValueError: no ScaledObject, or one that this module does not know how to follow.
    """
    found = [
        one for one in yaml.safe_load_all(path.read_text("utf-8")) if one["kind"] == "ScaledObject"
    ]
    if len(found) != 1:
        raise ValueError(f"{path}: got {len(found)} ScaledObjects; allowed: 1")
    spec = found[0]["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    fallback = spec["fallback"]
    triggers = {one["name"]: one for one in spec["triggers"]}
    queries = [one["metadata"]["query"] for one in triggers.values()]
    windows = {part.split("]")[0] for query in queries for part in query.split("[")[1:]}
    windows -= {"^-"}  # of a regular expression
    if (
        fallback["behavior"] != "currentReplicasIfHigher"
        or triggers.keys() != {"saturation", "arrivals"}
        or {one["metricType"] for one in triggers.values()} != {"AverageValue"}
        or windows != {"1m", f"{SEEN:g}s"}
        or spec["pollingInterval"] != SYNC
    ):
        raise ValueError(
            f"{path}: the simulation knows the triggers saturation and arrivals, AverageValue, "
            f"ranges of 1m and {SEEN:g}s, polled each {SYNC:g} s, fallback "
            "currentReplicasIfHigher; got "
            f"{sorted(triggers)}, ranges {sorted(windows)}, {spec['pollingInterval']} s, "
            f"{fallback['behavior']}: bring bench/autoscale in line with it"
        )
    return Scaler(
        name="this project",
        minimum=spec["minReplicaCount"],
        maximum=spec["maxReplicaCount"],
        targets=tuple(
            Target(name, "sum", float(one["metadata"]["threshold"]))
            for name, one in triggers.items()
        ),
        up=_behavior(behavior["scaleUp"]),
        down=_behavior(behavior["scaleDown"]),
        fallback=Fallback(fallback["failureThreshold"], fallback["replicas"]),
    )


def _behavior(spec: Mapping[str, Any]) -> Behavior:
    chosen = spec.get("selectPolicy", "Max")
    if chosen not in ("Max", "Min"):
        raise ValueError(f"selectPolicy: got {chosen!r}; allowed: 'Max', 'Min'")
    policies = tuple(
        Policy(one["type"], one["value"], float(one["periodSeconds"])) for one in spec["policies"]
    )
    return Behavior(float(spec["stabilizationWindowSeconds"]), policies, chosen == "Max")


class Controller:
    """Asks every `SYNC` s, and remembers what it recommended and did."""

    def __init__(self, scaler: Scaler) -> None:
        self.scaler = scaler
        self._recommended: list[tuple[float, int]] = []
        self._changed: list[tuple[float, int]] = []  # s, pods more or fewer
        self._failures = dict.fromkeys((one.name for one in scaler.targets), 0)

    def decide(
        self, now: float, current: int, ready: int, answers: Mapping[str, Answer]
    ) -> int:
        """Pods from now on.

        Args:
            current: that are wanted so far.
            ready: of them that serve.
            answers: to each target's query.
        """
        wanted = self._wanted(current, ready, answers)
        if current < self.scaler.minimum:
            return self.scaler.minimum
        if wanted is None:
            return current
        replicas = self._limited(now, current, self._stabilised(now, current, wanted))
        if replicas != current:
            self._changed.append((now, replicas - current))
        return replicas

    def _wanted(self, current: int, ready: int, answers: Mapping[str, Answer]) -> int | None:
        """The most that a metric asks for; None where an error forbids to change anything."""
        asked = [
            desired(one, current, ready, self._or_fallback(one, current, answers[one.name]))
            for one in self.scaler.targets
        ]
        known = [one for one in asked if one is not None]
        if not known or (len(known) < len(asked) and max(known) < current):
            return None
        return max(known)

    def _or_fallback(self, target: Target, current: int, answer: Answer) -> Answer:
        self._failures[target.name] = 0 if answer is not None else self._failures[target.name] + 1
        fallback = self.scaler.fallback
        if fallback is None or self._failures[target.name] <= fallback.failures:
            return answer
        return target.value * max(current, fallback.replicas)

    def _stabilised(self, now: float, current: int, wanted: int) -> int:
        up, down = self.scaler.up.window, self.scaler.down.window
        if not self._recommended:
            self._recommended.append((now, current))
        lowest = min([wanted, *(n for t, n in self._recommended if t > now - up)])
        highest = max([wanted, *(n for t, n in self._recommended if t > now - down)])
        self._recommended = [(t, n) for t, n in self._recommended if t > now - max(up, down)]
        self._recommended.append((now, wanted))
        return min(max(current, lowest), highest)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        scaler = self.scaler
        if wanted > current:
            most = self._reach(now, current, scaler.up, 1)
            return min(wanted, scaler.maximum, max(most, current))
        if wanted < current:
            least = self._reach(now, current, scaler.down, -1)
            return max(wanted, scaler.minimum, min(least, current))
        return current

    def _reach(self, now: float, current: int, behavior: Behavior, sign: int) -> int:
        """Where policies let the number of pods go, from what it was when their period began."""
        found = []
        for policy in behavior.policies:
            before = current - sum(n for t, n in self._changed if t > now - policy.period)
            if policy.kind == "Pods":
                found.append(before + sign * policy.value)
            else:
                share = before * (1 + sign * policy.value / 100)
                found.append(math.ceil(share) if sign > 0 else math.floor(share))
        return max(found) if behavior.widest == (sign > 0) else min(found)


def desired(target: Target, current: int, ready: int, answer: Answer) -> int | None:
    """Pods that one metric asks for, before bounds and behaviour; None for an error."""
    if answer is None:
        return None
    if isinstance(answer, Sequence):
        return _of_pods(target, current, list(answer))
    if target.kind == "sum":
        ratio = answer / (target.value * current)
        return current if _tolerated(ratio) else math.ceil(answer / target.value)
    ratio = answer / target.value
    return current if _tolerated(ratio) else math.ceil(ratio * ready)


def _of_pods(target: Target, current: int, values: list[float | None]) -> int | None:
    """`values` of each pod; None of one that says nothing yet, which counts against the change: as
    0 where the others ask for more pods, as the target where they ask for fewer."""
    known = [one for one in values if one is not None]
    if not known:
        return None
    ratio = sum(known) / len(known) / target.value
    missing = len(values) - len(known)
    if missing:
        first = ratio
        known += [target.value if ratio < 1 else 0.0] * missing
        ratio = sum(known) / len(known) / target.value
        if (first < 1) != (ratio < 1):
            return current
    if _tolerated(ratio):
        return current
    asked = math.ceil(ratio * len(known))
    if missing and (asked > current if ratio < 1 else asked < current):
        return current
    return asked


def _tolerated(ratio: float) -> bool:
    return abs(ratio - 1) <= TOLERANCE
