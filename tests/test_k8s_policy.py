"""checkov's policies of security, without an exception that gives no reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_tools import CHECKOV, COMBINATIONS, documents, missing, text

# training/ says no image; tests/training-* say one.
CHECKED = [one for one in COMBINATIONS if not one.startswith("training/")]
# What is broken: a policy of checkov, a combination and a change of the Deployment's pod.
BROKEN = {
    "CKV_K8S_20": {"allowPrivilegeEscalation": True},
    "CKV_K8S_22": {"readOnlyRootFilesystem": False},
    "CKV_K8S_16": {"privileged": True},
    "CKV_K8S_37": {"capabilities": {"add": ["ALL"]}},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """One run, as checkov takes seconds to start: all combinations, and one that is broken."""
    if not CHECKOV.is_file():
        missing("checkov")
    folder: Path = tmp_path_factory.mktemp("manifests")
    for combination in CHECKED:
        (folder / f"{combination.replace('/', '-')}.yaml").write_text(text(combination))
    for policy, change in BROKEN.items():
        built = documents("overlays/production-gke")
        server = next(
            d for d in built if d["kind"] == "Deployment" and d["metadata"]["name"] == "seq2serve"
        )
        server["spec"]["template"]["spec"]["containers"][0]["securityContext"] |= change
        (folder / f"broken-{policy}.yaml").write_text(yaml.safe_dump_all(built))
    done = subprocess.run(
        [
            str(CHECKOV),
            "-d",
            str(folder),
            "--framework",
            "kubernetes",
            "--skip-download",
            "--compact",
            "--output",
            "json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)["results"]
    return found


def test_nothing_fails(report: dict[str, list[dict[str, Any]]]) -> None:
    failed = [
        f"{one['file_path']} {one['resource']}: {one['check_id']} {one['check_name']}"
        for one in report["failed_checks"]
        if "broken-" not in one["file_path"]
    ]
    assert not failed, "\n".join(failed)


def test_every_exception_says_why(report: dict[str, list[dict[str, Any]]]) -> None:
    assert report["skipped_checks"]
    for one in report["skipped_checks"]:
        reason = one["check_result"].get("suppress_comment") or ""
        assert len(reason.split()) >= 5, f"{one['resource']}: {one['check_id']} {reason!r}"


@pytest.mark.parametrize("policy", BROKEN)
def test_it_would_fail(policy: str, report: dict[str, list[dict[str, Any]]]) -> None:
    found = {
        one["check_id"] for one in report["failed_checks"] if f"broken-{policy}" in one["file_path"]
    }
    assert policy in found
