"""Autoscaling: targets are what was measured, metrics exist, queries mean what is said."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_pods import quantity
from k8s_tools import K8S, ROOT, documents

from handler.decoding.cuda_runner import FEWEST_ROWS

SHARE = 0.7  # of the capacity, at which the next pod is asked for
COMPONENTS = K8S / "components"


def objects(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPONENTS / path).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def keda() -> dict[str, Any]:
    found: dict[str, Any] = objects("autoscale-keda-gmp/scaledobject.yaml")[1]["spec"]
    return found


@pytest.fixture(scope="module")
def triggers(keda: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one["metadata"] for one in keda["triggers"]}


def hpa(name: str) -> dict[str, Any]:
    found: dict[str, Any] = objects(f"autoscale-{name}/hpa.yaml")[0]["spec"]
    return found


def targets(name: str) -> dict[str, float]:
    found = [one["external"] for one in hpa(name)["metrics"]]
    return {one["metric"]["name"]: quantity(one["target"]["averageValue"]) for one in found}


def capacity() -> float:
    """Requests/s of one pod, of docs/results.md."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = re.search(r"^\| continuous batching \| ([\d.]+) \|", results, re.MULTILINE)
    assert found is not None
    return float(found[1])


def rows() -> int:
    config = yaml.safe_load((ROOT / "handler" / "model-config.yaml").read_text(encoding="utf-8"))
    return int(config["handler"]["rows"] or FEWEST_ROWS)  # on a CPU


def test_arrivals_are_a_share_of_the_measured_capacity(triggers: dict[str, dict[str, Any]]) -> None:
    wanted = int(SHARE * capacity())
    assert float(triggers["arrivals"]["threshold"]) == wanted
    assert targets("prometheus-adapter")["seq2serve_arrivals"] == wanted
    assert (
        targets("stackdriver")["prometheus.googleapis.com|ts_inference_requests_total|counter"]
        == wanted
    )


def test_saturation_is_the_same_everywhere(triggers: dict[str, dict[str, Any]]) -> None:
    wanted = float(triggers["saturation"]["threshold"])
    assert targets("prometheus-adapter")["seq2serve_saturation"] == wanted
    in_rows = [v for k, v in targets("stackdriver").items() if "requests_total" not in k]
    assert in_rows == [wanted * rows()] * 3


