"""Every object has the form that the API has for it.

Kubernetes' own kinds against the schemas that kubernetes-validate carries; custom resources against
JSON schemas in the folder that the variable SCHEMAS names (files KIND_VERSION.json, in lower case).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from k8s_tools import COMBINATIONS, Document, documents

VERSIONS = ("1.31", "1.34", "1.37")
CUSTOM = {
    "cloud.google.com",
    "gateway.networking.k8s.io",
    "keda.sh",
    "monitoring.coreos.com",
    "monitoring.googleapis.com",
    "networking.gke.io",
}


def is_custom(document: Document) -> bool:
    return document["apiVersion"].split("/")[0] in CUSTOM


def unknown(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields that the schema does not have: what the API server would drop without a word."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or not schema.get("type"):
        return
    if isinstance(value, dict) and "properties" in schema:
        for key, inner in value.items():
            if key in schema["properties"]:
                yield from unknown(inner, schema["properties"][key], f"{path}.{key}")
            elif not schema.get("additionalProperties"):
                yield f"{path}.{key}"
    if isinstance(value, list):
        for inner in value:
            yield from unknown(inner, schema.get("items", {}), f"{path}[]")


def check(document: Document, version: str) -> None:
    """Raises: the document is not of its kind, or its kind is not of this version."""
    kubernetes_validate.validate(document, version, strict=True)


def check_custom(document: Document, folder: Path) -> None:
    """Likewise, of a custom resource."""
    version = document["apiVersion"].split("/")[1]
    text = (folder / f"{document['kind'].lower()}_{version}.json").read_text()
    schema = json.loads(text.replace("^(?i)", "(?i)^"))  # Go allows flags anywhere
    jsonschema.validate(document, schema)
    assert not list(unknown(document, schema | {"type": "object"}))


@pytest.fixture
def schemas() -> Path:
    named = os.environ.get("SCHEMAS")
    if not named or not Path(named).is_dir():
        pytest.skip(f"SCHEMAS is {named!r}: a folder of JSON schemas of custom resources is needed")
    return Path(named)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_kinds_of_kubernetes(combination: str, version: str) -> None:
    for document in documents(combination):
        if not is_custom(document):
            check(document, version)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_custom_resources(combination: str, schemas: Path) -> None:
    for document in documents(combination):
        if is_custom(document):
            check_custom(document, schemas)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", lambda d: d["spec"].update(replicaCount=2)),
        ("Deployment", lambda d: d["spec"]["template"]["spec"].update(nodeselector={})),
        ("Service", lambda d: d["spec"]["ports"][0].update(port="http")),
        ("PodDisruptionBudget", lambda d: d.update(apiVersion="policy/v1beta1")),  # gone since 1.25
        ("NetworkPolicy", lambda d: d.update(kind="NetworkPolicies")),
    ],
)
def test_refuses_what_the_api_would(kind: str, change: Any) -> None:
    document = deepcopy(next(d for d in documents("tests/canary") if d["kind"] == kind))
    check(document, VERSIONS[-1])
    change(document)
    with pytest.raises(
        (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ):
        check(document, VERSIONS[-1])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ScaledObject", lambda d: d["spec"].pop("scaleTargetRef")),
        ("ScaledObject", lambda d: d["spec"].update(minReplicas=2)),
        ("HTTPRoute", lambda d: d["spec"]["rules"][0]["backendRefs"][0].update(weight=-1)),
        ("GCPBackendPolicy", lambda d: d["spec"]["default"].update(timeoutSeconds=1)),
        ("HealthCheckPolicy", lambda d: d["spec"]["default"]["config"].update(type="PING")),
    ],
)
def test_refuses_what_a_custom_api_would(kind: str, change: Any, schemas: Path) -> None:
    document = deepcopy(next(d for d in documents("tests/canary") if d["kind"] == kind))
    check_custom(document, schemas)
    change(document)
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_custom(document, schemas)
