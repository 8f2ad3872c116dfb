"""Rules of pods: what every pod template keeps to. Each rule yields what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from k8s_tools import Document, Documents

WORKLOADS = {"Deployment", "Job", "StatefulSet", "DaemonSet"}
BURIAL = 5  # seconds after STOP that the supervisor may take to bury what it has killed
SPOT_SECONDS = 15  # what GKE leaves the ordinary pods of a Spot node
UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# What a server takes to load at most (default_startup_timeout of config.properties).
LOADING = 300


@dataclass(frozen=True)
class Workload:
    """A workload with the pod that it makes."""

    document: Document

    @property
    def name(self) -> str:
        return f"{self.document['kind']} {self.document['metadata']['name']}"

    @property
    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["spec"]
        return found

    @property
    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = self.spec["template"]["spec"]
        return found

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.spec["template"]["metadata"]["labels"]
        return found

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    @property
    def server(self) -> dict[str, Any] | None:
        """The container that serves, in workloads that do."""
        return next((c for c in self.pod["containers"] if c["name"] == "server"), None)

    def selects_spot(self) -> bool:
        chosen = self.pod.get("nodeSelector", {})
        return "cloud.google.com/gke-spot" in chosen or "cloud.google.com/compute-class" in chosen


def workloads(documents: Documents) -> list[Workload]:
    return [Workload(one) for one in documents if one["kind"] in WORKLOADS]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container.get("env", [])}


def quantity(value: str | int) -> float:
    """A Kubernetes quantity as a number."""
    found = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(value))
    assert found is not None, value
    return float(found[1]) * UNITS[found[2]]


def restricted(documents: Documents) -> Iterator[str]:
    """Pod Security's profile `restricted`, and a read-only root, for init containers too."""
    for one in workloads(documents):
        pod = one.pod.get("securityContext", {})
        if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser", 0) >= 10001:
            yield f"{one.name}: runAsNonRoot and a numeric runAsUser from 10001"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{one.name}: seccompProfile RuntimeDefault"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if one.pod.get(key):
                yield f"{one.name}: {key}"
        if any("hostPath" in volume for volume in one.pod.get("volumes", [])):
            yield f"{one.name}: hostPath"
        for container in one.containers:
            context = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if context != wanted:
                yield f"{one.name}, {container['name']}: securityContext {context}"


def no_credentials(documents: Documents) -> Iterator[str]:
    """No token of the API, no variables of Services (one would be SEQ2SERVE_PORT)."""
    for one in workloads(documents):
        if one.pod.get("automountServiceAccountToken") is not False:
            yield f"{one.name}: a service account token is mounted"
        if one.pod.get("enableServiceLinks") is not False:
            yield f"{one.name}: enableServiceLinks sets SEQ2SERVE_PORT"
    for document in documents:
        mounts = document.get("automountServiceAccountToken") is not False
        if document["kind"] == "ServiceAccount" and mounts:
            yield f"ServiceAccount {document['metadata']['name']}: mounts a token"


def resources(documents: Documents) -> Iterator[str]:
    """Requests equal limits, of CPU, memory, disk and GPU (Guaranteed; Autopilot wants it)."""
    for one in workloads(documents):
        for container in one.containers:
            given = container.get("resources", {})
            limits, requests = given.get("limits", {}), given.get("requests", {})
            if not {"cpu", "memory", "ephemeral-storage"} <= limits.keys():
                yield f"{one.name}, {container['name']}: limits of {sorted(limits)} alone"
            if limits != requests:
                yield f"{one.name}, {container['name']}: requests {requests}, limits {limits}"


def scratch(documents: Documents) -> Iterator[str]:
    """Every emptyDir has a limit, all fit the disk that the pod asked for, and /tmp can be
    written."""
    for one in workloads(documents):
        total = 0.0
        for volume in one.pod.get("volumes", []):
            if "emptyDir" in volume:
                size = (volume["emptyDir"] or {}).get("sizeLimit")
                if size is None:
                    yield f"{one.name}: emptyDir {volume['name']} without sizeLimit"
                else:
                    total += quantity(size)
        disk = one.pod["containers"][0]["resources"]["limits"].get("ephemeral-storage", 0)
        if total > quantity(disk):
            yield f"{one.name}: emptyDirs of {total:.0f} bytes, ephemeral-storage {disk}"
        for container in one.pod["containers"]:
            mounts = [m["mountPath"] for m in container.get("volumeMounts", [])]
            if container["name"] != "pause" and "/tmp" not in mounts:
                yield f"{one.name}, {container['name']}: /tmp cannot be written"


