"""Rules of objects among one another: references, autoscaling. Each yields what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k8s_pods import Workload, quantity, workloads
from k8s_tools import Document, Documents

# Made by hand, as they are secret; k8s/README.md says how.
BY_HAND = {("Secret", "seq2serve-tokens"), ("Secret", "seq2serve-tls")}
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ComputeClass"}
SCALERS = {"HorizontalPodAutoscaler", "ScaledObject"}


def named(documents: Documents, kind: str, name: str = "") -> list[Document]:
    return [
        d
        for d in documents
        if d["kind"] == kind and d["metadata"]["name"] == (name or d["metadata"]["name"])
    ]


def title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes in a pod with these labels."""
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def selected(documents: Documents, selector: dict[str, Any]) -> list[Workload]:
    return [one for one in workloads(documents) if matches(selector, one.labels)]


def selectors(documents: Documents) -> Iterator[str]:
    """Each takes in the pods of exactly one workload; a NetworkPolicy's, of one at least."""
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        if kind == "Service":
            found = {"selector": {"matchLabels": spec["selector"]}}
        elif kind in ("Deployment", "PodDisruptionBudget", "PodMonitoring", "PodMonitor"):
            found = {"selector": spec["selector"]}
        elif kind == "NetworkPolicy":
            found = {"podSelector": spec["podSelector"]}
        else:
            continue
        for constraint in (
            spec.get("template", {}).get("spec", {}).get("topologySpreadConstraints", [])
        ):
            found[constraint["topologyKey"]] = constraint["labelSelector"]
        for what, selector in found.items():
            count = len(selected(documents, selector))
            several = kind in ("NetworkPolicy", "PodMonitoring", "PodMonitor")
            if count == 0 or (count > 1 and not several):
                yield f"{title(document)}: {what} takes in {count} workloads"
        if kind == "Deployment":
            keys = set(spec["selector"]["matchLabels"])
            if keys != {"app.kubernetes.io/name", "app.kubernetes.io/component"}:
                yield f"{title(document)}: a selector of {keys}, which can never change"
            if not matches(spec["selector"], spec["template"]["metadata"]["labels"]):
                yield f"{title(document)}: does not select its own pods"


def references(documents: Documents) -> Iterator[str]:
    """Whatever is named is there."""
    there = {(d["kind"], d["metadata"]["name"]) for d in documents} | BY_HAND
    for document in documents:
        for kind, name in referred(document):
            if (kind, name) not in there:
                yield f"{title(document)}: names {kind} {name}, which is not there"


def referred(document: Document) -> Iterator[tuple[str, str]]:
    spec = document.get("spec", {})
    if "template" in spec:
        pod = spec["template"]["spec"]
        yield "ServiceAccount", pod.get("serviceAccountName", "default")
        if "priorityClassName" in pod:
            yield "PriorityClass", pod["priorityClassName"]
        volumes = pod.get("volumes", [])
        for volume in volumes:
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"]
            if "secret" in volume:
                yield "Secret", volume["secret"]["secretName"]
            if "persistentVolumeClaim" in volume:
                yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        names = {volume["name"] for volume in volumes}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names:
                    yield "volume", mount["name"]
        if "cloud.google.com/compute-class" in pod.get("nodeSelector", {}):
            yield "ComputeClass", pod["nodeSelector"]["cloud.google.com/compute-class"]
    if "scaleTargetRef" in spec:
        yield spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]
    for trigger in spec.get("triggers", []):
        yield "TriggerAuthentication", trigger["authenticationRef"]["name"]
    if "targetRef" in spec:
        yield spec["targetRef"]["kind"], spec["targetRef"]["name"]
    for parent in spec.get("parentRefs", []):
        yield "Gateway", parent["name"]
    for listener in spec.get("listeners", []):
        for certificate in listener["tls"]["certificateRefs"]:
            yield "Secret", certificate["name"]
    if document["kind"] == "HTTPRoute":
        for rule in spec["rules"]:
            for backend in rule["backendRefs"]:
                yield "Service", backend["name"]


