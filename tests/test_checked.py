"""What was checked is what runs: modules, files of the archive, paths in every locale."""

import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_server import GUARD_SECONDS, one_line, options, pack

from handler.authorization import VARIABLE
from server import environment
from server.archive import check_archive
from server.client import translate
from server.environment import TOKENS, check_spelling, inherited_environment, utf8_locale
from server.errors import ServerError
from server.torchserve import TorchServe
from training.archive import stage

TELLER = """
import json, os, sys
import yaml

class Teller:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        told = [yaml.__file__, os.environ["LC_ALL"], os.environ.get("SEQ2SERVE_TOKENS")]
        return [json.dumps({"translations": [[{"text": one}] for one in told]})] * len(data)
"""
FOREIGN = 'raise SystemExit("a foreign module runs")\n'


@pytest.fixture
def content(tmp_path) -> Path:
    """An archive's files, with nothing for weights."""
    run = SimpleNamespace(model=tmp_path / "model.pt", tokenizer=tmp_path, root=tmp_path)
    for name in ("model.pt", "source.model", "target.model"):
        (tmp_path / name).write_bytes(b"0")
    (tmp_path / "MAR-INF").mkdir()
    stage(run, tmp_path / "content")
    return tmp_path / "content"


@pytest.fixture
def foreign(tmp_path) -> Path:
    folder = tmp_path / "foreign"
    (folder / "handler").mkdir(parents=True)
    (folder / "handler" / "__init__.py").write_text(FOREIGN)
    return folder


def loaded(content: Path, *before: Path, first: str = "") -> subprocess.CompletedProcess:
    """The archive's module in a process like a worker's, in which `first` runs before."""
    program = f"{first}\nimport seq2serve, handler.service\nprint(handler.service.__file__)"
    path = os.pathsep.join(map(str, (*before, content, "")))  # as TorchServe makes it
    return subprocess.run(
        [sys.executable, "-c", program], cwd=content.parent, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": path}, timeout=GUARD_SECONDS, check=False,
    )


# The archive, in any TorchServe


def test_the_worker_imports_the_archives_modules_whatever_pythonpath_holds(content, foreign):
    for name in ("yaml.py", "sentencepiece.py"):  # imported after the archive's module, if at all
        (foreign / name).write_text(FOREIGN)
    for _ in range(2):  # a worker that is started again finds what the former one left
        done = loaded(content, foreign)
        assert (done.returncode, done.stdout) == (0, f"{content / 'handler' / 'service.py'}\n")


