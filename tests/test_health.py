"""What probes are told: how much is known of TorchServe, and when a drain is over; no server."""

import contextlib
import http.client
import re
import socket
import subprocess
import sys
from contextlib import closing

import pytest
from conftest import GUARD_SECONDS, ROOT

from server.errors import ServerError
from server.health import HealthServer, prometheus
from server.options import ServerOptions
from server.ports import unsent
from server.supervisor import SILENT, STALE, Supervisor, SupervisorOptions
from server.watch import Snapshot, Watch, read_snapshot

# What is known of TorchServe


def version(status="READY", pid=7, pending=0) -> dict:
    worker = {"status": status, "pid": pid}
    return {
        "modelVersion": "1.0", "workers": [worker], "jobQueueStatus": {"pendingRequests": pending}
    }


def gauges(live=0, pending=0) -> str:
    labels = '{model_name="seq2seq",Hostname="a",}'
    text = f"# TYPE x gauge\nseq2seq_live_requests{labels} {live}.0\n"
    return text + f"seq2seq_pending_requests{labels} {pending}.0\n"


def test_a_snapshot_is_what_management_and_metrics_say():
    found = read_snapshot(5.0, [version(pending=3)], gauges(2, 4))
    assert found == Snapshot(5.0, True, "1.0", (7,), 3, 6)
    assert found.told == "3 in the queue, 6 in the handler"
    found = read_snapshot(5.0, [version("UNLOADED", pid=-1)], "")
    assert (found.ready, found.workers, found.live) == (False, (), None)


class Told(Watch):
    """A watch that is told what it sees."""

    def __init__(self):
        self.server = supervisor().server
        super().__init__(self.server)

    def sees(self, time, *versions, metrics=""):
        self._keep(read_snapshot(time, versions, metrics))


def supervisor(**options) -> Supervisor:
    server = ServerOptions(port=0, management_port=0, metrics_port=0)
    return Supervisor(SupervisorOptions(server, "127.0.0.1", 0, **options))


def test_restarts_are_counted_by_the_worker_that_is_ready():
    watch = Told()
    for pid, status in ((7, "READY"), (7, "READY"), (-1, "UNLOADED"), (9, "READY"), (9, "READY")):
        watch.sees(1.0, version(status, pid))
    assert watch.restarts == 1
    assert watch.started == 1.0


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("server.supervisor.time.monotonic", lambda: now[0])
    monkeypatch.setattr("server.supervisor.unsent", lambda port: 0)
    return now


class Leaving:
    """A front that is told whether its last connection is closed, and notes what it is asked."""

    pid, restarts = None, 0

    def __init__(self):
        self.asked = []
        self.over = self.lost = False

    def close(self):
        self.asked.append("close")

    def leave(self):
        self.asked.append("leave")

    def gone(self):
        return self.over


def watched(clock) -> tuple[Supervisor, Told]:
    one = supervisor()
    one.server._ports = {"inference": 1}
    one.server._front = Leaving()
    watch = one.watch = Told()
    return one, watch


def test_a_drain_is_over_when_the_front_has_ended_and_all_is_read(clock, monkeypatch):
    one, _ = watched(clock)
    assert not one.drained()
    one.server.front.over = True
    assert one.drained()
    monkeypatch.setattr("server.supervisor.unsent", lambda port: 1)
    assert not one.drained()


def test_a_drain_closes_connections_first_and_the_door_when_it_has_settled(clock, monkeypatch):
    one, watch = watched(clock)
    one.signals, front, start = 1, one.server.front, clock[0]
    seen = {}

    def tick():
        clock[0] += 1
        watch.sees(clock[0], version(), metrics=gauges(0))
        seen.setdefault(tuple(front.asked), clock[0] - start)
        front.over = clock[0] - start > one.options.settle_seconds + 5

    monkeypatch.setattr(one, "_tick", tick)
    assert one._serve() == 0
    assert seen == {("close",): 1, ("close", "leave"): one.options.settle_seconds + 1}
    assert clock[0] - start == one.options.settle_seconds + 6


def test_a_front_that_broke_off_has_lost_requests(clock, monkeypatch):
    one, watch = watched(clock)
    one.signals = 1

    def tick():
        clock[0] += 1
        watch.sees(clock[0], version(), metrics=gauges(0))
        one.server.front.lost = "leave" in one.server.front.asked

    monkeypatch.setattr(one, "_tick", tick)
    assert one._serve() == 1


@pytest.mark.parametrize(
    ("live", "queued", "unread", "signals", "status"),
    [
        (0, 0, 0, 1, 0), (1, 0, 0, 1, 1), (0, 1, 0, 1, 1), (0, 0, 1, 1, 1), (None, 0, 0, 1, 1),
        (0, 0, 0, 2, 0), (1, 0, 0, 2, 1),
    ],
)
def test_the_exit_status_tells_whether_a_request_was_cut_off(
    clock, monkeypatch, live, queued, unread, signals, status
):
    """When the time is up, and a connection is still open."""
    one, watch = watched(clock)
    one.signals = signals
    start, told = clock[0], "" if live is None else gauges(live)
    monkeypatch.setattr("server.supervisor.unsent", lambda port: unread)

    def tick():
        clock[0] += 1
        watch.sees(clock[0], version(pending=queued), metrics=told)

    monkeypatch.setattr(one, "_tick", tick)
    tick()
    assert one._serve() == status
    waited = one.options.settle_seconds + one.options.drain_seconds if signals == 1 else 0
    assert clock[0] - start == 1 + waited
    assert one.draining


