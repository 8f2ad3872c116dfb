"""The Dockerfile, held to manifests and pyproject.toml; `make image-test` builds and runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.export import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
SCRIPT = K8S / "tests" / "image.py"
Stage = list[tuple[str, str]]


def instructions(text: str) -> Stage:
    """Return (INSTRUCTION, rest) for each, lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def dockerfile() -> Stage:
    return instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stages(dockerfile: Stage) -> dict[str, tuple[str, Stage]]:
    """Base and instructions of each stage."""
    found: dict[str, tuple[str, Stage]] = {}
    for word, rest in dockerfile:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif found:
            found[name][1].append((word, rest))
    return found


def whole(stages: dict[str, tuple[str, Stage]], name: str) -> Stage:
    """The instructions of a stage, after those of the stages that it begins with."""
    base, own = stages[name]
    return (whole(stages, base) if base in stages else []) + own


def containers() -> list[dict]:
    """Those of the manifests that run the repository's images."""
    found = []
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if not isinstance(document, dict) or document.get("kind") not in ("Deployment", "Job"):
                continue
            spec = document["spec"]["template"]["spec"]
            for one in spec.get("containers", []) + spec.get("initContainers", []):
                if str(one.get("image", "")).startswith("seq2serve"):
                    found.append({"user": spec.get("securityContext", {}).get("runAsUser"), **one})
    assert found
    return found


# Of each target.
IMAGES = {
    "serving": "seq2serve", "serving-with-model": "seq2serve", "training": "seq2serve-training"
}


def test_every_image_of_the_manifests_has_a_target():
    assert {one["image"] for one in containers()} == set(IMAGES.values())


@pytest.mark.parametrize("target", IMAGES)
def test_the_user_is_the_number_that_the_manifests_say(stages, target):
    users = [rest for word, rest in whole(stages, target) if word == "USER"]
    assert users
    assert re.fullmatch(r"(\d+):\1", users[-1])
    wanted = {one["user"] for one in containers() if one["user"] is not None}
    assert {int(users[-1].split(":")[0])} == wanted


@pytest.mark.parametrize("target", IMAGES)
def test_nothing_follows_that_could_change_the_packages(stages, target):
    """pip, and its cache, are where the images are not."""
    for word, rest in whole(stages, target):
        assert word not in ("ADD", "ENTRYPOINT", "HEALTHCHECK", "VOLUME", "SHELL")
        assert word != "RUN" or re.match(r"echo |cd /models && sha256sum -c", rest)
        if word == "COPY":
            source = r"--from=(serving-files|training-files|native) |--chmod=444 model-store/"
            assert re.match(source, rest)


@pytest.mark.parametrize("target", IMAGES)
def test_images_are_labelled(stages, target):
    told = " ".join(rest for word, rest in whole(stages, target) if word == "LABEL")
    found = dict(re.findall(r'org\.opencontainers\.image\.([a-z]+)="([^"]*)"', told))
    assert found["title"] == IMAGES[target]
    assert found["licenses"] == "Apache-2.0"
    assert found["revision"] == "${REVISION}"
    assert found["version"] == "${VERSION}"
    assert set(found) >= {"description"}


def test_serving_does_what_the_deployment_commands(stages):
    deployment = yaml.safe_load((K8S / "base" / "deployment.yaml").read_text())
    server = deployment["spec"]["template"]["spec"]["containers"][0]
    said = dict(whole(stages, "serving"))
    assert yaml.safe_load(said["CMD"]) == server["command"]
    ports = {str(one["containerPort"]) for one in server["ports"]}
    assert set(said["EXPOSE"].split()) == ports
    model = {one["name"]: one.get("value") for one in server["env"]}["SEQ2SERVE_MODEL_STORE"]
    copied = [rest for word, rest in whole(stages, "serving-with-model") if word == "COPY"]
    assert copied[-1].endswith(f" {model}/")


def test_every_base_is_the_argument(dockerfile, stages):
    assert [(word, rest.partition("=")[0]) for word, rest in dockerfile[:2]] == [
        ("ARG", "BASE"), ("ARG", "BUILDER"),
    ]
    assert {base for base, _ in stages.values()} - set(stages) == {"${BASE}", "${BUILDER}"}


