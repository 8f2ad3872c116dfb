"""Queries of rules, alerts, dashboards and autoscalers, and promtool, which runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_tools import K8S, ROOT

COMPONENTS = K8S / "components"
RULES = COMPONENTS / "monitoring" / "rules.yaml"
CASES = ROOT / "tests" / "prometheus" / "rules.yaml"
DASHBOARD = COMPONENTS / "dashboards" / "seq2serve.json"
SCRAPE_SECONDS = 15
# Labels that a scrape gives to every series of a pod, under Google's PodMonitoring and the
# operator's PodMonitor alike.
TARGET = {"namespace", "pod", "container", "job", "instance"}
GROUPING = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"
WORDS = {"and", "or", "unless", "bool", "offset"}


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"][
        "groups"
    ]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> dict[str, set[str]]:
    """Labels of each recorded series, which its name begins with."""
    return {
        rule["record"]: set(rule["record"].split(":")[0].split("_"))
        for rule in rules()
        if "record" in rule
    }


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def dashboard_queries() -> dict[str, str]:
    """PromQL of each line of each panel, with values for Grafana's variables."""
    return {
        f"{panel['title']}, {target['refId']}": target["expr"]
        .replace("$namespace", "seq2serve")
        .replace("$__rate_interval", "1m")
        for panel in panels()
        for target in panel["targets"]
    }


def autoscaler_queries() -> dict[str, str]:
    scaled = (COMPONENTS / "autoscale-keda-gmp/scaledobject.yaml").read_text(encoding="utf-8")
    keda = list(yaml.safe_load_all(scaled))
    values = yaml.safe_load(
        (COMPONENTS / "autoscale-prometheus-adapter/adapter-values.yaml").read_text()
    )
    found = {f"KEDA, {t['name']}": t["metadata"]["query"] for t in keda[1]["spec"]["triggers"]}
    for one in values["rules"]["external"]:
        found[f"adapter, {one['name']['as']}"] = one["metricsQuery"]
        found[f"adapter, {one['name']['as']}, series"] = one["seriesQuery"]
    return found


def asked(query: str) -> dict[str, set[str]]:
    """Each metric that a query names, with the labels by which it chooses and groups."""
    selectors = re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", query)
    grouped = {
        label.strip() for inner in re.findall(GROUPING, query) for label in inner.split(",")
    } - {""}
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", query)
    bare = re.sub(GROUPING, "", bare)
    names = set(re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:]*\s*\()", bare)) - WORDS
    found: dict[str, set[str]] = {name: set(grouped) for name in names}
    for name, inner in selectors:
        found[name] |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inner))
    return found


def promtool(command: str, path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: install Debian's package prometheus")
    return subprocess.run(
        [program, command, "rules", str(path)], capture_output=True, text=True, check=False
    )


def check(queries: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Whether all are PromQL, each as if it were a rule."""
    rules = [{"record": f"x:{i}", "expr": one} for i, one in enumerate(queries.values())]
    path = folder / "check.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    return promtool("check", path)


def run_cases(
    given: list[dict[str, Any]], cases: list[dict[str, Any]], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Cases of promtool, run with these groups of rules."""
    (folder / "groups.yaml").write_text(yaml.safe_dump({"groups": given}))
    path = folder / "cases.yaml"
    head = {
        "rule_files": ["groups.yaml"],
        "evaluation_interval": f"{SCRAPE_SECONDS}s",
        # Else promtool takes them in any order, another each time.
        "group_eval_order": [group["name"] for group in given],
    }
    path.write_text(yaml.safe_dump({**head, "tests": cases}))
    return promtool("test", path)