def shutdown(documents: Documents) -> Iterator[str]:
    """SETTLE + DRAIN + STOP + 5 fit the grace; on Spot nodes the grace fits what GKE leaves."""
    for one in workloads(documents):
        grace = one.pod.get("terminationGracePeriodSeconds", 30)
        if one.selects_spot() and grace > SPOT_SECONDS:
            yield f"{one.name}: a grace of {grace} s on a Spot node, which leaves {SPOT_SECONDS}"
        if one.server is not None:
            given = environment(one.server)
            parts = [given.get(f"SEQ2SERVE_{part}_SECONDS") for part in ("SETTLE", "DRAIN", "STOP")]
            if None in parts:
                yield f"{one.name}: SETTLE, DRAIN and STOP are {parts}"
            elif sum(map(float, filter(None, parts))) + BURIAL > grace:
                yield f"{one.name}: {parts} and {BURIAL} s, in a grace of {grace} s"


def startup(documents: Documents) -> Iterator[str]:
    """What a server may take to load < startup budget < progressDeadlineSeconds."""
    for one in workloads(documents):
        if one.server is None or "startupProbe" not in one.server:
            continue
        probe = one.server["startupProbe"]
        budget = probe["periodSeconds"] * probe["failureThreshold"]
        deadline = one.spec.get("progressDeadlineSeconds", 600)
        if not LOADING < budget < deadline:
            yield f"{one.name}: loading {LOADING} s, startup {budget} s, deadline {deadline} s"


def probes(documents: Documents) -> Iterator[str]:
    """The three of the supervisor: what TorchServe says of its health is not so."""
    for one in workloads(documents):
        if one.server is None:
            continue
        for kind, path in (
            ("startup", "/startupz"),
            ("readiness", "/readyz"),
            ("liveness", "/livez"),
        ):
            probe = one.server.get(f"{kind}Probe", {}).get("httpGet")
            if probe != {"path": path, "port": "health"}:
                yield f"{one.name}: {kind}Probe asks {probe}"


def gpu(documents: Documents) -> Iterator[str]:
    """One GPU: asked for, tolerated, sure to be there, and not done without."""
    for one in workloads(documents):
        counts = [c["resources"]["limits"].get("nvidia.com/gpu") for c in one.containers]
        chosen = one.pod.get("nodeSelector", {})
        placed = {"cloud.google.com/gke-accelerator", "cloud.google.com/compute-class"} & {*chosen}
        if any(counts) != bool(placed):
            yield f"{one.name}: GPUs {counts} on nodes {chosen}"
        if not any(counts):
            continue
        if [count for count in counts if count] != ["1"]:
            yield f"{one.name}: GPUs {counts}: one device for one worker"
        if not tolerates(one, "nvidia.com/gpu"):
            yield f"{one.name}: no toleration of nvidia.com/gpu"
        for container in one.pod["containers"]:
            asked = {"server": "SEQ2SERVE_REQUIRE_GPU", "train": "REQUIRE_GPU"}.get(
                container["name"]
            )
            if asked and environment(container).get(asked) != "true":
                yield f"{one.name}: without {asked} it falls back to the CPU unnoticed"
        sharing = "cloud.google.com/gke-gpu-sharing-strategy" in chosen
        if sharing != ("cloud.google.com/gke-max-shared-clients-per-gpu" in chosen):
            yield f"{one.name}: time-sharing with how many? {chosen}"


