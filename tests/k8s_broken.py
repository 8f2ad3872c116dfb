"""Manifests that break a rule: for each rule, what it is there to refuse."""

from __future__ import annotations

from typing import Any

from k8s_tools import Documents

DELETE = object()
POD = "spec.template.spec"
SERVER = f"{POD}.containers.0"
SETTLE = "SEQ2SERVE_SETTLE_SECONDS"

# Rule, combination, Kind/name, path (an environment variable as $NAME) and value, a function
# of the old one where it is callable.
BROKEN: list[tuple[str, str, str, str, Any]] = [
    # Pods
    ("restricted", "canary", "Deployment/seq2serve", f"{POD}.securityContext.runAsNonRoot", DELETE),
    ("restricted", "canary", "Deployment/seq2serve", f"{POD}.securityContext.runAsUser", 1000),
    (
        "restricted",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.securityContext.seccompProfile",
        DELETE,
    ),
    ("restricted", "canary", "Deployment/seq2serve", f"{POD}.hostNetwork", True),
    (
        "restricted",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.initContainers.0.securityContext",
        DELETE,
    ),
    (
        "restricted",
        "canary",
        "Deployment/seq2serve-balloon",
        f"{SERVER}.securityContext.readOnlyRootFilesystem",
        False,
    ),
    (
        "restricted",
        "canary",
        "Deployment/seq2serve-canary",
        f"{SERVER}.securityContext.capabilities.add",
        ["NET_ADMIN"],
    ),
    (
        "restricted",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.volumes.0",
        {"name": "fetch", "hostPath": {"path": "/"}},
    ),
    (
        "no_credentials",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.automountServiceAccountToken",
        DELETE,
    ),
    ("no_credentials", "canary", "Deployment/seq2serve", f"{POD}.enableServiceLinks", DELETE),
    ("no_credentials", "canary", "ServiceAccount/seq2serve", "automountServiceAccountToken", True),
    ("resources", "canary", "Deployment/seq2serve", f"{SERVER}.resources.requests.cpu", "1"),
    ("resources", "canary", "Deployment/seq2serve", f"{POD}.initContainers.0.resources", DELETE),
    (
        "resources",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.resources.requests.nvidia\\.com/gpu",
        DELETE,
    ),
    (
        "scratch",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.volumes",
        lambda old: [{"name": "tmp", "emptyDir": {}}],
    ),
    (
        "scratch",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.volumes",
        lambda old: [{"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}],
    ),
    (
        "scratch",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.volumeMounts",
        lambda old: [m for m in old if m["mountPath"] != "/tmp"],
    ),
    (
        "shutdown",
        "production-gke",
        "Deployment/seq2serve",
        f"{POD}.terminationGracePeriodSeconds",
        89,
    ),
    ("shutdown", "canary", "Deployment/seq2serve", f"${SETTLE}", "15"),
    ("shutdown", "canary", "Deployment/seq2serve", f"{POD}.terminationGracePeriodSeconds", 90),
    (
        "shutdown",
        "compute-class-stackdriver",
        "Deployment/seq2serve",
        f"{POD}.terminationGracePeriodSeconds",
        90,
    ),
    ("shutdown", "training-job", "Job/train", f"{POD}.terminationGracePeriodSeconds", 60),
    ("startup", "canary", "Deployment/seq2serve", f"{SERVER}.startupProbe.failureThreshold", 60),
    ("startup", "canary", "Deployment/seq2serve", "spec.progressDeadlineSeconds", 300),
    (
        "probes",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.readinessProbe.httpGet",
        {"path": "/ping", "port": "http"},
    ),
    ("probes", "canary", "Deployment/seq2serve-canary", f"{SERVER}.startupProbe", DELETE),
    ("gpu", "canary", "Deployment/seq2serve", "$SEQ2SERVE_REQUIRE_GPU", "false"),
    ("gpu", "canary", "Deployment/seq2serve", f"{POD}.tolerations", []),
    (
        "gpu",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.nodeSelector.cloud\\.google\\.com/gke-accelerator",
        DELETE,
    ),
    ("gpu", "canary", "Deployment/seq2serve", f"{SERVER}.resources.limits.nvidia\\.com/gpu", "2"),
    (
        "gpu",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.resources.limits.nvidia\\.com/gpu",
        DELETE,
    ),
    (
        "gpu",
        "staging-gke",
        "Deployment/seq2serve",
        f"{POD}.nodeSelector.cloud\\.google\\.com/gke-max-shared-clients-per-gpu",
        DELETE,
    ),
    ("spot", "canary", "Deployment/seq2serve", f"{POD}.tolerations", lambda old: old[:1]),
    (
        "spot",
        "compute-class-stackdriver",
        "Deployment/seq2serve",
        f"{POD}.nodeSelector.cloud\\.google\\.com/gke-spot",
        "true",
    ),
    ("model", "canary", "Deployment/seq2serve", "$SEQ2SERVE_SHA256", "1" * 64),
    ("model", "canary", "Deployment/seq2serve", f"{POD}.initContainers.0.env", []),
    (
        "model",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.volumeMounts",
        lambda old: [*old, {"name": "models", "mountPath": "/models"}],
    ),
    ("tokens", "canary", "Deployment/seq2serve", "$SEQ2SERVE_TOKENS", "/elsewhere"),
    (
        "tokens",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.volumeMounts",
        lambda old: [m | ({"subPath": "one"} if m["name"] == "tokens" else {}) for m in old],
    ),
    ("jobs", "training-job", "Job/train", "spec.podFailurePolicy", DELETE),
    ("jobs", "training-job", "Job/train", "spec.podReplacementPolicy", "TerminatingOrFailed"),
    ("jobs", "training-job", "Job/train", f"{POD}.restartPolicy", "OnFailure"),
    (
        "jobs",
        "training-job",
        "Job/train",
        f"{POD}.volumes",
        lambda old: [{"name": "runs", "emptyDir": {"sizeLimit": "1Gi"}}],
    ),
    ("jobs", "training-indexed-job", "Job/train", "spec.parallelism", 3),
    ("jobs", "training-indexed-job", "Job/train", "spec.completionMode", DELETE),
    ("jobs", "training-indexed-job", "Job/train", "$RENDEZVOUS", "train-1.training:29500"),
    ("jobs", "training-indexed-job", "Service/training", "spec.clusterIP", DELETE),
    # Objects
    (
        "selectors",
        "canary",
        "Service/seq2serve",
        "spec.selector",
        {"app.kubernetes.io/name": "seq2serve"},
    ),
    (
        "selectors",
        "canary",
        "Service/seq2serve-canary",
        "spec.selector.app\\.kubernetes\\.io/component",
        "canary",
    ),
    (
        "selectors",
        "canary",
        "NetworkPolicy/seq2serve",
        "spec.podSelector",
        {"matchLabels": {"app": "seq2serve"}},
    ),
    ("selectors", "canary", "PodDisruptionBudget/seq2serve", "spec.selector.matchLabels", {}),
    (
        "selectors",
        "canary",
        "Deployment/seq2serve",
        f"{POD}.topologySpreadConstraints.0.labelSelector",
        {"matchLabels": {"app": "seq2serve"}},
    ),
    (
        "selectors",
        "canary",
        "Deployment/seq2serve",
        "spec.selector.matchLabels.app\\.kubernetes\\.io/part-of",
        "seq2serve",
    ),
    ("references", "canary", "Deployment/seq2serve", f"{POD}.serviceAccountName", "server"),
    ("references", "canary", "ConfigMap/seq2serve-fetch*", "metadata.name", "seq2serve-fetch"),
    (
        "references",
        "canary",
        "Deployment/seq2serve",
        f"{SERVER}.volumeMounts",
        lambda old: [*old, {"name": "cache", "mountPath": "/cache"}],
    ),
    ("references", "canary", "ScaledObject/seq2serve", "spec.scaleTargetRef.name", "server"),
    (
        "references",
        "canary",
        "ScaledObject/seq2serve",
        "spec.triggers.0.authenticationRef.name",
        "gmp",
    ),
    ("references", "canary", "HTTPRoute/seq2serve", "spec.parentRefs.0.name", "gateway"),
    ("references", "canary", "HealthCheckPolicy/seq2serve", "spec.targetRef.name", "server"),
    (
        "references",
        "canary",
        "Gateway/seq2serve",
        "spec.listeners.0.tls.certificateRefs.0.name",
        "tls",
    ),
    ("references", "training-job", "PersistentVolumeClaim/runs", "metadata.name", "run"),
    ("references", "compute-class-stackdriver", "ComputeClass/seq2serve", "metadata.name", "l4"),
    ("namespaces", "canary", "Service/seq2serve", "metadata.namespace", "default"),
    (
        "namespaces",
        "canary",
        "Namespace/seq2serve",
        "metadata.labels.pod-security\\.kubernetes\\.io/enforce",
        "baseline",
    ),
    ("ports", "canary", "Service/seq2serve", "spec.ports.0.targetPort", "https"),
    ("ports", "canary", "Service/seq2serve", "spec.ports.0.targetPort", "metrics"),
    ("ports", "canary", "NetworkPolicy/seq2serve", "spec.ingress.1.ports.0.port", "probes"),
    ("ports", "canary", "HTTPRoute/seq2serve", "spec.rules.0.backendRefs.0.port", 80),
    (
        "ports",
        "canary",
        "HealthCheckPolicy/seq2serve",
        "spec.default.config.httpHealthCheck.requestPath",
        "/ping",
    ),
    ("ports", "canary", "Deployment/seq2serve", "$SEQ2SERVE_HEALTH_PORT", "9083"),
    ("management", "canary", "Service/seq2serve", "spec.ports.0.port", 8081),
    ("management", "canary", "NetworkPolicy/seq2serve", "spec.ingress.0.ports.0.port", 8081),
    ("replicas", "canary", "Deployment/seq2serve", "spec.replicas", 3),
    ("replicas", "canary", "Deployment/seq2serve-canary", "spec.replicas", DELETE),
    ("bounds", "canary", "ScaledObject/seq2serve", "spec.minReplicaCount", 0),
    ("bounds", "canary", "ScaledObject/seq2serve", "spec.minReplicaCount", 11),
    ("bounds", "canary", "ScaledObject/seq2serve", "spec.fallback", DELETE),
    ("bounds", "canary", "ScaledObject/seq2serve", "spec.fallback.behavior", "static"),
    ("bounds", "cpu-everything", "HorizontalPodAutoscaler/seq2serve", "spec.maxReplicas", 1),
    ("bounds", "cpu-everything", "HorizontalPodAutoscaler/seq2serve", "spec.behavior", DELETE),
    (
        "bounds",
        "cpu-everything",
        "HorizontalPodAutoscaler/seq2serve",
        "spec.behavior.scaleUp.policies.0.value",
        400,
    ),
    (
        "bounds",
        "cpu-everything",
        "HorizontalPodAutoscaler/seq2serve",
        "spec.behavior.scaleDown.stabilizationWindowSeconds",
        0,
    ),
    (
        "queries",
        "canary",
        "ScaledObject/seq2serve",
        "spec.triggers.0.metadata.ignoreNullValues",
        DELETE,
    ),
    (
        "queries",
        "canary",
        "ScaledObject/seq2serve",
        "spec.triggers.0.metadata.query",
        lambda old: old.split(" or ")[0] + " or vector(0)",
    ),
    (
        "queries",
        "canary",
        "ScaledObject/seq2serve",
        "spec.triggers.1.metadata.query",
        lambda old: old.replace("[45s]", "[5m]"),
    ),
    (
        "queries",
        "canary",
        "ScaledObject/seq2serve",
        "spec.triggers.0.metadata.query",
        lambda old: old.replace("min by (pod)", "max by (pod)"),
    ),
    (
        "bounds",
        "canary",
        "ScaledObject/seq2serve",
        "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleUp.policies.1.value",
        5,
    ),
    ("queries", "canary", "ScaledObject/seq2serve", "spec.triggers.1", DELETE),
    (
        "queries",
        "mig-prometheus-adapter",
        "HorizontalPodAutoscaler/seq2serve",
        "spec.metrics.1",
        DELETE,
    ),
    ("evictions", "canary", "PodDisruptionBudget/seq2serve", "spec.maxUnavailable", 0),
    ("evictions", "canary", "PodDisruptionBudget/seq2serve", "spec.minAvailable", 2),
    (
        "evictions",
        "canary",
        "PodDisruptionBudget/seq2serve",
        "spec.unhealthyPodEvictionPolicy",
        DELETE,
    ),
    ("networks", "canary", "NetworkPolicy/deny-all", "spec.policyTypes", ["Ingress"]),
    ("networks", "canary", "NetworkPolicy/dns", "spec.egress", []),
    ("networks", "canary", "NetworkPolicy/seq2serve", "spec.ingress.0.from.0", DELETE),
    ("networks", "canary", "NetworkPolicy/seq2serve", "spec.ingress.1", DELETE),
    ("networks", "canary", "NetworkPolicy/seq2serve", "spec.ingress.2.from.0", DELETE),
    (
        "networks",
        "canary",
        "NetworkPolicy/seq2serve",
        "spec.ingress.0.from.0.ipBlock.cidr",
        "0.0.0.0/0",
    ),
    ("networks", "canary", "NetworkPolicy/cloud-storage", "spec.egress.2", DELETE),
    ("gateways", "canary", "HTTPRoute/seq2serve", "spec.rules.0.backendRefs.0.weight", 90),
    ("gateways", "canary", "HTTPRoute/seq2serve", "spec.rules.0.matches.0.path.value", "/"),
    ("gateways", "canary", "GCPBackendPolicy/seq2serve", "spec.default.timeoutSec", DELETE),
    (
        "gateways",
        "canary",
        "GCPBackendPolicy/seq2serve",
        "spec.default.connectionDraining.drainingTimeoutSec",
        60,
    ),
    (
        "gateways",
        "canary",
        "HealthCheckPolicy/seq2serve-canary",
        "spec.targetRef.name",
        "seq2serve",
    ),
    (
        "balloons",
        "canary",
        "Deployment/seq2serve-balloon",
        f"{SERVER}.resources.limits.memory",
        "2Gi",
    ),
    ("balloons", "canary", "Deployment/seq2serve-balloon", f"{POD}.nodeSelector", {}),
    ("balloons", "canary", "PriorityClass/seq2serve-balloon", "value", 1000),
    (
        "disk_of_claims",
        "training-indexed-job",
        "PersistentVolumeClaim/runs",
        "spec.accessModes",
        ["ReadWriteOnce"],
    ),
    ("pinned", "production-gke", "Deployment/seq2serve", f"{SERVER}.image", "seq2serve:1.0"),
    ("for_podman", "podman", "Deployment/seq2serve", "spec.replicas", 2),
    (
        "for_podman",
        "podman",
        "Deployment/seq2serve",
        f"{SERVER}.livenessProbe",
        {"httpGet": {"path": "/livez", "port": 8083}},
    ),
    (
        "for_podman",
        "podman",
        "Deployment/seq2serve",
        f"{POD}.volumes.0",
        {"name": "tokens", "secret": {"secretName": "seq2serve-tokens"}},
    ),
    ("for_podman", "podman", "Deployment/seq2serve", f"{SERVER}.ports.0.hostIP", DELETE),
]


def broken(built: Documents, which: str, path: str, value: Any) -> None:
    """Change one place of one object."""
    kind, name = which.split("/")
    (target,) = (
        one
        for one in built
        if one["kind"] == kind
        and (
            one["metadata"]["name"].startswith(name[:-1])
            if name.endswith("*")
            else one["metadata"]["name"] == name
        )
    )
    if path.startswith("$"):
        containers = target["spec"]["template"]["spec"]["containers"]
        (variable,) = (v for c in containers for v in c["env"] if v["name"] == path[1:])
        variable["value"] = value
        return
    *way, last = path.replace("\\.", "\0").split(".")
    where: Any = target
    for step in way:
        where = where[int(step)] if step.isdigit() else where[step.replace("\0", ".")]
    key: Any = int(last) if last.isdigit() else last.replace("\0", ".")
    if value is DELETE:
        del where[key]
    else:
        where[key] = value(where[key]) if callable(value) else value