def test_saturation_is_not_reached_by_what_a_pod_can_do_with_ease(
    triggers: dict[str, dict[str, Any]],
) -> None:
    """Little's law: rows in use = requests/s * seconds, of the measurements at 80 and 95 %."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (80|95)% \| ([\d.]+) \| (\d+) / ", results, re.MULTILINE)[:2]
    full = {share: float(rate) * float(ms) / 1000 / rows() for share, rate, ms in found}
    assert full["80"] < float(triggers["saturation"]["threshold"]) < full["95"]


@pytest.mark.parametrize("name", ["stackdriver", "prometheus-adapter", "cpu"])
def test_all_grow_and_shrink_alike(name: str, keda: dict[str, Any]) -> None:
    spec = hpa(name)
    assert spec["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (
        keda["minReplicaCount"],
        keda["maxReplicaCount"],
    )


def test_the_adapter_asks_what_keda_asks(triggers: dict[str, dict[str, Any]]) -> None:
    values = objects("autoscale-prometheus-adapter/adapter-values.yaml")[0]
    asked = {one["name"]["as"]: one["metricsQuery"] for one in values["rules"]["external"]}
    assert asked == {f"seq2serve_{name}": one["query"] for name, one in triggers.items()}
    assert asked.keys() == targets("prometheus-adapter").keys()


def test_every_metric_is_one_that_the_server_exports(triggers: dict[str, dict[str, Any]]) -> None:
    asked = " ".join([*(one["query"] for one in triggers.values()), *targets("stackdriver")])
    names = set(re.findall(r"\b(?:seq2seq|seq2serve|ts)_[a-z_]+\b", asked))
    assert len(names) >= 5
    handler = (ROOT / "handler" / "service.py").read_text(encoding="utf-8")
    server = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "server").glob("*.py"))
    (installed,) = importlib.util.find_spec("ts").submodule_search_locations
    torchserve = Path(installed, "configs", "metrics.yaml")
    for name in names:
        if name.startswith("ts_"):
            assert f"- name: {name}\n" in torchserve.read_text(encoding="utf-8")
            continue
        where = handler if name.startswith("seq2seq_") else server
        assert f'"{name.removeprefix("seq2seq_")}"' in where, name


# Series of three pods, scraped every 15 s, for ten minutes; %s is their part of the labels.
POD = 'namespace="seq2serve",pod="seq2serve-7d9f-%s"'
CANARY = 'namespace="seq2serve",pod="seq2serve-canary-7d9f-x"'


def series(pods: str, **values: str) -> list[dict[str, str]]:
    return [
        {"series": f"{name}{{{POD % pod}}}", "values": value}
        for pod in pods
        for name, value in values.items()
    ]


def ports(pods: str, metrics: str, health: str) -> list[dict[str, str]]:
    """Whether the two ports of each pod are scraped."""
    return [
        {"series": f'up{{{POD % pod},instance="{pod}:{port}"}}', "values": values}
        for pod in pods
        for port, values in (("metrics", metrics), ("health", health))
    ]


BUSY = {
    "up": "1x40",
    "seq2seq_row_capacity": "64x40",
    "seq2seq_rows_in_use": "48x40",
    "seq2seq_waiting_sentences": "8x40",
    "seq2serve_pending_requests": "8x40",
    "ts_inference_requests_total": "0+3000x40",
}


def cut(scrapes: int, then: str) -> list[dict[str, str]]:
    """Three busy pods whose scrapes end: with nothing ("_"), or failing ("0": all that they told
    is stale, and they are not up)."""
    end = "stale" if then == "0" else "_x10"
    found = series("abc", **{k: shortened(v, scrapes) + f" {end}" for k, v in BUSY.items()})
    if then == "0":
        found = [one for one in found if not one["series"].startswith("up")]
        found += ports("abc", f"1x{scrapes - 1} 0+0x5", f"1x{scrapes - 1} 0+0x5")
    return found


def shortened(values: str, scrapes: int) -> str:
    """As many values as that."""
    return f"{values.partition('x')[0]}x{scrapes - 1}"


# Busy pods of which one port has not been scraped since 7:30, and that only the other tells of.
SERVER = [
    one for one in cut(31, "_") if "pending" not in one["series"] and "up{" not in one["series"]
] + series("abc", seq2serve_pending_requests="8x40")
HEALTH = [
    one
    for one in series("abc", **{k: v for k, v in BUSY.items() if k != "up"})
    if "pending" not in one["series"]
]


@pytest.mark.parametrize(
    ("given", "saturation", "arrivals"),
    [
        # Full pods: (48 + 8 + 8) / 64 each; 3,000 in 15 s each.
        (series("abc", **BUSY), 3, 600),
        # One canary's load is nobody's who is autoscaled.
        (
            [
                *series("ab", **BUSY),
                {"series": f"seq2seq_rows_in_use{{{CANARY}}}", "values": "64x40"},
                {"series": f"ts_inference_requests_total{{{CANARY}}}", "values": "0+3000x40"},
            ],
            2,
            400,
        ),
        # Pods that have counted nothing yet: no load. One of them was scraped at last, once.
        (ports("ab", "1x40", "1x40"), 0, 0),
        ([*ports("a", "_x35 1", "_x35 1"), *ports("b", "0+0x40", "1x40")], 0, 0),
        # Asked at 9:01; scrape 36 was due. It is missing, has failed, or the collector has been
        # gone for half a minute, of which a rate knows half a scrape: (15 + 14 + 7.5) / 60.
        (cut(36, "_"), 3, 600),
        (cut(36, "0"), 3, 600),
        (cut(35, "_"), 3, 365),
        # The collector has been gone for a minute and a half: nothing is marked stale, an instant
        # still sees its last samples, ranges are empty.
        (cut(31, "_"), None, None),
        # Of both ports one cannot be scraped for as long, whichever it is.
        ([*SERVER, *ports("abc", "1x30 0+0x10", "1x40")], None, None),
        ([*HEALTH, *ports("abc", "1x40", "1x30 0+0x10")], None, 600),
        # Pods that cannot be scraped, and no pods at all: no answer, which is an error.
        (series("ab", up="0+0x40"), None, None),
        ([], None, None),
    ],
    ids=[
        "busy", "canary", "new", "newest", "missing", "failed", "paused", "collector", "metrics",
        "health", "down", "nothing",
    ],
)
def test_queries_mean_what_is_said(
    given: list[dict[str, str]],
    saturation: float | None,
    arrivals: float | None,
    triggers: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    done = promtool(given, {"saturation": saturation, "arrivals": arrivals}, triggers, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_refuse(triggers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    done = promtool(series("abc", **BUSY), {"saturation": 2}, triggers, tmp_path)
    assert done.returncode != 0


def promtool(
    given: list[dict[str, str]],
    wanted: dict[str, float | None],
    triggers: dict[str, dict[str, Any]],
    folder: Path,
) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: install Debian's package prometheus")
    test = {
        "rule_files": [],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": given,
                "promql_expr_test": [
                    {
                        # No edge of a range meets a scrape: versions differ there.
                        "expr": f"round({triggers[name]['query']}, 1e-6)",
                        "eval_time": "541s",
                        "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
                    }
                    for name, value in wanted.items()
                ],
            }
        ],
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    return subprocess.run(
        [program, "test", "rules", str(path)], capture_output=True, text=True, check=False
    )


def test_a_canary_carries_no_more_than_its_share() -> None:
    """Its weight of all that the autoscaled pods can do is within what one pod can do."""
    built = documents("tests/canary")
    (route,) = (one for one in built if one["kind"] == "HTTPRoute")
    (scaler,) = (one for one in built if one["kind"] == "ScaledObject")
    (canary,) = (
        d for d in built if d["kind"] == "Deployment" and d["metadata"]["name"].endswith("-canary")
    )
    weights = [one["weight"] for one in route["spec"]["rules"][0]["backendRefs"]]
    busiest = scaler["spec"]["maxReplicaCount"] * SHARE * capacity()
    assert busiest * weights[1] / weights[0] <= canary["spec"]["replicas"] * SHARE * capacity()