def spot(documents: Documents) -> Iterator[str]:
    """Nodes that are tainted are tolerated."""
    for one in workloads(documents):
        if one.selects_spot() and not tolerates(one, "cloud.google.com/gke-spot"):
            yield f"{one.name}: no toleration of cloud.google.com/gke-spot"
        chosen = one.pod.get("nodeSelector", {})
        if "cloud.google.com/compute-class" in chosen and (
            len(chosen.keys() & {"cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"})
            or not tolerates(one, "cloud.google.com/compute-class")
        ):
            yield f"{one.name}: a compute class says which nodes, and its taint is tolerated"


def tolerates(one: Workload, key: str) -> bool:
    return any(each.get("key") == key for each in one.pod.get("tolerations", []))


def model(documents: Documents) -> Iterator[str]:
    """The digest of a model is checked by whoever brings it and whoever serves it."""
    for one in workloads(documents):
        for container in one.pod.get("initContainers", []):
            given = environment(container)
            digest = given.get("SEQ2SERVE_SHA256", "")
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                yield f"{one.name}, {container['name']}: digest {digest!r}"
            if digest not in given.get("SEQ2SERVE_MODEL_URI", ""):
                yield f"{one.name}: {given.get('SEQ2SERVE_MODEL_URI')} is not named by its digest"
            if one.server and environment(one.server).get("SEQ2SERVE_SHA256") != digest:
                yield f"{one.name}: the server expects another digest than is brought"
        if one.server:
            for mount in one.server["volumeMounts"]:
                if mount["mountPath"] == "/models" and not mount.get("readOnly"):
                    yield f"{one.name}: the server could change its model"


def tokens(documents: Documents) -> Iterator[str]:
    """A Secret as a folder of its own, read-only: single files of it would never be renewed."""
    for one in workloads(documents):
        folder = one.server and environment(one.server).get("SEQ2SERVE_TOKENS")
        secrets = {v["name"] for v in one.pod.get("volumes", []) if "secret" in v}
        for container in one.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] in secrets and (
                    mount["mountPath"] != folder or "subPath" in mount or not mount.get("readOnly")
                ):
                    yield f"{one.name}: {mount}"
        if folder and not secrets:
            yield f"{one.name}: SEQ2SERVE_TOKENS names {folder}, which is not mounted"


def jobs(documents: Documents) -> Iterator[str]:
    """A Job outlives preemptions, and its pods find one another."""
    services = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Service"}
    for one in workloads(documents):
        if one.document["kind"] != "Job":
            continue
        rules = one.spec.get("podFailurePolicy", {}).get("rules", [])
        ignored = [r for r in rules if r["action"] == "Ignore" and "onPodConditions" in r]
        if not ignored or ignored[0]["onPodConditions"][0]["type"] != "DisruptionTarget":
            yield f"{one.name}: preemptions count as failures"
        if one.pod.get("restartPolicy") != "Never":
            yield f"{one.name}: podFailurePolicy needs restartPolicy Never"
        if one.spec.get("podReplacementPolicy") != "Failed":
            yield f"{one.name}: two pods could write to one run"
        if not any("persistentVolumeClaim" in v for v in one.pod["volumes"]):
            yield f"{one.name}: nothing outlives the pod"
        nodes = int(environment(one.pod["containers"][0]).get("NODES", "1"))
        if not one.spec["completions"] == one.spec["parallelism"] == nodes:
            yield f"{one.name}: {nodes} nodes, but completions or parallelism of another number"
        if nodes > 1:
            host = environment(one.pod["containers"][0])["RENDEZVOUS"].split(":")[0]
            subdomain = one.pod.get("subdomain")
            if host != f"{one.document['metadata']['name']}-0.{subdomain}":
                yield f"{one.name}: {host} is not its first pod"
            service = services.get(str(subdomain), {"spec": {}})["spec"]
            if service.get("clusterIP") != "None" or not service.get("publishNotReadyAddresses"):
                yield f"{one.name}: no headless Service {subdomain} that names pods at once"
            if one.spec.get("completionMode") != "Indexed":
                yield f"{one.name}: pods without an index"


RULES = (
    restricted,
    no_credentials,
    resources,
    scratch,
    shutdown,
    startup,
    probes,
    gpu,
    spot,
    model,
    tokens,
    jobs,
)