@pytest.mark.parametrize("target", IMAGES)
def test_no_image_begins_with_the_builder_s_compiler(stages, target):
    name = target
    while name in stages:
        name = stages[name][0]
    assert name == "${BASE}"


def test_export_finds_its_operators_compiled(stages):
    """Where it looks for them, from its own sources."""
    where = f"/opt/seq2serve/{LIBRARIES.relative_to(ROOT).parent}"
    assert ("COPY", f"--from=native {where} {where}") in stages["training"][1]
    base, (compiled,) = stages["native"]
    assert base == "training-files"
    assert "build(LIBRARIES, library())" in compiled[1]


def test_classes_are_written_down_when_all_is_in_its_place(stages):
    """Java refuses them when a jar has changed since."""
    own = stages["serving-files"][1]
    assert "python -B -m server.classes" in own[-1][1]
    assert ("COPY", "--from=serving-files /opt/venv /opt/venv") in stages["serving"][1]


def test_versions_are_those_of_pyproject(stages):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted: set[str] = set()
    for name in ("dependencies", "serving"):
        listed = re.search(rf"^{name} = \[.*?\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        assert listed is not None
        wanted |= set(re.findall(r'^ *"([\w.-]+)==', listed[1], re.MULTILINE))
    runs = {
        name: " && ".join(rest for word, rest in stages[name][1] if word == "RUN")
        for name in ("torch", "serving-files", "training-files")
    }
    # Only torch itself is named with a version, which is read from pyproject.toml.
    assert not re.search(r"[\w]==\d", " ".join(runs.values()))
    assert 'install "torch==$version+cpu"' in runs["torch"]
    given = {"torch"}
    for name in ("serving-files", "training-files"):
        found = re.search(r"install [^;&]*-c /pip/pins ([^;&]*?)(?: &&|$)", runs[name])
        assert found is not None
        given |= set(found[1].split())
    assert given == wanted


def test_pins_are_read_as_the_dockerfile_reads_them(stages):
    """Its sed, run on pyproject.toml."""
    found = re.search(r"sed -n (.*?) /pip/pyproject\.toml", stages["torch"][1][-1][1])
    assert found is not None
    done = subprocess.run(
        ["sh", "-c", f"sed -n {found[1]} pyproject.toml"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )
    pins = done.stdout.splitlines()
    assert sum(pin.startswith("torch==") for pin in pins) == 1
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


def copied_from_here(stages) -> set[str]:
    found: set[str] = set()
    for _, own in stages.values():
        for word, rest in own:
            words = rest.split()
            if word == "COPY" and not words[0].startswith("--from"):
                found |= {one for one in words[:-1] if not one.startswith("--")}
    return found


def test_the_context_has_what_is_copied_and_nothing_else(stages):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = copied_from_here(stages)
    assert allowed - {"model-store"} == copied
    assert "model-store/*" in rules[rules.index("!model-store"):]
    assert all((ROOT / one).exists() for one in copied if not one.startswith("model-store/"))


@pytest.mark.parametrize(("stage", "packages"), [
    ("serving-files", {"server"}), ("training-files", {"handler", "model", "training"}),
])
def test_code_has_the_packages_that_it_imports(stages, packages, stage):
    folders = {rest.split()[0] for word, rest in stages[stage][1] if word == "COPY"}
    assert packages <= folders
    ours = {"bench", "handler", "model", "server", "training"}
    for folder in folders & ours:
        for path in (ROOT / folder).rglob("*.py"):
            imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
            assert set(imports) & ours <= folders, path


# The script that builds and runs


def script():
    spec = importlib.util.spec_from_file_location("image_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pip_works_in_a_build_as_here(tmp_path, monkeypatch):
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index} https://user:word@index.invalid/simple")
    text, paths = script().pip_configuration()
    settings = dict(line.split(" = ", 1) for line in text.splitlines()[1:])
    assert settings["find-links"] == str(wheels)
    assert settings["extra-index-url"].endswith("https://user:word@index.invalid/simple")
    assert {str(wheels), str(index.parent)} <= set(paths)
    assert "/" not in paths


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no podman: install" in done.stderr


def test_the_images_train_and_serve():
    if os.environ.get("SEQ2SERVE_IMAGE_TEST") != "1":
        pytest.skip("builds images, which takes minutes and GB: run `make image-test`")
    if reason := script().unable("", ""):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
