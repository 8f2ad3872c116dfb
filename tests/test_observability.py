"""Rules, alerts and the dashboard: one source, sound queries, alerts that fire when they should."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_pods import environment, workloads
from k8s_tools import K8S, ROOT, documents, kustomize
from observability import (
    CASES,
    SCRAPE_SECONDS,
    alerts,
    asked,
    autoscaler_queries,
    check,
    dashboard_queries,
    groups,
    panels,
    recorded,
    rules,
    run_cases,
)
from test_k8s_build import VALUES, overlay

GMP, OPERATOR = "overlays/production-gke", "tests/mig-prometheus-adapter"
OPERATIONS = ROOT / "docs" / "operations.md"


def one(combination: str, kind: str, name: str = "seq2serve") -> dict[str, Any]:
    found = [
        d for d in documents(combination) if d["kind"] == kind and d["metadata"]["name"] == name
    ]
    assert len(found) == 1, f"{combination}: {len(found)} {kind} {name}"
    return found[0]


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


# One source, two kinds


def test_both_kinds_have_the_same_rules() -> None:
    ours = one(GMP, "Rules")
    theirs = one(OPERATOR, "PrometheusRule")
    assert ours["apiVersion"] == "monitoring.googleapis.com/v1"
    assert theirs["apiVersion"] == "monitoring.coreos.com/v1"
    assert ours["spec"] == theirs["spec"] == {"groups": groups()}


def test_both_scrape_the_same_ports_as_often_and_keep_the_same() -> None:
    ours, theirs = one(GMP, "PodMonitoring")["spec"], one(OPERATOR, "PodMonitor")["spec"]
    assert ours["selector"] == theirs["selector"]
    ends = [
        (end["port"], end.get("path", "/metrics"), end["interval"], end["timeout"],
         end["metricRelabeling"])
        for end in ours["endpoints"]
    ]
    assert ends == [
        (end["port"], end.get("path", "/metrics"), end["interval"], end["scrapeTimeout"],
         end["metricRelabelings"])
        for end in theirs["podMetricsEndpoints"]
    ]
    assert {end[:3] for end in ends} == {
        ("metrics", "/metrics", f"{SCRAPE_SECONDS}s"),
        ("metrics", "/front/metrics", f"{SCRAPE_SECONDS}s"),
        ("health", "/metrics", f"{SCRAPE_SECONDS}s"),
    }
    assert all(seconds(end[3]) <= SCRAPE_SECONDS for end in ends)


@pytest.mark.parametrize("combination", [GMP, "overlays/staging-gke", "tests/canary"])
def test_where_an_autoscaler_asks_prometheus_the_pods_are_scraped(combination: str) -> None:
    assert one(combination, "PodMonitoring")
    assert one(combination, "Rules")


def test_one_cluster_has_one_of_them(tmp_path: Path) -> None:
    place = overlay(tmp_path, ("monitoring-gmp", "monitoring-prometheus-operator"), **VALUES)
    done = kustomize(place)
    assert done.returncode != 0
    assert "already registered id: Rules" in done.stderr


# Queries


def every_query() -> dict[str, str]:
    own: dict[str, str] = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}
    return {**own, **dashboard_queries(), **autoscaler_queries()}


def test_every_query_is_promql(tmp_path: Path) -> None:
    done = check(every_query(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert check({"broken": "sum(rate(x[5m])"}, tmp_path).returncode != 0


def test_every_series_is_chosen_within_the_namespace() -> None:
    """Other servers of the cluster have metrics of the same names. What is recorded has it."""
    for title, query in every_query().items():
        for name, labels in asked(query).items():
            if name not in recorded() and "series" not in title:
                assert f"{name}{{" in query, f"{title}: {name} of every namespace"
                assert "namespace" in labels
    assert asked('sum by (pod) (rate(a_total{b="c"}[5m])) / on (pod) d') == {
        "a_total": {"b", "pod"},
        "d": {"pod"},
    }


def test_windows_hold_four_scrapes() -> None:
    """But for `up` of the autoscalers' guard: as long as a rate over a minute has two scrapes."""
    for title, query in every_query().items():
        for name, window in re.findall(r"(\w+)\{[^}]*\}\[(\w+)\]", query):
            if name == "up":
                assert seconds(window) == 60 - SCRAPE_SECONDS, f"{title}: {window}"
            else:
                assert seconds(window) >= 4 * SCRAPE_SECONDS, f"{title}: {window}"
    windows = [len(re.findall(r"\[\d", query)) for query in every_query().values()]
    found = [len(re.findall(r"\{[^}]*\}\[", query)) for query in every_query().values()]
    assert found == windows


