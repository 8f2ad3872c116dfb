"""What a server logs: levels, the one switch, and nothing that grows with requests."""

import http.client
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import Popen
from urllib.parse import urlsplit

import pytest
from conftest import JAVA, child_of
from test_server import GUARD_SECONDS, pack, read_until, serve

from handler import logs
from server.__main__ import main
from server.log import with_level, without_quotes
from server.options import VERBOSE

SPEAKER = """
import logging
from levels import set_up


class Speaker:
    def initialize(self, context):
        set_up()

    def handle(self, data, context):
        return [self.answer(each["body"]) for each in data]

    def answer(self, request):
        for level in request["levels"]:
            logging.log(level, "a level\\nof two lines")
        if request["fails"]:
            try:
                raise ValueError("no such word")
            except ValueError:
                logging.exception("it failed")
        return "done"
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a handler that logs what it is told to, as handler/logs.py does."""
    store = tmp_path_factory.mktemp("store")
    shutil.copy(logs.__file__, store / "levels.py")
    pack(store, "seq2seq", SPEAKER, store / "levels.py")
    return store


@contextmanager
def served(store: Path, *flags: str) -> Iterator[tuple[str, "Popen[str]"]]:
    """Host and port of requests, and the process of the server."""
    with serve(store, *flags) as process:
        try:
            yield urlsplit(read_until(process, "ready: ")[len("ready: "):].strip()).netloc, process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=GUARD_SECONDS)


def ask(address: str, levels: tuple[int, ...] = (), fails: bool = False) -> None:
    body, kind = json.dumps({"levels": levels, "fails": fails}), "application/json"
    with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
        connection.request("POST", "/predictions/seq2seq", body, {"Content-Type": kind})
        assert connection.getresponse().read() == b"done"


def lines_until(process: "Popen[str]", text: str) -> list[str]:
    """What is logged up to a line that has `text`, without the time of each line."""
    assert process.stderr is not None
    lines: list[str] = []
    guard = threading.Timer(GUARD_SECONDS, process.terminate)
    guard.start()
    try:
        for line in process.stderr:
            lines.append(re.sub(r"^[\d:,T-]{19,} ", "", line.rstrip("\n")))
            if text in line:
                return lines
    finally:
        guard.cancel()
    raise AssertionError(f"ended before {text!r}: {lines}")


def test_a_request_writes_no_line_and_an_error_writes_errors(store: Path) -> None:
    with served(store) as (address, process):
        for _ in range(20):
            ask(address)
        ask(address, (10, 20, 30, 40), fails=True)
        lines = lines_until(process, "ValueError: no such word")
        java = child_of(process.pid, JAVA)
        assert java is not None
        written = [path for path in Path(java.cwd()).rglob("*.log") if path.stat().st_size]
    assert lines[:8] == [
        *(f"{level:<5} MODEL_LOG - {text}" for level in ("INFO", "WARN", "ERROR")
          for text in ("a level", "of two lines")),
        "ERROR MODEL_LOG - it failed",
        "ERROR MODEL_LOG - Traceback (most recent call last):",
    ]  # fmt: skip
    assert all(line.startswith("ERROR MODEL_LOG - ") for line in lines[8:])
    # Standard output is all that is written, so no disk fills up.
    assert written == []


@pytest.mark.parametrize("flags", [("--verbose",), ()])
def test_one_switch_shows_all(
    store: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv(VERBOSE, "false" if flags else "true")
    with served(store, *flags) as (address, process):
        ask(address)
        lines_until(process, "MODEL_LOG - Torch worker started.")
        lines = lines_until(process, '"POST /predictions/seq2seq')
        assert any("MODEL_LOG - INFO" not in line and "Backend received" in line for line in lines)


def test_the_switch_is_true_or_false(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VERBOSE, "yes")
    for command in ("serve", "supervise"):
        with pytest.raises(SystemExit):
            main([command])
        assert "--verbose: got 'yes'; allowed: true or false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("INFO  MODEL_LOG - WARNING it is late", "WARN  MODEL_LOG - it is late"),
        ("INFO  MODEL_LOG - CRITICAL over", "FATAL MODEL_LOG - over"),
        ("INFO  MODEL_LOG - ERROR   File x", "ERROR MODEL_LOG -   File x"),
        ("INFO  MODEL_LOG - ERROR", "ERROR MODEL_LOG - "),
        ("INFO  MODEL_LOG - ERRORS are rare", "INFO  MODEL_LOG - ERRORS are rare"),
        ("WARN  MODEL_LOG - standard error", "WARN  MODEL_LOG - standard error"),
        ("WARN  WorkerThread - ERROR of Java", "WARN  WorkerThread - ERROR of Java"),
    ],
)
def test_the_level_of_a_line_is_the_workers(said: str, shown: str) -> None:
    time = "2026-01-01T00:00:00,000"
    assert with_level(f"{time} {said}") == f"{time} {shown}"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "ERROR HttpRequestHandler -  io.netty.Post$ErrorDataDecoderException: Bad: 'a se'",
            "WARN  HttpRequestHandler - a request ended in io.netty.Post$ErrorDataDecoderException",
        ),
        (
            "ERROR HttpRequestHandler -  java.lang.IllegalArgumentException: bad /a/secret%zz",
            "WARN  HttpRequestHandler - a request ended in java.lang.IllegalArgumentException",
        ),
        (
            "ERROR HttpRequestHandler -  java.lang.OutOfMemoryError: Java heap space",
            "ERROR HttpRequestHandler -  java.lang.OutOfMemoryError: Java heap space",
        ),
        (
            'INFO  ACCESS_LOG - /127.0.0.1:80 "GET /predictions/m?a=secret&b HTTP/1.1" 200 12',
            'INFO  ACCESS_LOG - /127.0.0.1:80 "GET /predictions/m?... HTTP/1.1" 200 12',
        ),
        (
            'INFO  ACCESS_LOG - /127.0.0.1:80 "GET /ping HTTP/1.1" 200 12',
            'INFO  ACCESS_LOG - /127.0.0.1:80 "GET /ping HTTP/1.1" 200 12',
        ),
    ],
)
def test_a_line_does_not_tell_what_a_client_said(said: str, shown: str) -> None:
    time = "2026-01-01T00:00:00,000"
    assert without_quotes(f"{time} {said}") == f"{time} {shown}"