def namespaces(documents: Documents) -> Iterator[str]:
    """Everything is in a namespace that is there, with Pod Security's profile `restricted`."""
    there = {d["metadata"]["name"]: d for d in named(documents, "Namespace")}
    for document in documents:
        if (
            document["kind"] not in CLUSTER_WIDE
            and document["metadata"].get("namespace") not in there
        ):
            yield f"{title(document)}: in namespace {document['metadata'].get('namespace')}"
    for name, space in there.items():
        if space["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"Namespace {name}: Pod Security is not `restricted`"


def replicas(documents: Documents) -> Iterator[str]:
    """Whoever is autoscaled, by one autoscaler, has no number of its own; all others have one."""
    scalers = [d for d in documents if d["kind"] in SCALERS]
    owned = [d["spec"]["scaleTargetRef"]["name"] for d in scalers]
    if len(owned) > 1:
        yield f"{len(owned)} autoscalers: {[title(d) for d in scalers]}"
    for document in named(documents, "Deployment"):
        if (document["metadata"]["name"] in owned) == ("replicas" in document["spec"]):
            yield f"{title(document)}: replicas {document['spec'].get('replicas')}"


def bounds(documents: Documents) -> Iterator[str]:
    """1 <= least <= most; growth and shrinking slow enough for pods that take time."""
    for document in documents:
        if document["kind"] not in SCALERS:
            continue
        spec, keda = document["spec"], document["kind"] == "ScaledObject"
        least, most = (spec[f"{one}Replica{'Count' if keda else 's'}"] for one in ("min", "max"))
        if not 1 <= least <= most or spec.get("idleReplicaCount") is not None:
            yield f"{title(document)}: from {least} to {most}; a Service holds nothing back"
        behavior = (
            spec["advanced"]["horizontalPodAutoscalerConfig"].get("behavior", {})
            if keda
            else spec.get("behavior", {})
        )
        for policy in behavior.get("scaleUp", {}).get("policies", [{"type": "none"}]):
            limit = {"Percent": 100, "Pods": 4}.get(policy["type"], 0)
            if policy.get("value", 1) > limit or policy.get("periodSeconds", 0) < 60:
                yield f"{title(document)}: grows by {policy}"
        down = behavior.get("scaleDown", {})
        if down.get("policies") != [{"type": "Pods", "value": 1, "periodSeconds": 120}]:
            yield f"{title(document)}: shrinks by {down.get('policies')}"
        if down.get("stabilizationWindowSeconds", 0) < 300:
            yield f"{title(document)}: shrinks at once"
        if keda:
            fallback = spec.get("fallback", {})
            if not least <= fallback.get("replicas", 0) <= most:
                yield f"{title(document)}: fallback {fallback}"
            if fallback.get("behavior") != "currentReplicasIfHigher":
                yield f"{title(document)}: a blind autoscaler could scale in"


# Of pods whose every port was scraped: longer than a rate has its two scrapes it must not hold.
GUARD = r"or 0 \* sum\(min by \(pod\) \(last_over_time\(up\{[^}]*\}\[45s\]\)\) == 1\)$"


def queries(documents: Documents) -> Iterator[str]:
    """A loss of metrics is an error, not an absence of load; two signals at least."""
    for document in named(documents, "ScaledObject"):
        triggers = document["spec"]["triggers"]
        if len(triggers) < 2:
            yield f"{title(document)}: one signal"
        for trigger in triggers:
            given = trigger["metadata"]
            if given.get("ignoreNullValues") != "false":
                yield f"{title(document)}, {trigger['name']}: nothing is read as 0"
            if trigger.get("metricType") != "AverageValue":
                yield f"{title(document)}, {trigger['name']}: fallback needs AverageValue"
            if not re.search(GUARD, given["query"]):
                yield f"{title(document)}, {trigger['name']}: no guard"
            if "vector(0)" in given["query"] or "PROJECT" in given["serverAddress"]:
                yield f"{title(document)}, {trigger['name']}: {given}"
    for document in named(documents, "HorizontalPodAutoscaler"):
        types = {m["type"] for m in document["spec"]["metrics"]}
        if len(document["spec"]["metrics"]) < 2 and types != {"ContainerResource"}:
            yield f"{title(document)}: one signal"


def evictions(documents: Documents) -> Iterator[str]:
    """Every budget leaves an eviction possible, at the least number of pods."""
    for document in named(documents, "PodDisruptionBudget"):
        spec = document["spec"]
        least = min(
            (least_pods(documents, one) for one in selected(documents, spec["selector"])), default=0
        )
        if spec.get("maxUnavailable") == 0 or (
            "minAvailable" in spec and spec["minAvailable"] >= least
        ):
            yield f"{title(document)}: no pod of {least} can be evicted"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{title(document)}: a broken pod holds up its node"


def least_pods(documents: Documents, one: Workload) -> int:
    for document in documents:
        if (
            document["kind"] in SCALERS
            and document["spec"]["scaleTargetRef"]["name"] == one.document["metadata"]["name"]
        ):
            spec = document["spec"]
            return int(spec.get("minReplicas", spec.get("minReplicaCount", 1)))
    return int(one.spec.get("replicas", 1))


def balloons(documents: Documents) -> Iterator[str]:
    """A balloon holds the room of a server, on the same nodes, and gives way."""
    servers = [
        one
        for one in workloads(documents)
        if one.labels.get("app.kubernetes.io/component") == "server"
    ]
    for one in workloads(documents):
        if one.labels.get("app.kubernetes.io/component") != "balloon":
            continue
        server = servers[0]
        assert server.server is not None
        if one.pod["containers"][0]["resources"] != server.server["resources"]:
            yield f"{one.name}: other resources than {server.name}"
        for key in ("nodeSelector", "tolerations"):
            if one.pod.get(key) != server.pod.get(key):
                yield f"{one.name}: another {key} than {server.name}"
        for level in named(documents, "PriorityClass", one.pod["priorityClassName"]):
            if not -10 <= level["value"] < 0 or level.get("globalDefault"):
                yield f"{title(level)}: {level['value']}"


def disk_of_claims(documents: Documents) -> Iterator[str]:
    """Several pods write to a claim only where its mode allows it."""
    for one in workloads(documents):
        for volume in one.pod.get("volumes", []):
            if "persistentVolumeClaim" not in volume:
                continue
            for claim in named(
                documents, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
            ):
                many = one.spec.get("parallelism", one.spec.get("replicas", 1)) > 1
                if many and claim["spec"]["accessModes"] != ["ReadWriteMany"]:
                    yield f"{one.name}: several pods, {title(claim)} {claim['spec']['accessModes']}"
                if quantity(claim["spec"]["resources"]["requests"]["storage"]) <= 0:
                    yield f"{title(claim)}: no room"


def pinned(documents: Documents) -> Iterator[str]:
    """Images by digest: for production."""
    for one in workloads(documents):
        for container in one.containers:
            if not re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
                yield f"{one.name}, {container['name']}: {container['image']}"


def for_podman(documents: Documents) -> Iterator[str]:
    """What podman 4.3 can play."""
    for one in workloads(documents):
        if one.spec.get("replicas") != 1:
            yield f"{one.name}: more than one"
        if one.pod.get("initContainers") or any("secret" in v for v in one.pod["volumes"]):
            yield f"{one.name}: init containers and Secrets"
        for container in one.containers:
            for kind in ("liveness", "readiness", "startup"):
                probe = container.get(f"{kind}Probe")
                if probe and ("exec" not in probe or kind != "liveness"):
                    yield f"{one.name}: {kind}Probe {probe}"
            if "livenessProbe" not in container:
                yield f"{one.name}: no livenessProbe"
            if not any("hostPort" in port for port in container["ports"]):
                yield f"{one.name}: nobody can reach it"
            for port in container["ports"]:
                if "hostPort" in port and port.get("hostIP") != "127.0.0.1":
                    yield f"{one.name}: open to the network"


RULES = (
    selectors,
    references,
    namespaces,
    replicas,
    bounds,
    queries,
    evictions,
    balloons,
    disk_of_claims,
)
