"""What Java is given: CPUs, threads, flags, and its classes from the start before."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil  # comes with torchserve
import pytest
from test_server import ECHO, options, pack

from server.classes import record_classes
from server.client import translate
from server.cpus import FRONTEND, frontend_cpus, usable_cpus
from server.errors import ServerError
from server.java import Java, find_java
from server.jvm import classes_file, jvm_flags
from server.memory import Shares
from server.torchserve import TorchServe


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    pack(store, "seq2seq", ECHO)
    return store


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 9),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 9),
        ("0::/\n", {"cpu.max": ""}, 9),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, 1),
        ("1:cpu:/y\n0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("", {"cpu.max": "100000 100000"}, 9),
    ],
)
def test_cpus_are_those_of_the_narrowest_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(tmp_path, own) == cpus
    assert usable_cpus(tmp_path, tmp_path / "missing") == 9


@pytest.mark.parametrize(("usable", "given"), [(1, 1), (3, 3), (64, FRONTEND)])
def test_java_gets_no_more_cpus_than_it_needs(
    store: Path, monkeypatch: pytest.MonkeyPatch, usable: int, given: int
) -> None:
    monkeypatch.setattr("server.cpus.usable_cpus", lambda: usable)
    assert frontend_cpus() == given
    started: dict[str, object] = {}

    def note(command: list[str], env: dict[str, str], **how: object) -> None:
        started.update(command=command, env=env)
        raise ServerError("enough")

    monkeypatch.setattr("server.torchserve.find_java", lambda: Java(Path("java"), 17))
    monkeypatch.setattr("server.torchserve.Front.start", lambda self: None)
    monkeypatch.setattr("subprocess.Popen", note)
    server = TorchServe(options(store))
    with pytest.raises(ServerError, match="enough"):
        server.start()
    server.stop()
    command, environment = started["command"], started["env"]
    assert isinstance(command, list)
    assert isinstance(environment, dict)
    assert f"-XX:ActiveProcessorCount={given}" in command
    assert environment["TS_NUMBER_OF_NETTY_THREADS"] == str(given)


def test_classes_are_taken_where_there_are_some(tmp_path: Path) -> None:
    assert classes_file(17) != classes_file(25)
    classes = tmp_path / "classes.jsa"
    memory = Shares(256, 160)
    without = jvm_flags(memory, 2, classes, None)
    assert {"-Xmx256m", "-XX:MaxDirectMemorySize=160m"} <= set(without)
    classes.touch()
    assert set(jvm_flags(memory, 2, classes, None)) - set(without) == {
        f"-XX:SharedArchiveFile={classes}"
    }
    recording = jvm_flags(memory, 2, classes, tmp_path)
    assert not any("SharedArchiveFile" in flag for flag in recording)


def test_classes_that_java_wrote_are_used_and_others_are_not_needed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = record_classes(find_java(), tmp_path / "new" / "classes.jsa")
    assert list(classes.parent.iterdir()) == [classes]
    monkeypatch.setattr("server.torchserve.classes_file", lambda version: classes)

    def mapped() -> bool:
        with TorchServe(options(store)) as server:
            assert translate(server.url, ["a"])["translations"] == [[{"text": "A"}]]
            return str(classes) in {each.path for each in psutil.Process(server.pid).memory_maps()}

    assert mapped() == (sys.platform == "linux")
    classes.write_text("no classes")
    assert not mapped()


def test_java_that_writes_no_classes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.classes._load_classes", lambda store, names: names.touch())
    false = shutil.which("false")
    assert false is not None
    target = tmp_path / "classes.jsa"
    target.write_text("of the time before")
    with pytest.raises(ServerError, match=r"false wrote no classes, and said: nothing"):
        record_classes(replace(find_java(), path=Path(false)), target)
    assert target.read_text() == "of the time before"
    assert list(tmp_path.iterdir()) == [target]
