"""The first process of a container: how it starts, serves and ends, with a real TorchServe."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # comes with torchserve
import pytest
from conftest import GUARD_SECONDS, HAPROXY, JAVA, JSON, PREDICT, ROOT, child_of
from test_container import MIG
from test_health import got, samples
from test_rest_streaming import heard
from test_server import group_members, pack

from server.devices import VISIBLE, WORKER_VISIBLE
from server.memory import MIB
from server.options import ServerOptions
from server.supervisor import Supervisor, SupervisorOptions

SLEEPER = """
import json, os, time

class Sleeper:
    def initialize(self, context):
        self.devices = [os.environ.get(name) for name in {names!r}]

    def handle(self, data, context):
        if data[0]["body"] == "sleep":
            time.sleep(1000)
        return [json.dumps(self.devices + [context.system_properties["gpu_id"]])] * len(data)
"""


def digested(store: Path) -> Path:
    archive = store / "seq2seq.mar"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    archive.with_name("seq2seq.mar.sha256").write_text(f"{digest}  seq2seq.mar\n")
    return store


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory) -> Path:
    """A store with an archive that tells its devices, and sleeps when it is told to."""
    store = tmp_path_factory.mktemp("sleeper")
    pack(store, "seq2seq", SLEEPER.format(names=(VISIBLE, WORKER_VISIBLE)))
    return digested(store)


# Archives: nothing is started


@pytest.fixture
def own_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("case", ["missing", "wrong", "both", "no archive", "no memory"])
def test_what_may_not_be_served_ends_it_before_java_starts(
    sleeper, tmp_path, monkeypatch, capsys, own_signals, case
):
    if case != "no archive":
        (tmp_path / "seq2seq.mar").write_bytes((sleeper / "seq2seq.mar").read_bytes())
    if case in ("both", "no memory"):
        digested(tmp_path)
    if case == "no memory":
        monkeypatch.setattr("server.torchserve.memory_limit", lambda: 300 * MIB)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("something was started"))
    sha256 = "0" * 64 if case in ("wrong", "both") else ""
    server = ServerOptions(
        tmp_path, port=0, management_port=0, metrics_port=0, sha256=sha256, require_digest=True
    )
    assert Supervisor(SupervisorOptions(server, "127.0.0.1", 0)).run() == 1
    said = capsys.readouterr().out
    message = {
        "missing": r"has no digest to check: put seq2seq\.mar\.sha256 beside it",
        "wrong": "has SHA-256 [0-9a-f]{64}, sha256 says 0{64}",
        "both": "has SHA-256 [0-9a-f]{64}, sha256 says 0{64}",
        "no archive": "not found",
        "no memory": "memory limit is 300 MiB: allowed is",
    }[case]
    assert re.search(f"^error: .*{message}", said, re.MULTILINE)


# Real servers


class Supervised:
    """`python -m server supervise` in a process of its own."""

    def __init__(self, store: Path, *arguments: str, **popen) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.health = free.getsockname()[1]
        self.lines: list[str] = []
        command = [
            *(sys.executable, "-m", "server", "supervise", "--model-store", str(store)),
            *("--host", "127.0.0.1", "--metrics-host", "127.0.0.1", "--port", "0"),
            *("--management-port", "0", "--metrics-port", "0", "--health-port", str(self.health)),
            *arguments,
        ]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **{**piped, **popen})

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        java = self.java
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if java is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(java, signal.SIGKILL)

    @property
    def java(self) -> int | None:
        found = child_of(self.process.pid, JAVA)
        return found.pid if found is not None else None

    @property
    def front(self) -> psutil.Process | None:
        return child_of(self.process.pid, HAPROXY)

    def until(self, start: str) -> str:
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return line
        raise AssertionError(f"ended before {start!r}: {''.join(self.lines)}")

    def until_ready(self) -> str:
        """Host and port of requests."""
        return urlsplit(re.search(r"http://[\w.:]+", self.until("ready: "))[0]).netloc

    def probe(self, path: str) -> tuple[int, str]:
        return got(self.health, path)

    def until_probe(self, path: str, status: int) -> str:
        """What the probe says once it has this status."""
        deadline = time.monotonic() + GUARD_SECONDS
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                found, said = self.probe(path)
                if found == status:
                    return said
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        return samples(self.probe("/metrics")[1])

    def end(self) -> tuple[int, str]:
        """Exit status and what was said until then."""
        out, _ = self.process.communicate(timeout=GUARD_SECONDS)
        return self.process.returncode, "".join(self.lines) + (out or "")


def test_a_signal_during_the_start_ends_it_with_nowhere_to_write(sleeper):
    """No space is left for the log; nobody is waited for, whatever the settling time."""
    with open("/dev/full", "w") as full, Supervised(
        sleeper, "--settle-seconds", "1000", stdout=full, stderr=full
    ) as one:
        one.until_probe("/livez", 200)
        deadline = time.monotonic() + GUARD_SECONDS
        while (java := one.java) is None:
            assert time.monotonic() < deadline
        assert one.probe("/startupz") == (503, "the model is loading\n")
        assert one.probe("/readyz") == (503, "the model is loading\n")
        assert one.metrics()["seq2serve_ready"] == 0
        one.process.send_signal(signal.SIGTERM)
        assert one.end()[0] == 0
        assert group_members(java) == []


def test_a_second_signal_skips_the_waiting_and_tells_that_a_request_was_lost(sleeper, monkeypatch):
    """With a device that TorchServe itself cannot read, and nobody who reads the log."""
    monkeypatch.setenv(VISIBLE, MIG)
    waiting = ("--settle-seconds", "1000", "--drain-seconds", "1000", "--stop-seconds", "1")
    with Supervised(sleeper, *waiting) as one:
        address, java = one.until_ready(), one.java
        one.process.stdout.close()
        assert json.loads(answered(address, "tell")) == ["0", MIG, 0]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(answered, address, "sleep")
            one.process.send_signal(signal.SIGTERM)
            assert one.until_probe("/readyz", 503) == "draining\n"
            assert one.probe("/livez")[0] == 200
            assert one.metrics()["seq2serve_draining"] == 1
            one.process.send_signal(signal.SIGTERM)
            assert one.process.wait(GUARD_SECONDS) == 1
            with pytest.raises((OSError, http.client.HTTPException)):
                asked.result(GUARD_SECONDS)
        assert group_members(java) == []


def answered(address: str, text: str) -> bytes:
    with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
        connection.request("POST", PREDICT, text, {"Content-Type": "text/plain"})
        return connection.getresponse().read()


def test_when_java_is_killed_it_ends_with_the_reason(sleeper):
    with Supervised(sleeper, "--settle-seconds", "1000") as one:
        one.until_ready()
        java = one.java
        os.kill(java, signal.SIGKILL)
        status, said = one.end()
        assert status == 1
        assert re.search(r"^error: TorchServe stopped with exit status -9: ", said, re.MULTILINE)
        assert group_members(java) == []


def test_a_front_that_dies_is_replaced_and_java_that_is_silent_is_told(sleeper):
    with Supervised(sleeper, "--settle-seconds", "1000") as one:
        address = one.until_ready()
        assert one.until_probe("/readyz", 200) == "ok\n"
        one.front.kill()
        assert json.loads(answered(address, "tell"))
        assert one.metrics()["seq2serve_front_restarts_total"] == 1
        java, front = psutil.Process(one.java), one.front
        java.suspend()
        assert re.fullmatch(
            r"TorchServe has not answered for 1\d s\n", one.until_probe("/livez", 503)
        )
        java.resume()
        one.until_probe("/livez", 200)
        one.process.kill()
        assert front.wait(GUARD_SECONDS) is None or not front.is_running()


# In flight when the end is asked for: more than run at once, so that some wait in the queue.
IN_FLIGHT, STREAMS, LATE = 200, 50, 10
ASKED = {"text": ["9" * 60, "1" * 60], "beam_size": 4, "min_length": 60}


def outcome(address: str, stream: bool, right: list[str], begun: threading.Event) -> str:
    try:
        with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
            connection.request("POST", PREDICT, json.dumps({**ASKED, "stream": stream}), JSON)
            reply = connection.getresponse()
            if stream and reply.peek(1):
                begun.set()
            received = reply.read()
        if reply.status != 200:
            return f"{reply.status} {received[:200]!r}"
        answer = heard(received)[1] if stream else json.loads(received)
        best = [found[0]["text"] for found in answer["translations"]]
        return ("stream" if stream else "whole") if best == right else "wrong"
    except (OSError, http.client.HTTPException, AssertionError) as error:
        return repr(error)


def client(ending: threading.Event, *asking) -> Counter[str]:
    """One who asks again and again until `ending`, so that the queue is long on a fast machine."""
    outcomes = Counter([outcome(*asking)])
    while not ending.is_set():
        outcomes[outcome(*asking)] += 1
    return outcomes


def test_a_life_from_the_start_to_an_end_that_loses_nothing(toy):
    """What probes say on the way; a worker that is killed thrice; and 200 requests at the end."""
    times = ("--settle-seconds", "2", "--drain-seconds", str(GUARD_SECONDS))
    with Supervised(toy.store, *times) as one:
        address, java = one.until_ready(), one.java
        assert one.until_probe("/readyz", 200) == "ok\n"
        assert one.probe("/startupz") == one.probe("/livez") == (200, "ok\n")
        figures = one.metrics()
        assert figures.pop("seq2serve_start_seconds") > 0
        digest = (toy.store / "seq2seq.mar.sha256").read_text().split()[0]
        labels = f'name="seq2seq",version="{toy.recipe.export.version}",sha256="{digest}"'
        assert f"seq2serve_model_info{{{labels}}} 1" in one.probe("/metrics")[1]
        assert figures.pop("seq2serve_live_requests") == 0
        assert figures == {
            "seq2serve_ready": 1, "seq2serve_draining": 0, "seq2serve_worker_restarts_total": 0,
            "seq2serve_front_restarts_total": 0,
            "seq2serve_pending_requests": 0, "seq2serve_model_info": 1,
        }

        for restarts in (1, 2, 3):  # whatever kills it again and again, the pod lives
            (worker,) = psutil.Process(java).children()
            worker.kill()
            assert one.until_probe("/readyz", 503) == "no worker is ready\n"
            assert one.probe("/livez")[0] == one.probe("/startupz")[0] == 200
            one.until_probe("/readyz", 200)
            assert one.metrics()["seq2serve_worker_restarts_total"] == restarts

        (right,) = {tuple(asked(address)) for _ in range(2)}
        begun, ending = threading.Event(), threading.Event()
        with ThreadPoolExecutor(IN_FLIGHT + LATE) as pool, contextlib.ExitStack() as stack:
            stack.callback(ending.set)  # a failed test waits for nobody
            early = [
                pool.submit(client, ending, address, i < STREAMS, list(right), begun)
                for i in range(IN_FLIGHT)
            ]
            assert begun.wait(GUARD_SECONDS)
            deadline = time.monotonic() + GUARD_SECONDS
            while one.metrics()["seq2serve_pending_requests"] < IN_FLIGHT / 4:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            ending.set()
            one.process.send_signal(signal.SIGTERM)
            assert one.until_probe("/readyz", 503) == "draining\n"
            late = [
                pool.submit(outcome, address, i % 2 == 0, list(right), begun) for i in range(LATE)
            ]
            status, said = one.end()
            early = sum((each.result(GUARD_SECONDS) for each in early), Counter())
            late = Counter(each.result(GUARD_SECONDS) for each in late)
        print(f"{IN_FLIGHT} clients until SIGTERM: {early}; while settling: {late}")
        print(said)
        assert set(early) == {"stream", "whole"}
        assert early.total() >= IN_FLIGHT
        assert late == {"stream": LATE // 2, "whole": LATE // 2}
        assert status == 0
        assert "every request is answered" in said
        assert group_members(java) == []


def asked(address: str) -> list[str]:
    with closing(http.client.HTTPConnection(address, timeout=GUARD_SECONDS)) as connection:
        connection.request("POST", PREDICT, json.dumps(ASKED), JSON)
        answer = json.load(connection.getresponse())
    return [found[0]["text"] for found in answer["translations"]]