def test_a_worker_that_never_comes_back_is_death_and_a_look_that_fails_is_not_ready(clock):
    one, watch = watched(clock)
    assert one.unready() == "the model is loading"
    one.begun = clock[0] - 10
    watch.sees(clock[0], version())
    assert one.unready() == one.dead() == ""
    clock[0] += STALE + 1
    assert one.unready() == "TorchServe has not answered for 11 s"
    assert "seq2serve_live_requests" not in prometheus(one.metrics())
    assert one.dead() == ""
    clock[0] += SILENT - STALE
    assert one.dead() == "TorchServe has not answered for 15 s"
    watch.sees(clock[0], version("UNLOADED"))
    assert one.unready() == "no worker is ready"
    assert one.dead() == ""
    clock[0] += 60 + 2 * 10
    watch.sees(clock[0], version("UNLOADED"))
    assert re.fullmatch(r"no worker was ready for \d+ s", one.dead())
    one.draining = True
    assert one.dead() == ""
    assert one.unready() == "draining"


def test_bytes_that_a_client_has_yet_to_take_are_seen():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        served, _ = listener.accept()
        with client, served:
            assert unsent(port) == 0
            served.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while served.send(b"x" * 65536):
                    pass
            assert unsent(port) == 1
            client.settimeout(GUARD_SECONDS)
            served.close()  # the kernel goes on sending
            assert unsent(port) == 1
            while client.recv(65536):
                pass
            assert unsent(port) == 0


# Probes


def got(port: int, path: str, method="GET") -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, GUARD_SECONDS)) as connection:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


def test_no_client_holds_up_a_probe():
    pages = {"/a": lambda: (200, "text/plain", "ä\n")}
    server = HealthServer("127.0.0.1", 0, pages)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    idle[0].sendall(b"GET /a HTTP/1.1\r\nHost")
    assert got(server.port, "/a?x=1") == (200, "ä\n")
    with socket.create_connection(("127.0.0.1", server.port), GUARD_SECONDS) as raw:
        raw.sendall(b"HEAD /a HTTP/1.0\r\n\r\n")
        with raw.makefile("rb") as reply:
            assert reply.read().endswith(b"Content-Length: 3\r\nCache-Control: no-store\r\n\r\n")
    assert got(server.port, "/b") == (404, "no such path; there are: /a\n")
    assert got(server.port, "/a", "POST")[0] == 501
    with pytest.raises(ServerError, match=f"health port {server.port} on 127"):
        HealthServer("127.0.0.1", server.port, pages)
    server.close()
    for one in idle:
        one.close()


SAMPLE = re.compile(
    r'(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?P<labels>([a-z0-9_]+="([^"\\\n]|\\.)*",?)+)\})? '
    r"(?P<value>-?[0-9.e+-]+)"
)


def samples(text: str) -> dict[str, float]:
    """Prometheus' text format, strictly: each metric with its help and its type, once."""
    assert text.endswith("\n")
    found: dict[str, float] = {}
    described: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("# "):
            _, what, name, _ = line.split(" ", 3)
            described.setdefault(name, []).append(what)
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample is not None, line
        name = sample["name"]
        assert described[name] == ["HELP", "TYPE"]
        assert name not in found
        assert f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text
        found[name] = float(sample["value"])
    assert set(described) == set(found)
    return found


def test_labels_of_metrics_are_escaped():
    text = prometheus([("a_info", "gauge", "It is.", {"x": 'a"b\\c\nd', "y": ""}, 1)])
    assert samples(text) == {"a_info": 1}
    assert r'a_info{x="a\"b\\c\nd",y=""} 1' in text
    assert samples(prometheus([("b", "gauge", "It is.", {}, 123456789.0)])) == {"b": 123456789.0}


# Orphans

ORPHANS = """
import ctypes, os, subprocess, time
from pathlib import Path
from server.supervisor import reap_orphans

PR_SET_CHILD_SUBREAPER = 36  # as process 1 is
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
children = Path(f"/proc/self/task/{os.getpid()}/children")
own = subprocess.Popen(["sh", "-c", "read end; exit 3"], stdin=subprocess.PIPE)
for _ in range(3):
    subprocess.run(["sh", "-c", "sleep 0.1 &"])
assert len(children.read_text().split()) == 4
deadline = time.monotonic() + 60
while len(children.read_text().split()) > 1:
    assert time.monotonic() < deadline
    reap_orphans(own.pid)
own.stdin.close()
os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
reap_orphans(own.pid)
assert own.wait() == 3
reap_orphans(own.pid)  # with no child at all
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")
def test_orphans_are_buried_and_the_own_child_keeps_its_status():
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], cwd=ROOT, capture_output=True, text=True,
        timeout=GUARD_SECONDS, check=False,
    )
    assert done.returncode == 0, done.stderr