def test_labels_of_what_is_recorded_are_those_that_its_name_says() -> None:
    for rule in rules():
        if "record" in rule:
            grouped = set(re.findall(r"sum by \(([^)]*)\)", rule["expr"]))
            assert {frozenset(g.split(", ")) for g in grouped} == {
                frozenset(recorded()[rule["record"]])
            }


def test_intervals_are_those_of_the_scrapes() -> None:
    assert [seconds(group["interval"]) for group in groups()] == [SCRAPE_SECONDS] * len(groups())


# Thresholds, held to what they follow from


def test_limits_follow_from_the_manifests() -> None:
    (server,) = (w for w in workloads(documents(GMP)) if w.server is not None)
    assert server.server is not None
    given = {k: v for k, v in environment(server.server).items() if k.endswith("_SECONDS")}
    whole = sum(float(given[f"SEQ2SERVE_{part}_SECONDS"]) for part in ("SETTLE", "DRAIN"))
    assert f">= {whole / SCRAPE_SECONDS:g}" in alerts()["Seq2serveDrainOverrun"]["expr"]
    probe = server.server["startupProbe"]
    startup = probe["periodSeconds"] * probe["failureThreshold"]
    assert seconds(alerts()["Seq2serveMetricsMissing"]["for"]) > startup
    rollout = server.spec["progressDeadlineSeconds"]
    assert seconds(alerts()["Seq2serveModelMismatch"]["for"]) > rollout
    answer = one(GMP, "GCPBackendPolicy")["spec"]["default"]["timeoutSec"]
    (window,) = (r["expr"] for r in rules() if "completions" in r.get("record", ""))
    assert f"[{answer // 60}m]" in window
    scaler = one(GMP, "ScaledObject")["spec"]["triggers"][0]["metadata"]
    assert "> 0.9" in alerts()["Seq2serveSaturated"]["expr"]
    assert 1.1 * float(scaler["threshold"]) < 0.9


# Runbooks