@pytest.mark.parametrize("name", ["yaml", "handler"])
def test_a_module_that_was_imported_in_the_place_of_another_is_named(content, foreign, name):
    (foreign / "yaml.py").write_text("")
    (foreign / "handler" / "__init__.py").write_text("")
    done = loaded(content, foreign, first=f"import {name}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"RuntimeError: module {name} was imported from {foreign}/{name}")
    assert last.endswith("start TorchServe without PYTHONPATH")


def test_packages_that_are_in_pythonpath_alone_are_used(content, foreign):
    (foreign / "only_here.py").write_text("")
    done = loaded(content, foreign, first="import only_here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["sitecustomize.py", "torch/__init__.py", "handler/__pycache__/doors.cpython-311.pyc"]
)
def test_a_file_that_no_digest_lists_is_refused_by_name(content, name):
    (content / name).parent.mkdir(exist_ok=True)
    (content / name).write_text("")
    done = loaded(content)
    assert done.returncode == 1
    message = f"IntegrityError: {name} is in the archive, and digests.json does not list it"
    assert message in done.stderr.splitlines()[-1]


def test_changed_code_is_refused_before_it_runs(content):
    (content / "handler" / "doors.py").write_text(FOREIGN)
    done = loaded(content)
    assert "a foreign module runs" not in done.stderr
    assert "IntegrityError: handler/doors.py in the archive" in done.stderr.splitlines()[-1]


def test_the_loader_finds_its_one_class_and_no_function(content):
    program = (
        "import seq2serve\n"
        "from ts.utils.util import list_classes_from_module\n"
        "print(list_classes_from_module(seq2serve), hasattr(seq2serve, 'handle'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=content, text=True,
        capture_output=True, timeout=GUARD_SECONDS, check=False,
    )
    assert done.stdout == "[<class 'seq2serve.Handler'>] False\n", done.stderr


# The archive, before Java starts


def archived(content: Path, *more: tuple[str, bytes]) -> Path:
    archive = content.parent / "seq2seq.mar"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as built:
        built.writestr("MAR-INF/MANIFEST.json", "{}")
        for path in sorted(content.rglob("*")):
            built.write(path, path.relative_to(content))
        for name, data in more:
            built.writestr(name, data)
    return archive


def test_the_server_refuses_what_no_digest_lists(content):
    check_archive(archived(content))
    with pytest.raises(ServerError, match=r"has sitecustomize\.py, which its digests") as error:
        check_archive(archived(content, ("sitecustomize.py", b"")))
    one_line(error)


@pytest.mark.parametrize("record", [b"[]", b"{", b"\xff"])
def test_a_record_that_cannot_be_read_is_refused(content, record):
    (content / "digests.json").write_bytes(record)
    with pytest.raises(ServerError, match="is no complete model archive") as error:
        check_archive(archived(content))
    one_line(error)


def test_an_archive_that_expands_beyond_any_model_is_refused(content, monkeypatch):
    archive = archived(content, ("model.pt.zeros", bytes(20 << 20)))
    monkeypatch.setattr("server.archive._SMALL", 2 << 20)
    with pytest.raises(ServerError, match="allowed is 20 times its size, or 2097152") as error:
        check_archive(archive)
    one_line(error)
    monkeypatch.setattr("server.archive._SMALL", 40 << 20)
    with pytest.raises(ServerError, match=r"has model\.pt\.zeros"):
        check_archive(archive)


@pytest.mark.parametrize("checksum", [None, zlib.crc32(bytes(11))])
def test_an_archive_that_expands_to_more_than_it_says_is_refused(tmp_path, checksum):
    archive = tmp_path / "seq2seq.mar"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as built:
        built.writestr("MAR-INF/MANIFEST.json", bytes(3 << 20))
        (member,) = built.infolist()
        member.file_size = 10  # in the list at the end
        member.CRC = checksum or member.CRC
    with pytest.raises(ServerError, match=r"is no complete model archive.*MANIFEST\.j") as error:
        check_archive(archive)
    one_line(error)


def test_a_disk_without_room_is_told_before_anything_is_unpacked(teller, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    server = TorchServe(replace(options(teller), state_dir=tmp_path))
    with pytest.raises(ServerError, match="has 10 bytes free, and the archive unpacks to"), server:
        pytest.fail("is started")
    assert list(tmp_path.iterdir()) == []


# The environment of Java and the worker


@pytest.fixture(scope="module")
def teller(tmp_path_factory) -> Path:
    """A store whose path is not ASCII, of a handler that tells what it was given."""
    store = tmp_path_factory.mktemp("날짜-ä")
    pack(store, "seq2seq", TELLER)
    return store


@pytest.mark.parametrize("given", ["C", "POSIX"])
def test_a_worker_is_told_nothing_of_pythonpath_and_paths_are_read_in_any_locale(
    teller, foreign, tmp_path, monkeypatch, given
):
    for name in ("yaml.py", "seq2seq_handler.py", "sitecustomize.py", "ts.py"):
        (foreign / name).write_text(FOREIGN)
    monkeypatch.setenv("PYTHONPATH", str(foreign))
    monkeypatch.setenv("LC_ALL", given)
    monkeypatch.setenv(TOKENS, "some/folder")
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "état"
    with TorchServe(replace(options(teller), state_dir=state)) as server:
        answer = translate(server.url, ["a", "b", "c"])
    yaml, spelling, tokens = (one[0]["text"] for one in answer["translations"])
    assert not Path(yaml).is_relative_to(foreign)
    assert spelling in ("C.UTF-8", "C.utf8")
    assert tokens == str(tmp_path / "some" / "folder")


def test_a_package_in_pythonpath_alone_is_named(tmp_path, monkeypatch):
    (tmp_path / "sentencepiece").mkdir()
    (tmp_path / "sentencepiece" / "__init__.py").write_text("")
    given = {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert inherited_environment({**given, "A": "b"}, None) == {"A": "b"}
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ServerError, match="sentencepiece is found through PYTHONPATH alone") as e:
        inherited_environment(given, None)
    one_line(e)


def test_the_environments_own_folder_in_pythonpath_changes_nothing():
    folder = str(Path(pytest.__file__).parent.parent)
    assert inherited_environment({"PYTHONPATH": folder, "A": "b"}, None) == {"A": "b"}


def test_a_system_without_a_locale_of_utf8_is_told_by_path(monkeypatch):
    monkeypatch.setattr(environment, "_LOCALES", ("xx_XX.UTF-8",))
    assert utf8_locale({"LC_ALL": "C"}) is None
    check_spelling([Path("/a/b")], None)
    check_spelling([Path("/a/날짜")], "C.UTF-8")
    if sys.platform != "darwin":
        with pytest.raises(ServerError, match="path /a/날짜 is not ASCII") as error:
            check_spelling([Path("/a/b"), Path("/a/날짜")], None)
        one_line(error)


def test_the_variable_of_tokens_is_the_handlers():
    assert TOKENS == VARIABLE
