"""Old and new meet at every rollout: what the version before this one left is served, or refused by
its format version with what to do. tests/fixtures/README.md says what there is of it.

An image holds `server`, Java and packages; the handler travels in the archive. A cluster changes
one after the other, so both meet the other's neighbour, in both orders.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import psutil  # comes with torchserve
import pytest
import torch
from conftest import GUARD_SECONDS, ROOT, call, options, run_verb, workers

from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import load
from handler.integrity import sha256, write_digests
from handler.tokenizer import Tokenizer
from model.serving import FORMAT_VERSION
from server.errors import ServerError
from server.torchserve import TorchServe
from training.run import Run

FORMATS = sorted(Path(__file__).with_name("fixtures").glob("format*"))
# Format versions that today's code need not read: those that left nothing here, and later ones.
UNKNOWN = {*range(1, FORMAT_VERSION), 99} - {int(path.name[6:]) for path in FORMATS}
CASES = ("greedy", "beam", "sampling")
ARCHIVE = "seq2seq.mar"


@dataclass(frozen=True)
class Former:
    """What another version left, in a copy that tests may write to."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "rollout.yaml"

    @property
    def run(self) -> Run:
        return Run(self.folder / "run")

    @property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    def model(self, weights: str) -> Path:
        return self.folder / f"{weights}.pt"

    def archived(self, store: str) -> Path:
        """The folder of an archive of this run, made by today's code."""
        done = run_verb("archive", self.recipe, "--run", self.run.root, "--store",
                        self.folder / store)
        assert done.returncode == 0, done.stderr
        return self.folder / store


@pytest.fixture(scope="module", params=FORMATS, ids=lambda path: path.name)
def former(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Former:
    one = Former(tmp_path_factory.mktemp("former") / request.param.name)
    shutil.copytree(request.param, one.folder)
    with zipfile.ZipFile(one.folder / ARCHIVE) as content:
        one.model("float32").write_bytes(content.read("model.pt"))
    return one


@pytest.fixture(scope="module")
def again(former: Former) -> Former:
    """A run of the version before, evaluated, exported and archived by today's code."""
    one = Former(former.folder / "again")
    one.folder.mkdir()
    for name in (former.recipe.name, "expected.json"):
        shutil.copy(former.folder / name, one.folder)
    shutil.copytree(former.run.root, one.run.root)
    for verb in ("evaluate", "export"):
        done = run_verb(verb, one.recipe, "--run", one.run.root)
        assert done.returncode == 0, done.stderr
    one.archived("store")
    return one


def assert_told(
    told: list[list[dict[str, Any]]], expected: dict[str, Any], weights: str, case: str
) -> None:
    """Translations as the server tells them, the n best of each text."""
    wanted = expected["answers"][weights][case]
    assert len(told) == len(wanted)
    for mine, former in zip(told, wanted):
        for key in ("text", "tokens", "finish_reason"):
            assert [one.get(key) for one in mine] == [one[key] for one in former]
        assert [one["score"] for one in mine] == pytest.approx(
            [one["score"] for one in former], abs=1e-4
        )


# model.pt and the run folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_model_of_the_version_before_decodes_as_it_did(
    former: Former, weights: str, case: str
) -> None:
    assert_decodes(former, former.model(weights), weights, case)


@pytest.mark.parametrize("case", CASES)
def test_it_decodes_so_beside_todays_native_operators(
    former: Former, native_library: Path | None, case: str
) -> None:
    """They are of the whole process, which may have read a newer model before."""
    if native_library is None:
        pytest.skip("no native operators on this machine")
    assert_decodes(former, former.model("int8"), "int8", case)


def assert_decodes(former: Former, path: Path, weights: str, case: str) -> None:
    expected = former.expected
    model = load(str(path), torch.device("cpu"))
    source, target = (Tokenizer(former.run.tokenizer / f"{s}.model") for s in ("source", "target"))
    sources = [[*source.encode(text), model.eos_id] for text in expected["texts"]]
    asked = {k: v for k, v in expected["options"][case].items() if k != "return_tokens"}
    events = list(decode_in_order(Engine(model, rows=8), sources, DecodingOptions(**asked)))
    assert [event.error for event in events] == [None] * len(events)
    told = [
        [
            {
                "text": target.decode(one.tokens),
                "tokens": target.pieces(one.tokens),
                "finish_reason": one.finish_reason,
                "score": one.score,
            }
            for one in event.results
        ]
        for event in events
    ]
    assert_told(told, expected, weights, case)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_verb_translate_reads_a_model_of_the_version_before(
    former: Former, weights: str
) -> None:
    """In a process that has read no other model."""
    shutil.copy(former.model(weights), former.run.model)
    done = translated(former, "beam")
    assert_told([json.loads(line) for line in done.stdout.splitlines()], former.expected,
                weights, "beam")