def anchors() -> set[str]:
    """Of headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def runbook(section: str) -> str:
    text = OPERATIONS.read_text(encoding="utf-8")
    return text.split(f"### {section}\n")[1].split("\n### ")[0].split("\n## ")[0]


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_has_a_runbook(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["annotations"].keys() == {"summary", "runbook"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    path, anchor = rule["annotations"]["runbook"].split("#")
    assert ROOT / path == OPERATIONS
    assert anchor == alert.lower()
    assert anchor in anchors()
    for part in ("**Means**", "**Look**", "**Do**"):
        assert part in runbook(alert), f"{alert}: no {part}"


def test_no_runbook_is_of_an_alert_that_is_gone() -> None:
    named = re.findall(r"^### (Seq2serve\w+)$", OPERATIONS.read_text(), re.MULTILINE)
    assert named == list(alerts())


# What fires, by promtool

HEALTHY = {
    # A pod at 80 % of its capacity (docs/results.md): 371 requests/s * 15, 23 of 64 rows.
    "up": "1x160",
    "seq2serve_ready": "1x160",
    "seq2serve_draining": "0+0x160",
    "seq2serve_worker_restarts_total": "0+0x160",
    "seq2serve_start_seconds": "6.2x160",
    "seq2serve_pending_requests": "0+0x160",
    'seq2serve_model_info{name="seq2seq",version="1.0",sha256="aa"}': "1x160",
    "seq2seq_row_capacity": "64x160",
    "seq2seq_rows_in_use": "23x160",
    "seq2seq_waiting_sentences": "0+0x160",
    "ts_inference_requests_total": "0+5565x160",
    'seq2seq_requests_total{outcome="ok"}': "0+5500x160",
    'seq2seq_refusals_total{reason="InvalidOption"}': "0+65x160",
}


def healthy() -> dict[str, Any]:
    series = []
    for pod in ("seq2serve-7d9f-a", "seq2serve-7d9f-b"):
        for name, values in HEALTHY.items():
            bare, _, labels = name.removesuffix("}").partition("{")
            place = f'namespace="seq2serve",pod="{pod}"' + (f",{labels}" if labels else "")
            series.append({"series": f"{bare}{{{place}}}", "values": values})
    tests: list[dict[str, Any]] = [
        {"alertname": alert, "eval_time": time, "exp_alerts": []}
        for alert in alerts()
        for time in ("10m", "39m")
    ]
    return {"interval": "15s", "input_series": series, "alert_rule_test": tests}


def cases() -> list[dict[str, Any]]:
    found = yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]
    for test in (t for case in found for t in case.get("alert_rule_test", [])):
        for wanted in test["exp_alerts"]:
            address = alerts()[test["alertname"]]["annotations"]["runbook"]
            wanted["exp_annotations"]["runbook"] = address
    return [*found, healthy()]


def cases_of(name: str) -> list[dict[str, Any]]:
    """Those that say anything of a rule, and only that."""
    found = []
    for case in cases():
        told = [t for t in case.get("alert_rule_test", []) if t["alertname"] == name]
        values = [t for t in case.get("promql_expr_test", []) if t["expr"] == name]
        if told or values:
            found.append({**case, "alert_rule_test": told, "promql_expr_test": values})
    return found


def test_each_fires_when_it_should_and_not_else(tmp_path: Path) -> None:
    done = run_cases(groups(), cases(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cases_have_every_rule_firing_and_not() -> None:
    tests: list[dict[str, Any]] = [t for c in cases() for t in c.get("alert_rule_test", [])]
    for alert in alerts():
        mine = [bool(t["exp_alerts"]) for t in tests if t["alertname"] == alert]
        assert {*mine} == {True, False}, alert
    values = [t["expr"] for case in cases() for t in case.get("promql_expr_test", [])]
    assert {*values} == {*recorded()}


# Rule, what to change and into what; each makes it fire too late, too early, or for others.
BROKEN = [
    ("Seq2serveSaturated", "> 0.9", "> 1.1"),
    ("Seq2serveSaturated", "> 0.9", "> 0.89"),
    ("Seq2serveSaturated", "avg by", "max by"),
    ("Seq2serveSaturated", "5m", "1m"),
    ("Seq2serveRefusing", "> 0.01", "> 0.03"),
    ("Seq2serveRefusing", "> 0.01", "> 0.005"),
    ("Seq2serveRefusing", "5m", "1m"),
    ("Seq2serveUnauthorized", "> 0.1", "> 0.3"),
    ("Seq2serveUnauthorized", "> 0.1", "> 0.05"),
    ("Seq2serveUnauthorized", '{reason="Unauthorized"}', ""),
    ("Seq2serveNoCompletions", "unless namespace_pod:seq2serve_completions:rate5m > 0 ", ""),
    ("Seq2serveNoCompletions", "> 0.9 *", "> 9 *"),
    ("Seq2serveNoCompletions", "> 0.9 *", "> 0.1 *"),
    ("Seq2serveNoCompletions", "> 0.01", "> 2"),
    ("Seq2serveNoCompletions", "> 0.01", ">= 0"),
    ("Seq2serveWorkerRestarts", "> 1.5", "> 1"),
    ("Seq2serveWorkerRestarts", "> 1.5", "> 3"),
    ("Seq2serveContainerRestarts", ">= 2", ">= 1"),
    ("Seq2serveContainerRestarts", ">= 2", ">= 3"),
    ("Seq2serveContainerRestarts", ',reason="CrashLoopBackOff"', ""),
    ("Seq2serveContainerRestarts", "kube_pod_init_container", "kube_pod_other_container"),
    ("Seq2serveContainerRestarts", "5m", "1m"),
    ("Seq2serveDrainOverrun", ">= 5", ">= 4"),
    ("Seq2serveDrainOverrun", ">= 5", ">= 6"),
    ("Seq2serveModelMismatch", ',pod=~"seq2serve-[^-]+-[^-]+"', ""),
    ("Seq2serveModelMismatch", ", sha256", ""),
    ("Seq2serveModelMismatch", "30m", "10m"),
    ("Seq2serveMetricsMissing", "absent(seq2serve_ready", "absent(up"),
    ("Seq2serveMetricsMissing", "or absent(seq2seq", "and absent(seq2seq"),
    ("Seq2serveMetricsMissing", "== 1", "== 2"),
    ("Seq2serveMetricsMissing", "== 1)", ")"),
    ("Seq2serveMetricsMissing", "min by", "max by"),
    ("Seq2serveMetricsMissing", "6m", "5m"),
    ("namespace_pod:seq2serve_saturation:avg1m", "seq2serve_pending_requests", "seq2serve_ready"),
    ("namespace_pod:seq2serve_arrivals:rate5m", '{namespace="seq2serve"}', ""),
    ("namespace_pod:seq2serve_completions:rate5m", ',outcome="ok"', ""),
    ("namespace_pod_reason:seq2serve_refusals:rate5m", ", reason", ""),
    ("namespace:seq2serve_errors:ratio2m", 'code="5xx"', 'code="4xx"'),
]


@pytest.mark.parametrize(("name", "old", "new"), BROKEN)
def test_cases_refuse(name: str, old: str, new: str, tmp_path: Path) -> None:
    changed = copy.deepcopy(groups())
    (rule,) = (
        r for group in changed for r in group["rules"] if name in (r.get("alert"), r.get("record"))
    )
    field = "for" if rule.get("for") == old else "expr"
    assert old in rule[field]
    rule[field] = rule[field].replace(old, new)
    done = run_cases(changed, cases_of(name), tmp_path)
    assert "parse error" not in done.stdout + done.stderr
    assert done.returncode != 0


def test_every_rule_is_broken_once() -> None:
    assert {name for name, *_ in BROKEN} == {*alerts(), *recorded()}


def test_alert_and_autoscaler_measure_the_same(tmp_path: Path) -> None:
    """The sum over pods is what KEDA divides by its threshold."""
    wanted = [{"labels": "{}", "value": 2 * 23 / 64}]
    case = healthy() | {
        "alert_rule_test": [],
        "promql_expr_test": [
            {"expr": query, "eval_time": "10m", "exp_samples": wanted}
            for query in (
                autoscaler_queries()["KEDA, saturation"],
                "sum(namespace_pod:seq2serve_saturation:avg1m)",
            )
        ],
    }
    done = run_cases(groups(), [case], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# The dashboard


def test_the_dashboard_is_what_grafana_imports() -> None:
    built = one(OPERATOR, "ConfigMap", "seq2serve-dashboard")
    assert built["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(built["data"]["seq2serve.json"])
    assert board["uid"] == "seq2serve"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            named = set(re.findall(r"\$\{?([a-z]\w+)", target["expr"] + panel["datasource"]["uid"]))
            assert named == variables
            assert target["datasource"] == panel["datasource"]


def test_panels_do_not_cover_one_another() -> None:
    places: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & places
        assert max(x for x, _ in own) < 24
        places |= own
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_legends_name_labels_that_queries_leave() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            left = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            assert named <= {label for inner in left for label in inner.split(", ")}, target


def test_monitors_select_canaries_too() -> None:
    selector = one("tests/canary", "PodMonitoring")["spec"]["selector"]["matchExpressions"]
    wanted = {"server", "server-canary"}
    assert {*selector[1]["values"]} == wanted
    servers = [w for w in workloads(documents("tests/canary")) if w.server is not None]
    found = {w.labels["app.kubernetes.io/component"] for w in servers}
    assert found == wanted


def test_the_menu_has_both() -> None:
    assert "docs/operations.md" in (K8S / "README.md").read_text(encoding="utf-8")
