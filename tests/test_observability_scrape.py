"""Whatever rules, alerts, dashboard and autoscalers ask for is what a real server exports."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import GUARD_SECONDS, JSON, PREDICT, Toy
from observability import (
    COMPONENTS,
    TARGET,
    asked,
    autoscaler_queries,
    dashboard_queries,
    groups,
    recorded,
    rules,
    run_cases,
)
from test_rest_authorization import FIRST
from test_supervisor import Supervised

from handler.authorization import VARIABLE

# Of Prometheus itself and of kube-state-metrics (its documentation, docs/metrics), with labels.
ELSEWHERE = {
    "up": set[str](),
    "kube_deployment_spec_replicas": {"deployment"},
    "kube_pod_container_status_waiting_reason": {"reason"},
    "kube_pod_init_container_status_waiting_reason": {"reason"},
}
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*?),?\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Scrape:
    """Both ports of a pod."""

    text: str

    @property
    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        return [
            (name, dict(LABEL.findall(labels)), float(value))
            for name, labels, value in SAMPLE.findall(self.text)
        ]

    @property
    def labels(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, labels, _ in self.samples:
            found.setdefault(name, set()).update(labels)
        return found

    @property
    def kinds(self) -> dict[str, str]:
        return dict(re.findall(r"^# TYPE (\S+) (\S+)$", self.text, re.MULTILINE))

    def value(self, name: str, **labels: str) -> float:
        return sum(v for n, own, v in self.samples if n == name and own.items() >= labels.items())


def fetched(address: str, path: str = "/metrics") -> str:
    with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def status(address: str, body: Any, token: str | None = FIRST) -> int:
    headers = JSON | ({"Authorization": f"Bearer {token}"} if token else {})
    with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
        connection.request("POST", PREDICT, json.dumps(body), headers)
        reply = connection.getresponse()
        reply.read()
        return reply.status


HEADERS = JSON | {"Authorization": f"Bearer {FIRST}"}
LONG = {"text": ["9" * 60] * 1024, "beam_size": 32, "min_length": 60}  # some minutes


def stream(address: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """One that would go on for long, of which the first part has come."""
    connection = http.client.HTTPConnection(address, timeout=GUARD_SECONDS)
    connection.request("POST", PREDICT, json.dumps({**LONG, "stream": True}), HEADERS)
    reply = connection.getresponse()
    assert reply.peek(1)
    return connection, reply


def until(look: Callable[[], Scrape], enough: Callable[[Scrape], bool]) -> Scrape:
    deadline = time.monotonic() + GUARD_SECONDS
    while not enough(found := look()):
        assert time.monotonic() < deadline, found.text
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def scrape(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Scrape:
    """After answers, a refusal, a request without a token, a client that left and a worker that
    was killed with a request in it."""
    tokens = tmp_path_factory.mktemp("tokens")
    (tokens / "first").write_text(FIRST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tokens))
        running = Supervised(toy.store, "--settle-seconds", "0", "--drain-seconds", "0")
    with running as one:
        address = one.until_ready()
        metrics = re.search(r"metrics: http://([\w.:]+)", one.lines[-1])
        assert metrics is not None

        def look() -> Scrape:
            front = fetched(metrics[1], "/front/metrics")
            return Scrape(fetched(metrics[1]) + front + one.probe("/metrics")[1])

        assert [
            status(address, {"text": ["12", "345"]}),
            status(address, {"text": "12", "beam_size": 0}),
            status(address, {"text": "12"}, token=None),
        ] == [200, 400, 401]
        connection, reply = stream(address)
        reply.close()
        connection.close()
        assert status(address, {"text": "12"}) == 200
        until(look, lambda s: s.value("seq2seq_cancellations_total") == 1)
        connection, reply = stream(address)
        long = http.client.HTTPConnection(address, timeout=GUARD_SECONDS)
        long.request("POST", PREDICT, json.dumps(LONG), HEADERS)
        until(look, lambda s: s.value("seq2serve_live_requests") == 2)
        for worker in psutil.Process(one.java).children():
            worker.kill()
        lost = long.getresponse()
        # TorchServe says one or the other, by what it was doing at that moment.
        assert lost.status in (500, 507), lost.read()
        for each in (lost, long, reply, connection):
            each.close()
        return until(look, lambda s: s.value("seq2serve_worker_restarts_total") == 1)


def there(scrape: Scrape) -> dict[str, set[str]]:
    return {n: labels | TARGET for n, labels in (scrape.labels | ELSEWHERE | recorded()).items()}


def wanting(queries: dict[str, str], present: dict[str, set[str]]) -> list[str]:
    """What queries ask for that is not there. Labels to group by may be any metric's of a query."""
    found = []
    for title, query in queries.items():
        everything = asked(query)
        known = set().union(*(present.get(name, set()) for name in everything))
        for name, labels in everything.items():
            if name not in present:
                found.append(f"{title}: {name}")
            elif not labels <= known:
                found.append(f"{title}: {name} has no {labels - known}")
    return found