def translated(former: Former, case: str) -> subprocess.CompletedProcess[str]:
    expected = former.expected
    done = run_verb(
        "translate", former.recipe, "--run", former.run.root, "--json",
        "--options", json.dumps(expected["options"][case]),
        input="".join(f"{text}\n" for text in expected["texts"]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_so_it_does_beside_the_native_operators_of_its_time(former: Former) -> None:
    """A run folder keeps them with its int8 model.pt, and the archive takes both as they are. They
    are compiled from git's history, being large and for one kind of machine."""
    library = native_of(former.expected["commit"])
    shutil.copy(former.model("int8"), former.run.model)
    copied = shutil.copy(library, former.run.root)
    try:
        done = translated(former, "beam")
    finally:
        Path(copied).unlink()
    assert_told([json.loads(line) for line in done.stdout.splitlines()], former.expected,
                "int8", "beam")


def native_of(commit: str) -> Path:
    """The native operators of a revision, compiled by its own code."""
    place = ROOT / "build" / f"native-{commit[:12]}"
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        packed = Path(folder, "code.tar")
        git = ["git", "archive", "--output", str(packed), commit, "handler", "model"]
        try:
            subprocess.run(git, cwd=ROOT, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"no git, or a clone without revision {commit[:12]} (fetch its history)")
        with tarfile.open(packed) as content:
            content.extractall(folder, filter="data")
        program = (
            "import pathlib, sys\n"
            "from handler.decoding import native\n"
            "from model.native import build\n"
            "print(build(pathlib.Path(sys.argv[1]), native.library()))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(place)], cwd=folder, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": folder}, check=False,
        )  # fmt: skip
    if "NoCompiler" in done.stderr:
        pytest.skip("no native operators on this machine")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_every_later_verb_takes_a_run_of_the_version_before(former: Former, again: Former) -> None:
    scores, wanted = (one.run.read_json(one.run.scores, "evaluate") for one in (again, former))
    told = {key: scores[key] for key in wanted}  # today's have how they were made, too
    assert {**told, "validation_perplexity": 0} == {**wanted, "validation_perplexity": 0}
    assert scores["validation_perplexity"] == pytest.approx(
        wanted["validation_perplexity"], abs=1e-4
    )
    for name in ("validation.decoded", "test.decoded"):
        assert (again.run.root / name).read_bytes() == (former.run.root / name).read_bytes()
    assert json.loads(load(str(again.run.model), torch.device("cpu")).card)["format_version"] == (
        FORMAT_VERSION
    )
    assert_decodes(again, again.run.model, "float32", "beam")


def test_so_does_the_report(again: Former) -> None:
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    done = run_verb("report", again.recipe, "--run", again.run.root)
    assert done.returncode == 0, done.stderr
    assert (again.run.root / "report" / "index.html").stat().st_size > 10_000


def test_training_of_the_version_before_goes_on(former: Former) -> None:
    """All is done there, so what there is left is to see that."""
    run = former.folder / "goes-on"
    shutil.copytree(former.run.root, run)
    done = run_verb("train", former.recipe, "--run", run)
    assert done.returncode == 0, done.stderr
    best = former.run.read_json(former.run.summary, "train")["best_step"]
    assert f"best at step {best}" in done.stdout


def test_build_makes_all_but_the_weights_again(former: Former) -> None:
    """Of what that version left, its text not being there."""
    run = former.folder / "built"
    shutil.copytree(former.run.root, run)
    weights = sha256(Run(run).best)
    arguments = ("build", former.recipe, "--run", run, "--store", former.folder / "built-store")
    done = run_verb(*arguments)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "evaluate", "export", "archive"
    ]  # fmt: skip
    assert sha256(Run(run).best) == weights
    again = run_verb(*arguments)
    assert (again.returncode, again.stderr) == (0, "")


# Under TorchServe


