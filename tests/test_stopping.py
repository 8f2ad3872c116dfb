"""A server ends when it is told to, whatever became of its output, and leaves nothing behind."""

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil  # comes with torchserve
import pytest
from conftest import GUARD_SECONDS, PREDICT, ROOT
from test_server import pack, read_until
from test_supervisor import digested

from server.output import Output, escaped

TALKER = '''
class Talker:
    """Writes a megabyte for each request."""

    def initialize(self, context):
        pass

    def handle(self, data, context):
        for _ in range(1000):
            print("x" * 1000, flush=True)
        return ["said"] * len(data)
'''


# Of `supervise`; its end is an error, 1, as nobody tells it that no request is in flight.
SUPERVISED = ("--host=127.0.0.1", "--settle-seconds=0", "--drain-seconds=0")


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("talker")
    pack(store, "seq2seq", TALKER)
    return digested(store)


@contextlib.contextmanager
def running(verb: str, store: Path, state: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`python -m server VERB`, ready, with pipes for its output, and its port."""
    with contextlib.ExitStack() as held:
        free = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        port, *others = (one.getsockname()[1] for one in free)
    names = ("--management-port", "--metrics-port", "--health-port")
    flags = [f"--port={port}", *map("{}={}".format, names, others)]
    flags = flags[:3] if verb == "serve" else [*flags, *SUPERVISED]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", verb, "--model-store", store, *flags],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(state)},
    )
    try:
        read_until(process, "ready: ")
        yield process, port
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """HAProxy, Java and the worker."""
    found = {Path(one.exe()).name: one for one in psutil.Process(process.pid).children()}
    assert set(found) == {"haproxy", "java"}
    (worker,) = found["java"].children()
    return [*found.values(), worker]


def gone(*processes: psutil.Process) -> bool:
    _, alive = psutil.wait_procs(processes, GUARD_SECONDS)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def ask(port: int) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=GUARD_SECONDS)) as one:
        one.request("POST", PREDICT, b"{}", {"Content-Type": "application/json"})
        return one.getresponse().read()


@pytest.mark.parametrize(
    ("verb", "number", "status"),
    [
        ("serve", signal.SIGHUP, 128 + signal.SIGHUP),
        ("serve", signal.SIGQUIT, 128 + signal.SIGQUIT),
        ("supervise", signal.SIGHUP, 1),
        ("supervise", signal.SIGQUIT, 1),
    ],
)
def test_every_signal_that_asks_for_the_end_is_obeyed(talker, tmp_path, verb, number, status):
    with running(verb, talker, tmp_path) as (process, _):
        all_of_it = family(process)
        process.send_signal(number)
        assert process.wait(GUARD_SECONDS) == status
        assert gone(*all_of_it)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends orphans")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_whatever_a_server_started_dies_with_it(talker, tmp_path, number):
    with running("serve", talker, tmp_path) as (process, port):
        all_of_it = family(process)
        process.send_signal(number)
        process.wait(GUARD_SECONDS)
        assert gone(*all_of_it)
        socket.create_server(("127.0.0.1", port)).close()  # for the next one


@pytest.mark.parametrize("verb", ["serve", "supervise"])
def test_output_that_nobody_reads_stops_neither_requests_nor_the_end(talker, tmp_path, verb):
    with running(verb, talker, tmp_path) as (process, port):
        all_of_it = family(process)
        assert [ask(port) for _ in range(3)] == [b"said"] * 3  # 3 MB, of which a pipe takes 64 kB
        process.terminate()
        assert process.wait(GUARD_SECONDS) == (1 if verb == "supervise" else 128 + signal.SIGTERM)
        assert gone(*all_of_it)


# Lines


@pytest.fixture
def pipe(monkeypatch) -> Iterator[tuple[Output, int]]:
    """An output, and the end of the pipe behind it that a reader has."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "piped", stream, raising=False)
        yield Output("piped"), reader
        os.close(reader)


def read(reader: int) -> str:
    found = b""
    while select.select([reader], [], [], 0)[0]:
        found += os.read(reader, 1 << 16)
    return found.decode()


def test_lines_without_a_reader_are_counted_and_the_next_reader_is_told(pipe):
    output, reader = pipe
    for i in range(300):
        output.say(f"{i} " + "x" * 990)
    first = read(reader)
    *whole, _ = first.split("\n")
    assert [line.split()[0] for line in whole] == [str(i) for i in range(len(whole))]
    output.say("again")
    lost, again, end = read(reader).split("\n")[-3:]
    assert (again, end) == ("again", "")
    assert lost == f"{300 - len(whole)} lines are lost that nobody read in time"


def test_a_line_longer_than_a_pipe_that_is_read_arrives_whole(pipe):
    output, reader = pipe
    with subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.PIPE, text=True) as cat:
        line = "ä" * 30_000
        output.say(line)
        assert cat.stdout is not None
        assert cat.stdout.read(len(line) + 1) == line + "\n"
        cat.kill()


def test_a_reader_that_has_left_is_no_error(pipe):
    output, reader = pipe
    sink = os.open(os.devnull, os.O_RDONLY)
    os.dup2(sink, reader)
    os.close(sink)
    for _ in range(3):
        output.say("to nobody")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("GET /\x1b[2J\x1b]0;x\x07", r"GET /\x1b[2J\x1b]0;x\x07"),
        ("first\rsecond\nthird", r"first\rsecond\nthird"),
        ("\x9b31m\x7f\u2028\u202e", r"\x9b31m\x7f\u2028\u202e"),
        ("\tat 날짜 ä \\ 'x'", "\tat 날짜 ä \\ 'x'"),
        ("\udcff", r"\udcff"),
    ],
)
def test_control_characters_are_escaped(line, shown):
    assert escaped(line) == shown
