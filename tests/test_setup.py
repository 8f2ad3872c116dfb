"""The versions of Python that are named: every pin can be had for each, and another is refused at
once."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

VERSIONS = re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
UNREACHABLE = re.compile(
    r"Failed to fetch|error sending request|dns error|timed out|connect|client error", re.I
)
# Called as `python -c CODE`: a Python that says it is another version.
POSED = """\
#!/bin/sh
exec {python} -c 'import sys; sys.version_info = ({version}, 0); exec(sys.argv.pop(1))' "$2"
"""


def setup(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "setup", f"PYTHON={python}", f"VENV={folder}/venv"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14", "4.11"])
def test_another_python_is_refused_before_anything_is_made(tmp_path: Path, version: str) -> None:
    assert version not in VERSIONS
    posed = tmp_path / "python"
    posed.write_text(POSED.format(python=sys.executable, version=version.replace(".", ", ")))
    posed.chmod(0o755)
    done = setup(tmp_path, str(posed))
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        f"setup: {posed} is Python {version}; allowed: {' '.join(VERSIONS)}, as in make setup "
        "PYTHON=python3.12"
    )
    assert not (tmp_path / "venv").exists()


def test_what_is_named_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    first, last = VERSIONS[0], VERSIONS[-1]
    after = f"3.{int(last.split('.')[1]) + 1}"
    assert project["project"]["requires-python"] == f">={first},<{after}"
    assert project["tool"]["mypy"]["python_version"] == first
    assert project["tool"]["ruff"]["target-version"] == f"py{first.replace('.', '')}"
    *others, newest = VERSIONS
    assert f"Python {', '.join(others)} or {newest} and make" in (ROOT / "README.md").read_text()
    assert f"python3 ({first} to {last})" in (ROOT / "Dockerfile").read_text()
    assert f"need Python {first}-{last} and make" in (ROOT / "Makefile").read_text()


Resolved = dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def resolving() -> Iterator[Resolved]:
    """The pins and all that they need, looked for by one process for each version."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--quiet",
        "--only-binary", ":all:", "--python-version",
    ]  # fmt: skip
    all_of_them = {
        version: subprocess.Popen(
            [*command, version], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for version in VERSIONS
    }
    yield all_of_them
    for one in all_of_them.values():
        one.kill()
        one.wait()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_pin_can_be_had_built(resolving: Resolved, version: str) -> None:
    try:
        found, said = resolving[version].communicate(timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the package registry did not answer within a minute")
    unreachable = UNREACHABLE.search(said)
    if resolving[version].returncode and unreachable and "No solution found" not in said:
        pytest.skip(f"no package registry can be reached ({unreachable[0]})")
    assert resolving[version].returncode == 0, said
    assert re.search(r"^torch==", found, re.M)