@contextmanager
def serving(store: Path, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[TorchServe]:
    """Today's server, where the handler is found in the archive and nowhere else."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    patch.delenv("PYTHONPATH", raising=False)
    patch.chdir(elsewhere)
    with TorchServe(options(store)) as server:
        yield server


def assert_serves(server: Any, expected: dict[str, Any]) -> None:
    for case in CASES:
        reply = call(server, body={"text": expected["texts"], **expected["options"][case]})
        assert reply.status == 200, reply
        assert_told(reply.json["translations"], expected, "float32", case)


def test_an_old_archive_is_served_by_todays_server(
    former: Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new image comes first: it reads archives that are there already."""
    store = tmp_path / "store"
    store.mkdir()
    for name in (ARCHIVE, f"{ARCHIVE}.sha256"):
        shutil.copy(former.folder / name, store)
    with serving(store, tmp_path, monkeypatch) as server:
        assert_serves(server, former.expected)
        # With its own handler, not with the one that tests can import.
        (pid,) = workers(server)
        places = psutil.Process(pid).environ()["PYTHONPATH"].split(os.pathsep)
        modules = (Path(place, "handler", "service.py") for place in places)
        used = next(path for path in modules if path.exists())
        with zipfile.ZipFile(store / ARCHIVE) as content:
            assert used.read_bytes() == content.read("handler/service.py")


def test_a_new_archive_of_an_old_run_is_served(
    again: Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(again.folder / "store", tmp_path, monkeypatch) as server:
        assert_serves(server, again.expected)


def test_todays_handler_serves_a_model_that_was_not_exported_again(
    former: Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make mar` builds the archive again where the handler alone has changed."""
    shutil.copy(former.model("float32"), former.run.model)
    with serving(former.archived("mixed"), tmp_path, monkeypatch) as server:
        assert_serves(server, former.expected)


@contextmanager
def image_of_the_version_before(former: Former, store: Path, folder: Path) -> Iterator[Any]:
    """The `server` of that version, with all that its image has of the project and no more. The
    packages are today's."""
    with tarfile.open(former.folder / "image.tar.xz") as content:
        content.extractall(folder, filter="data")
    program = f"""\
import pathlib, sys
import server
assert pathlib.Path(server.__file__).parent.parent == pathlib.Path({str(folder)!r}), server.__file__
from server.__main__ import main
sys.exit(main(["serve", "--model-store", {str(store)!r}, "--free-ports"]))
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)  # python -c looks in its folder first
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True
        )
    guard = Timer(GUARD_SECONDS, process.terminate)
    guard.start()
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("ready: "):
                break
        assert told[-1].startswith("ready: "), told
        yield SimpleNamespace(url=told[-1].removeprefix("ready: ").strip())
    finally:
        guard.cancel()
        process.terminate()
        process.communicate(timeout=GUARD_SECONDS)


def test_a_new_archive_is_served_by_the_image_of_the_version_before(
    former: Former, again: Former, tmp_path: Path
) -> None:
    """A new archive comes first: pods of the former image start with it, also when a rollout of
    the image is undone."""
    image = tmp_path / "image"
    with image_of_the_version_before(former, again.folder / "store", image) as server:
        assert_serves(server, again.expected)


# What no version reads


def of_version(model: Path, version: int, path: Path) -> None:
    """`model` with another format version."""
    content = torch.jit.load(str(model))
    content.format_version = version
    content.save(str(path))


@pytest.mark.parametrize("version", sorted(UNKNOWN))
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_model_of_an_unknown_format_is_refused_with_what_to_do(
    former: Former, tmp_path: Path, weights: str, version: int
) -> None:
    path = tmp_path / "model.pt"
    of_version(former.model(weights), version, path)
    with pytest.raises(ValueError, match=rf"model\.pt: format version {version}\b.*export.* again"):
        load(str(path), torch.device("cpu"))


def test_the_command_line_refuses_it_so(former: Former) -> None:
    run = former.folder / "unknown"
    shutil.copytree(former.run.root, run)
    of_version(former.model("float32"), 99, run / "model.pt")
    for verb, more in (("translate", ()), ("archive", ("--store", run / "store"))):
        done = run_verb(verb, former.recipe, "--run", run, *more)
        assert done.returncode == 1
        assert "format version 99" in done.stderr
        assert "export" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (run / "store").exists()


def test_so_does_the_server_at_its_start(
    again: Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an archive of a later version was put together with this version's handler."""
    content, store = tmp_path / "content", tmp_path / "store"
    store.mkdir()
    with zipfile.ZipFile(again.folder / "store" / ARCHIVE) as archive:
        archive.extractall(content)
    of_version(again.run.model, 99, content / "model.pt")
    write_digests(content)
    with zipfile.ZipFile(store / ARCHIVE, "w") as archive:
        for path in sorted(p for p in content.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(content))
    (store / f"{ARCHIVE}.sha256").write_text(f"{sha256(store / ARCHIVE)}  {ARCHIVE}\n")
    with (
        pytest.raises(ServerError, match=r"format version 99\b.*export.* again"),
        serving(store, tmp_path, monkeypatch),
    ):
        pass
