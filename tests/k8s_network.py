"""Rules of ports, networks and gateways: who reaches whom. Each yields what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s_objects import matches, named, selected, title
from k8s_pods import Workload, environment, workloads
from k8s_tools import Document, Documents

MANAGEMENT = "8081"
LOAD_BALANCERS = {"35.191.0.0/16", "130.211.0.0/22"}


def ports(documents: Documents) -> Iterator[str]:
    """Every port that is named is one that the container has."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service" and spec.get("clusterIP") != "None":
            for one in selected(documents, {"matchLabels": spec["selector"]}):
                for port in spec["ports"]:
                    if port["targetPort"] not in port_names(one):
                        yield f"{title(document)}: {one.name} has no port {port['targetPort']}"
                    if port["targetPort"] != "http":
                        yield f"{title(document)}: {port['targetPort']} is not for clients"
        if document["kind"] == "NetworkPolicy":
            for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                for port in rule.get("ports", []):
                    asked = port["port"]
                    for one in selected(documents, spec["podSelector"]):
                        if isinstance(asked, str) and asked not in port_names(one):
                            yield f"{title(document)}: {one.name} has no port {asked}"
        if document["kind"] == "HTTPRoute":
            for backend in (b for rule in spec["rules"] for b in rule["backendRefs"]):
                for service in named(documents, "Service", backend["name"]):
                    if backend["port"] not in [p["port"] for p in service["spec"]["ports"]]:
                        yield f"{title(document)}: {title(service)} has no port {backend['port']}"
        if document["kind"] == "HealthCheckPolicy":
            check = spec["default"]["config"]["httpHealthCheck"]
            for service in named(documents, "Service", spec["targetRef"]["name"]):
                for one in selected(documents, {"matchLabels": service["spec"]["selector"]}):
                    if (
                        port_names(one).get("health") != check["port"]
                        or check["requestPath"] != "/readyz"
                    ):
                        yield f"{title(document)}: asks {check}, which is not readiness"
        if document["kind"] in ("PodMonitoring", "PodMonitor"):
            ends = spec.get("endpoints", spec.get("podMetricsEndpoints", []))
            for one in selected(documents, spec["selector"]):
                for end in ends:
                    if end["port"] not in port_names(one):
                        yield f"{title(document)}: {one.name} has no port {end['port']}"
    for one in workloads(documents):
        if one.server is None:
            continue
        given, names = environment(one.server), port_names(one)
        for name, variable in (
            ("http", "PORT"),
            ("metrics", "METRICS_PORT"),
            ("health", "HEALTH_PORT"),
        ):
            if str(names.get(name)) != given.get(f"SEQ2SERVE_{variable}"):
                yield f"{one.name}: port {name} is not SEQ2SERVE_{variable}"


def port_names(one: Workload) -> dict[str, int]:
    found = [p for c in one.pod["containers"] for p in c.get("ports", [])]
    return {port["name"]: port["containerPort"] for port in found}


def management(documents: Documents) -> Iterator[str]:
    """TorchServe's management port is nowhere: it stays on loopback."""
    for document in documents:
        if document["kind"] != "ConfigMap" and MANAGEMENT in re.findall(r"\d+", str(document)):
            yield f"{title(document)}: has {MANAGEMENT}"


def networks(documents: Documents) -> Iterator[str]:
    """Where anything is admitted, all else is refused; and what has to come in or out may."""
    policies = named(documents, "NetworkPolicy")
    spaces = {d["metadata"]["namespace"] for d in policies}
    for space in spaces:
        mine = [d["spec"] for d in policies if d["metadata"]["namespace"] == space]
        whole = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        if whole not in mine:
            yield f"namespace {space}: nothing refuses what no policy admits"
        if not any(
            p["port"] == 53 for s in mine for e in s.get("egress", []) for p in e.get("ports", [])
        ):
            yield f"namespace {space}: no DNS"
    if not spaces:
        return
    servers = [one for one in workloads(documents) if one.server is not None]
    for one in servers:
        mine = [
            d["spec"]
            for d in policies
            if d["spec"]["podSelector"] and matches(d["spec"]["podSelector"], one.labels)
        ]
        rules = [rule for spec in mine for rule in spec.get("ingress", [])]
        for port in ("http", "health") if named(documents, "Gateway") else ():
            admitted = {
                source["ipBlock"]["cidr"]
                for rule in rules
                if port in [p["port"] for p in rule["ports"]]
                for source in rule["from"]
                if "ipBlock" in source
            }
            if not admitted >= LOAD_BALANCERS or (port == "http" and len(admitted) < 3):
                yield f"{one.name}: load balancers may not reach {port}: {admitted}"
        for port in ("metrics", "health"):
            text = str([rule for rule in rules if port in [p["port"] for p in rule["ports"]]])
            if "'gmp-system'" not in text or "'gke-gmp-system'" not in text:
                yield f"{one.name}: Prometheus may not reach {port}"
        out = [p["port"] for spec in mine for rule in spec.get("egress", []) for p in rule["ports"]]
        if one.pod.get("initContainers") and not {80, 443, 988} <= {*out}:
            yield f"{one.name}: the model cannot be fetched"
        if any(
            "ipBlock" in s and s["ipBlock"]["cidr"] == "0.0.0.0/0" for r in rules for s in r["from"]
        ):
            yield f"{one.name}: open to everybody"


def gateways(documents: Documents) -> Iterator[str]:
    """Behind a Gateway: a health check and timeouts for each Service, weights that add up."""
    for route in named(documents, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            weights = [b["weight"] for b in rule["backendRefs"]]
            if sum(weights) != (100 if len(weights) > 1 else 1):
                yield f"{title(route)}: weights {weights}"
            for match in rule["matches"]:
                if match["path"]["value"] in ("/", "") or "ping" in match["path"]["value"]:
                    yield f"{title(route)}: {match} lets in more than translates"
            for name in (b["name"] for b in rule["backendRefs"]):
                checks = [
                    d
                    for d in named(documents, "HealthCheckPolicy")
                    if d["spec"]["targetRef"]["name"] == name
                ]
                policies = [
                    d
                    for d in named(documents, "GCPBackendPolicy")
                    if d["spec"]["targetRef"]["name"] == name
                ]
                if len(checks) != 1 or len(policies) != 1:
                    yield f"Service {name}: {len(checks)} health checks, {len(policies)} policies"
                for policy in policies:
                    yield from draining(documents, name, policy)


def draining(documents: Documents, service: str, policy: Document) -> Iterator[str]:
    given = policy["spec"]["default"]
    for found in named(documents, "Service", service):
        for one in selected(documents, {"matchLabels": found["spec"]["selector"]}):
            assert one.server is not None
            drain = float(environment(one.server)["SEQ2SERVE_DRAIN_SECONDS"])
            if given["connectionDraining"]["drainingTimeoutSec"] != drain:
                yield f"{title(policy)}: drains {given['connectionDraining']}, {one.name} {drain} s"
    if given.get("timeoutSec", 30) < 300:
        yield f"{title(policy)}: streams are cut after {given.get('timeoutSec', 30)} s"


RULES = (ports, management, networks, gateways)
