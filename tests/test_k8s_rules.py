"""Every combination keeps every rule; and each rule refuses what it is there to refuse."""

from __future__ import annotations

from typing import Any

import k8s_network
import k8s_objects
import k8s_pods
import pytest
from k8s_broken import BROKEN, broken
from k8s_objects import for_podman, pinned
from k8s_pods import probes
from k8s_tools import COMBINATIONS, documents

RULES = {
    rule.__name__: rule
    for rule in (*k8s_pods.RULES, *k8s_objects.RULES, *k8s_network.RULES, pinned, for_podman)
}
PODMAN = "overlays/podman"


def applies(rule: str, combination: str) -> bool:
    if rule == pinned.__name__:
        return "production" in combination
    if rule == for_podman.__name__:
        return combination == PODMAN
    return not (rule == probes.__name__ and combination == PODMAN)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_keeps_the_rules(combination: str) -> None:
    built = documents(combination)
    found = [
        f"{name}: {problem}"
        for name, rule in RULES.items()
        if applies(name, combination)
        for problem in rule(built)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "combination", "which", "path", "value"),
    BROKEN,
    ids=[
        f"{rule}-{which}-{path.rsplit('.')[-1]}-{i}"
        for i, (rule, _, which, path, _) in enumerate(BROKEN)
    ],
)
def test_rule_refuses(rule: str, combination: str, which: str, path: str, value: Any) -> None:
    folder = "overlays" if "-gke" in combination or combination == "podman" else "tests"
    built = documents(f"{folder}/{combination}")
    assert not list(RULES[rule](built))
    broken(built, which, path, value)
    assert list(RULES[rule](built))


def test_every_rule_has_something_to_refuse() -> None:
    assert {one[0] for one in BROKEN} == RULES.keys()


def test_an_autoscaler_too_many_is_refused() -> None:
    built = documents("tests/cpu-everything") + [
        one for one in documents("tests/canary") if one["kind"] == "ScaledObject"
    ]
    assert any("2 autoscalers" in problem for problem in RULES["replicas"](built))
