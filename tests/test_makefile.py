"""The Makefile: which Python it takes, that the environment is made once, and that what is typed is
passed on as it was typed."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


# Stands for the environment's Python: tells what it was given.
TELLING = """\
#!{python}
import json, sys
print(json.dumps(sys.argv[1:]))
"""
# Makes an environment whose pip takes a while, and says so.
SLOW = """\
#!/bin/sh
[ "$2" = venv ] || exec {python} "$@"
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "pip $*" >> {log}\\nsleep 0.3\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""
HOSTILE = "a b$5$$(id)'\"`id`*;#\\%é"


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Under `make test` these would make a part of it of what is started by itself.
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    own = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={**own, **variables},
    )  # fmt: skip


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def setup(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    return make("setup", f"PYTHON={python}", f"VENV={folder}/venv")


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14", "4.11"])
def test_another_python_is_refused_before_anything_is_made(tmp_path: Path, version: str) -> None:
    assert version not in VERSIONS
    pose = POSED.format(python=sys.executable, version=version.replace(".", ", "))
    posed = program(tmp_path / "python", pose)
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


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., list[str]]:
    """What make gives to Python, the last time that it does."""
    program(tmp_path / "python", TELLING.format(python=sys.executable))
    (tmp_path / "ready").touch()

    def last(*arguments: str, **variables: str) -> list[str]:
        done = make(*arguments, f"BIN={tmp_path}", f"READY={tmp_path}/ready", **variables)
        assert done.returncode == 0, done.stderr
        words: list[str] = json.loads(done.stdout.splitlines()[-1])
        return words

    return last


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "export"])
def test_values_are_passed_on_as_typed(told: Callable[..., list[str]], stage: str) -> None:
    values = {name: f"{HOSTILE}{name}" for name in ("RECIPE", "RUN", "DATA", "SET")}
    expected = [
        "-m", "training", "build", values["RECIPE"], "--run", values["RUN"],
        "--data", values["DATA"], "--set", values["SET"], "--until", stage,
    ]  # fmt: skip
    assert told(stage, *(f"{name}={value}" for name, value in values.items())) == expected
    assert told(stage, **values) == expected  # from the environment


def test_the_store_and_further_options_too(told: Callable[..., list[str]]) -> None:
    assert told("mar", f"STORE={HOSTILE}", "RECIPE=r", "FRESH=1") == [
        "-m", "training", "build", "r", "--until", "archive", "--store", HOSTILE, "--fresh"
    ]  # fmt: skip
    assert told("train", "RECIPE=r", "TRAIN=--accept-changes --wandb")[-2:] == [
        "--accept-changes", "--wandb"
    ]  # fmt: skip
    assert told("prepare", "RECIPE=r", "FRESH=1")[-1] == "--fresh"
    assert told("distill", "RECIPE=r", f"OUT={HOSTILE}")[-2:] == ["--out", HOSTILE]
    assert told("ensemble", "RECIPE=r", "MEMBERS=a b")[-3:] == ["--members", "a", "b"]


def test_text_too_with_its_line_breaks(told: Callable[..., list[str]]) -> None:
    for text in ("$50", HOSTILE, "two\nlines"):
        expected = ["-m", "server", "translate", "--url", "http://127.0.0.1:1$2", text]
        assert told("translate", f"TEXT={text}", "URL=http://127.0.0.1:1$2") == expected
        assert told("translate", "URL=http://127.0.0.1:1$2", TEXT=text) == expected
    assert told("translate", "PORT=9")[-1] == "http://127.0.0.1:9"  # standard input


def test_a_line_break_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    done = make("prepare", "SET=a=1\nb=2", f"BIN={tmp_path}", f"READY={tmp_path}/ready")
    assert done.returncode != 0
    assert "SET: make cannot pass a line break on" in done.stderr


def test_two_makes_at_once_make_the_environment_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = program(tmp_path / "python", SLOW.format(python=sys.executable, log=log))
    with ThreadPoolExecutor(2) as two:
        done = list(two.map(lambda _: setup(tmp_path, str(python)), range(2)))
    assert [one.returncode for one in done] == [0, 0], done
    assert log.read_text().count("pip install -q -e .[dev]") == 1


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