def test_every_metric_and_label_that_is_asked_for_is_there(scrape: Scrape) -> None:
    own: dict[str, str] = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}
    queries = {**own, **dashboard_queries(), **autoscaler_queries()}
    assert not wanting(queries, there(scrape))
    assert wanting({"a": 'rate(seq2seq_requests{outcome="ok"}[5m])'}, there(scrape))
    assert wanting({"a": "sum by (status) (seq2seq_requests_total)"}, there(scrape))
    assert wanting({"a": 'seq2serve_ready{reason="x"}'}, there(scrape))


def test_only_what_is_elsewhere_is_said_to_be(scrape: Scrape) -> None:
    own = [rule["expr"] for rule in rules()]
    every = [*own, *dashboard_queries().values(), *autoscaler_queries().values()]
    assert {name for query in every for name in asked(query)} >= ELSEWHERE.keys()
    assert not ELSEWHERE.keys() & scrape.labels.keys()


def test_what_the_alerts_count_was_counted(scrape: Scrape) -> None:
    """Values of labels are those that queries choose by."""
    assert scrape.value("seq2seq_requests_total", outcome="ok") == 2
    assert scrape.value("seq2seq_refusals_total", reason="Unauthorized") == 1
    assert scrape.value("seq2seq_refusals_total", reason="InvalidOption") == 1
    assert scrape.value("ts_inference_requests_total") == 7
    # Of the worker that was killed.
    assert scrape.value(
        "haproxy_frontend_http_responses_total", proxy="clients", code="5xx"
    ) >= 1
    assert scrape.value("seq2seq_row_capacity") == 64


def test_stackdriver_s_names_are_metrics_of_that_kind(scrape: Scrape) -> None:
    hpa = yaml.safe_load((COMPONENTS / "autoscale-stackdriver/hpa.yaml").read_text())
    names = [one["external"]["metric"]["name"] for one in hpa["spec"]["metrics"]]
    assert len(names) == 4
    for name in names:
        domain, metric, kind = name.split("|")
        assert domain == "prometheus.googleapis.com"
        assert scrape.kinds[metric] == kind


def test_scraping_keeps_what_is_asked_for(scrape: Scrape) -> None:
    monitoring = yaml.safe_load((COMPONENTS / "monitoring-gmp/podmonitoring.yaml").read_text())
    own = [rule["expr"] for rule in rules()]
    every = [*own, *dashboard_queries().values(), *autoscaler_queries().values()]
    names = {name for query in every for name in asked(query)} & scrape.labels.keys()
    for end in monitoring["spec"]["endpoints"]:
        (relabeling,) = end["metricRelabeling"]
        assert relabeling["action"] == "keep"
        kept = re.compile(relabeling["regex"])
        assert all(kept.fullmatch(name) for name in names)
        # One series more for each worker that ever was.
        assert not kept.fullmatch("WorkerLoadTime")


def test_every_panel_shows_something(scrape: Scrape, tmp_path: Path) -> None:
    """Each line, computed from what was scraped as if it had gone on so."""
    place = {"namespace": "seq2serve", "pod": "seq2serve-7d9f-a", "container": "server"}
    series = []
    for name, labels, value in scrape.samples:
        written = ",".join(f'{k}="{v}"' for k, v in {**labels, **place}.items())
        grows = 1 if scrape.kinds.get(name) == "counter" else 0
        series.append({"series": f"{name}{{{written}}}", "values": f"{value:.3f}+{grows}x60"})
    queries = {t: q for t, q in dashboard_queries().items() if not asked(q).keys() & ELSEWHERE}
    assert len(queries) == len(dashboard_queries()) - 1
    queries |= {name: name for name in recorded()}
    wanted = [
        {
            # Restarts are shown where there are some: that a pod can be one of them is enough.
            "expr": f"count({query.removesuffix(' > 0')}) > bool 0",
            "eval_time": "10m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for query in queries.values()
    ]
    case = {"interval": "15s", "input_series": series, "promql_expr_test": wanted}
    done = run_cases(groups(), [case], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    case["promql_expr_test"] = [wanted[0] | {"expr": "count(seq2seq_no_such_total) > bool 0"}]
    assert run_cases(groups(), [case], tmp_path).returncode != 0
