"""Every folder builds; what excludes one another does not; the menu has every component."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from pathlib import Path

import pytest
import yaml
from k8s_pods import environment, workloads
from k8s_tools import COMBINATIONS, K8S, ROOT, documents, kustomize, text

from server.memory import shares
from server.supervisor import add_flags

COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
# Those of one line exclude one another.
EXCLUSIVE = (
    ("gpu-l4", "gpu-time-sharing", "gpu-mig", "compute-class"),
    ("spot", "compute-class"),
    ("model-baked-in", "model-from-gcs"),
    (
        "autoscale-keda-gmp",
        "autoscale-stackdriver",
        "autoscale-prometheus-adapter",
        "autoscale-cpu",
    ),
    ("monitoring-gmp", "monitoring-prometheus-operator"),
)
# Read by the handler; all others are flags of the supervisor.
OF_HANDLER = {"SEQ2SERVE_REQUIRE_GPU", "SEQ2SERVE_TOKENS"}


def overlay(folder: Path, components: tuple[str, ...], **values: str) -> Path:
    """A copy of k8s/ with an overlay of these components."""
    shutil.copytree(K8S, folder / "k8s")
    place = folder / "k8s" / "overlays" / "new"
    place.mkdir()
    marker = {"config.kubernetes.io/local-config": "true"}
    (place / "environment.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "data": values,
                "metadata": {"name": "environment", "annotations": marker},
            }
        )
    )
    chosen = [f"../../components/{one}" for one in components]
    (place / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../../base", "environment.yaml"], "components": chosen})
    )
    return place


VALUES = {
    "project": "p",
    "hostname": "h.example.com",
    "proxy-subnet": "10.0.0.0/23",
    "model-sha256": "a" * 64,
    "model-uri": f"gs://b/seq2seq-{'a' * 64}.mar",
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_builds(combination: str) -> None:
    kinds = {one["kind"] for one in documents(combination)}
    assert kinds >= {"Namespace", "ServiceAccount", "ConfigMap"}
    assert "local-config" not in text(combination)


def excluded(place: Path) -> bool:
    """Whether it does not build because two components bring one object."""
    done = kustomize(place)
    return done.returncode != 0 and "already registered id" in done.stderr


@pytest.mark.parametrize(
    "pair", [p for group in EXCLUSIVE for p in itertools.combinations(group, 2)]
)
def test_what_excludes_one_another_does_not_build(pair: tuple[str, str], tmp_path: Path) -> None:
    place = overlay(tmp_path, pair, **VALUES)
    assert excluded(place)
    for one in pair:  # each alone does
        described = yaml.safe_load((place / "kustomization.yaml").read_text())
        described["components"] = [f"../../components/{one}"]
        (place / "kustomization.yaml").write_text(yaml.safe_dump(described))
        assert kustomize(place).returncode == 0


def test_what_excludes_one_another_says_so() -> None:
    """In the head of its file, whose rule no table here may miss."""
    for component in COMPONENTS:
        head = (K8S / "components" / component / "kustomization.yaml").read_text()
        said = head.partition("# Excludes:")[2].partition("\napiVersion")[0]
        named = {one for one in COMPONENTS if re.search(rf"\b{one}(?![\w-])", said)}
        tabled = {one for group in EXCLUSIVE if component in group for one in group} - {component}
        assert named <= tabled or "every other" in said, f"{component}: {named - tabled}"


def test_two_that_no_longer_share_an_object_are_noticed(tmp_path: Path) -> None:
    """The monitoring components without the part whose object both bring."""
    pair = ("monitoring-gmp", "monitoring-prometheus-operator")
    place = overlay(tmp_path, pair, **VALUES)
    for one in pair:
        path = tmp_path / "k8s" / "components" / one / "kustomization.yaml"
        described = yaml.safe_load(path.read_text())
        described = {k: v for k, v in described.items() if k not in ("components", "patches")}
        path.write_text(yaml.safe_dump(described))
    assert not excluded(place)


@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("autoscale-keda-gmp", "project"),
        ("gateway", "hostname"),
        ("network-policy", "proxy-subnet"),
        ("model-baked-in", "model-sha256"),
        ("model-from-gcs", "model-uri"),
    ],
)
def test_does_not_build_without_what_a_site_must_say(
    component: str, value: str, tmp_path: Path
) -> None:
    place = overlay(tmp_path, (component,), **{k: v for k, v in VALUES.items() if k != value})
    done = kustomize(place)
    assert done.returncode != 0
    assert value in done.stderr


@pytest.mark.parametrize("name", ["config.properties", "haproxy.cfg"])
def test_the_configuration_is_the_repository_s(name: str) -> None:
    """kustomize reads no file above its folder: `make k8s/base/FILE` copies it."""
    ours = (ROOT / name).read_bytes()
    assert (K8S / "base" / name).read_bytes() == ours
    for one in documents("overlays/production-gke"):
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("seq2serve-config"):
            assert one["data"][name].encode() == ours
            break
    else:
        pytest.fail("no ConfigMap seq2serve-config")


def test_a_changed_configuration_rolls_the_pods(tmp_path: Path) -> None:
    place = overlay(tmp_path, ())
    before = kustomize(place).stdout
    with (tmp_path / "k8s" / "base" / "config.properties").open("a") as file:
        file.write("# changed\n")
    names = [
        set(re.findall(r"seq2serve-config-\w+", one)) for one in (before, kustomize(place).stdout)
    ]
    assert [len(one) for one in names] == [1, 1]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("combination", "column"), [("overlays/production-gke", 0), ("overlays/production-gke-spot", 1)]
)
def test_the_timeline_of_an_end_is_that_of_the_manifests(combination: str, column: int) -> None:
    """The rows of k8s/README.md: SIGTERM, SETTLE over, DRAIN over, STOP over, all buried."""
    menu = (K8S / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:at most )?(\d+) \| (\d+) \|", menu, re.MULTILINE)
    (one,) = (one for one in workloads(documents(combination)) if one.server is not None)
    assert one.server is not None
    given = environment(one.server)
    times = [0.0]
    for part in ("SETTLE", "DRAIN", "STOP"):
        times.append(times[-1] + float(given[f"SEQ2SERVE_{part}_SECONDS"]))
    grace = float(one.pod["terminationGracePeriodSeconds"])
    assert [float(row[column]) for row in rows] == [*times, grace]


def test_every_component_is_part_of_a_combination_and_of_the_menu() -> None:
    named = {
        Path(one).name
        for path in K8S.glob("**/kustomization.yaml")
        for one in yaml.safe_load(path.read_text()).get("components", [])
    }
    menu = (K8S / "README.md").read_text(encoding="utf-8")
    for component in COMPONENTS:
        assert component in named, f"{component}: built nowhere"
        assert f"`{component}`" in menu, f"{component}: not in k8s/README.md"
        head = (K8S / "components" / component / "kustomization.yaml").read_text()
        for word in ("# What:", "# When:", "# Excludes:"):
            assert word in head, f"{component}: no {word}"


def test_the_readme_names_every_folder_that_is_applied() -> None:
    menu = (K8S / "README.md").read_text(encoding="utf-8")
    for combination in COMBINATIONS:
        if not combination.startswith("tests/"):
            assert combination in menu


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if "training" not in c])
def test_every_variable_is_read_by_the_server(combination: str) -> None:
    """A name that nobody reads would be silence."""
    parser = argparse.ArgumentParser()
    add_flags(parser, {})
    flags = {f"SEQ2SERVE_{one.dest.upper()}" for one in parser._actions} | OF_HANDLER
    for one in workloads(documents(combination)):
        if one.server is not None:
            given = environment(one.server)
            assert {name for name in given if name.startswith("SEQ2SERVE_")} <= flags
            parsed = argparse.ArgumentParser()
            add_flags(parsed, given)
            values = vars(parsed.parse_args([]))
            assert values["drain_seconds"] == float(given["SEQ2SERVE_DRAIN_SECONDS"])


@pytest.mark.parametrize(
    ("combination", "heap"), [("overlays/production-gke", 512), ("overlays/dev-cpu", 200)]
)
def test_java_gets_its_heap_beside_a_model(combination: str, heap: int) -> None:
    """MiB, by the server's own formula, for the archive of 20 MB of the comments."""
    (server,) = (one for one in workloads(documents(combination)) if one.server is not None)
    assert server.server is not None
    amount = server.server["resources"]["limits"]["memory"]
    limit = int(amount.removesuffix("Gi")) << 30
    # A GPU's worker takes 2 GiB more.
    cuda = (2 << 30) * ("nvidia.com/gpu" in server.server["resources"]["limits"])
    assert shares(limit - cuda, 20 << 20).heap >= heap
