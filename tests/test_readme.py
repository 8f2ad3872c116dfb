"""What the README tells a newcomer to type does what it says."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, Toy

from handler.request import RequestOptions
from server.torchserve import ServerOptions, TorchServe

INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """Fenced code of the README in `language`, none for commands."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # Under `make test` these would make a part of it of what a newcomer starts by itself.
    own = {key: value for key, value in os.environ.items() if key not in INHERITED}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**own, **environment},
    )


@pytest.fixture
def tools(tmp_path: Path) -> tuple[str, ...]:
    """Make uses the environment that runs the tests, which is there already."""
    ready = tmp_path / "ready"
    ready.touch()
    return (f"BIN={Path(sys.executable).parent}", f"READY={ready}")


@pytest.fixture(scope="module")
def server(toy: Toy):
    with TorchServe(ServerOptions.on_free_ports(toy.store)) as running:
        yield running


def stages_of(said: str) -> list[str]:
    """The stages of a run that were done, as standard error tells them."""
    return re.findall(r"^(prepare|train|evaluate|export|archive): ", said, re.M)


def test_make_does_again_what_set_and_data_change(toy: Toy, tools, tmp_path):
    run = Path(shutil.copytree(toy.run.root, tmp_path / "run"))

    def made(verb: str, *changes: str) -> tuple[int, list[str], str]:
        done = make(verb, *tools, f"RECIPE={toy.recipe_file}", f"RUN={run}", *changes)
        return done.returncode, stages_of(done.stderr), done.stderr

    def signature() -> str:
        return json.loads((run / "scores.json").read_text())["test"]["bleu_signature"]

    assert made("evaluate")[:2] == (0, [])
    lower = "SET=scoring.lowercase=true"
    assert made("evaluate", lower)[:2] == (0, ["evaluate"])
    assert "case:lc" in signature()
    assert made("evaluate", lower)[:2] == (0, [])
    assert made("evaluate")[:2] == (0, ["evaluate"])
    assert "case:mixed" in signature()
    status, _, said = made("evaluate", "SET=training.label_smoothing=0.3")
    assert status != 0
    assert "training.label_smoothing: 0.0 -> 0.3" in said
    status, _, said = made("evaluate", f"DATA={tmp_path}")
    assert status != 0
    assert str(tmp_path) in said
    assert made("evaluate")[:2] == (0, [])


def test_every_make_target_of_the_documents_exists_and_is_explained():
    named = set()
    for document in DOCUMENTS:
        code = re.findall(r"```.*?```|`[^`\n]+`", document.read_text(), re.S)
        named |= set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code)))
    listed = set(re.findall(r"^make ([a-z]+) ", make("help").stdout, re.M))
    assert {"demo", "test", "serve", "translate", "setup"} <= named <= listed


def test_every_file_that_the_documents_link_to_exists():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_make_demo_serves_and_translates_and_does_nothing_twice(toy: Toy, tools, tmp_path):
    arguments = (
        "demo", *tools, f"RECIPE={toy.recipe_file}", f"RUN={toy.run.root}", f"STORE={tmp_path}"
    )
    first = make(*arguments)
    assert first.returncode == 0, first.stderr
    source = (toy.run.data / "test.source").read_text().split("\n")[0]
    assert f"{source}  ->  {source[::-1]}" in first.stdout
    assert '"exact_match"' in first.stdout
    assert set(stages_of(first.stderr)) <= {"archive"}
    again = make(*arguments)
    assert again.returncode == 0, again.stderr
    assert stages_of(again.stderr) == []


def test_make_translate_asks_the_server(server, tools):
    done = make("translate", *tools, f"URL={server.url}", TEXT="3141")
    assert (done.stdout.splitlines()[-1], done.returncode) == ("1413", 0)
    hostile = make("translate", *tools, f"URL={server.url}", TEXT="12$(touch oops)`id`\"'; 34")
    assert hostile.returncode == 0, hostile.stderr
    assert not (ROOT / "oops").exists()


def test_make_serve_without_an_archive_says_what_to_do(tools, tmp_path):
    done = make("serve", *tools, f"STORE={tmp_path}", "PORT=0")
    assert done.returncode != 0
    assert "make mar" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_python_call_works(server, tmp_path):
    (code,) = blocks("python")
    assert "http://localhost:8080" in code
    script = tmp_path / "call.py"
    script.write_text(
        code.replace("http://localhost:8080", server.url).replace("3rd of May, 2021", "271828")
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "828172\n", done.stderr


REST = (ROOT / "docs" / "rest.md").read_text()
EXAMPLES = re.search(r"^```json\n(.*?)^```", REST, re.M | re.S)[1].splitlines()


@pytest.mark.parametrize("body", EXAMPLES)
def test_every_example_of_the_reference_is_answered(server, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/predictions/seq2seq", body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.status == 200
        assert b'"finish_reason"' in reply.read()


@pytest.mark.parametrize("option", dataclasses.fields(RequestOptions), ids=lambda one: one.name)
def test_every_option_is_in_the_reference_with_its_default_and_an_example(option):
    (row,) = re.findall(rf"^\| `{option.name}` \|(.*)\|$", REST, re.M)
    default = row.split("|")[1].strip().strip("`")
    assert default == json.dumps(option.default).strip('"').removesuffix(".0")
    assert any(f'"{option.name}":' in example for example in EXAMPLES)
    for limit in ("minimum", "maximum", "longest"):
        if limit in option.metadata and option.metadata[limit] < 2**62:
            assert f"{option.metadata[limit]:,}".removesuffix(".0") in row.split("|")[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_call_works(server):
    (command,) = (b for b in blocks("") if b.startswith("curl"))
    command = command.replace("localhost:8080", server.url.removeprefix("http://"))
    command = command.replace("3rd of May, 2021", "271828")
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert '"828172"' in done.stdout, done.stderr
