"""The HTTP front as haproxy.cfg has it, by sockets, before a server that notes what reaches it."""

import contextlib
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields

import pytest
from conftest import GUARD_SECONDS
from front_backend import LARGE, Backend, fronted

from handler.decoding.options import DecodingOptions
from server.errors import ServerError
from server.front import BACKLOG, Front, FrontOptions, find_haproxy
from server.memory import FrontLimits
from server.options import CONFIG, FRONT_CONFIG
from server.ports import listening

WAIT, PLAIN = "/predictions/wait", "/predictions/seq2seq"


@pytest.fixture(scope="module")
def backend():
    with Backend() as one:
        yield one


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def shared(backend, lines):
    """One front for the tests that change nothing of it."""
    with fronted(backend, show=lines.append) as (_, port):
        yield port


@pytest.fixture
def port(backend, shared):
    backend.seen.clear()
    backend.go.clear()
    return shared


def request(path=PLAIN, body=b"text", method="POST", **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"Host": "x", "Content-Length": str(len(body)), **named}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), GUARD_SECONDS)


class Reader(io.BufferedReader):
    """Of a connection with several answers: what is behind the first one stays in its buffer."""

    def __init__(self, one: socket.socket) -> None:
        super().__init__(socket.SocketIO(one, "r"))

    def makefile(self, mode: str) -> "Reader":
        return self

    def close(self) -> None:
        pass


def answer(one: socket.socket | Reader) -> http.client.HTTPResponse:
    """The next answer on a connection, read to its end."""
    reply = http.client.HTTPResponse(one)
    reply.begin()
    reply.body = reply.read()
    return reply


def told(sent: bytes, port: int) -> http.client.HTTPResponse:
    with connected(port) as one:
        one.sendall(sent)
        return answer(one)


def error(reply: http.client.HTTPResponse) -> tuple[int, str]:
    assert reply.getheader("Content-Type") == "application/json"
    body = json.loads(reply.body)
    assert list(body) == ["code", "type", "message"]
    assert body["code"] == reply.status
    return reply.status, body["type"]


# What is refused, before TorchServe hears of it


CHUNKED = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
FORM = "application/x-www-form-urlencoded"
REFUSED = [
    (request("/nowhere"), 404, "NotFound"),
    (request("/ping", b"", "GET"), 404, "NotFound"),
    (request("/explanations/seq2seq"), 404, "NotFound"),
    (request("//predictions/seq2seq"), 404, "NotFound"),
    (request("/predictions/%EB%82%A0"), 404, "NotFound"),
    (request("/predictions/seq2seq;v=1"), 404, "NotFound"),
    (request("/predictions/seq2seq%zz"), 400, "InvalidRequest"),
    (request("/predictions/seq2seq/1.0/%00"), 400, "InvalidRequest"),
    (request(body=b"text=100% sure", Content_Type=FORM), 400, "InvalidContentType"),
    (request(body=b"--x", Content_Type="multipart/form-data; boundary="), 400,
     "InvalidContentType"),
    (request(Expect="200-ok"), 417, "ExpectationFailed"),
    (request(X_Long="a" * 8000), 431, "HeadersTooLarge"),
    (request(body=b"", Content_Length="262145"), 413, "RequestTooLarge"),
    (CHUNKED + b"40001\r\n" + b"x" * 0x40001 + b"\r\n0\r\n\r\n", 413, "RequestTooLarge"),
    *((request(PLAIN, b"", method), 405, "MethodNotAllowed")
      for method in ("GET", "DELETE", "PATCH", "TRACE", "OPTIONS", "FOO")),
    (request("/v1/models/seq2seq:predict", b"", "GET"), 405, "MethodNotAllowed"),
    (request("/v2/models/seq2seq/infer", b"", "GET"), 405, "MethodNotAllowed"),
    (request("/predictions/seq2seq/1.0/card", b"", "DELETE"), 405, "MethodNotAllowed"),
    (request("/v2/health/ready", b"", "POST"), 405, "MethodNotAllowed"),
    (request("*", b"", "OPTIONS"), 405, "MethodNotAllowed"),
]


@pytest.mark.parametrize(("sent", "status", "kind"), REFUSED, ids=[str(r[0][:40]) for r in REFUSED])
def test_what_is_no_request_is_refused_in_the_shape_of_errors(port, backend, sent, status, kind):
    reply = told(sent, port)
    assert error(reply) == (status, kind)
    assert (reply.getheader("Allow") is not None) == (status == 405)
    assert backend.seen == []


@pytest.mark.parametrize(
    "sent",
    [
        request("/%zz\x1b[2J\x1b]0;x\x07", b"", "GET"),
        CHUNKED + b"zz\r\n",
        b"hello\r\n\r\n",
        request(body=b"ab", Content_Length="2\r\nContent-Length: 3"),
        request(body=b"", Content_Length="-1"),
        request(body=b"", Transfer_Encoding="chunked, gzip, chunked"),
        request(**{"bad name": "x"}),
    ],
)
def test_what_is_no_http_is_refused_and_its_connection_closed(port, backend, sent):
    with connected(port) as one:
        one.sendall(sent + request())
        reply = answer(one)
        assert (reply.status, reply.getheader("Connection")) == (400, "close")
        assert one.recv(1) == b""
    assert backend.seen == []


def test_a_length_beside_chunks_is_taken_out_and_ends_the_connection(port, backend):
    """As RFC 9112, 6.3 has it: what stands behind is no second request."""
    hidden = request("/predictions/hidden")
    with connected(port) as one:
        one.sendall(
            f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n".encode()
            + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n" + hidden
        )
        reply = answer(one)
        assert (reply.status, reply.body, reply.getheader("Connection")) == (200, b"a", "close")
        assert one.recv(1) == b""
    (seen,) = backend.seen
    assert seen.body == b"a"
    assert "content-length" not in seen.headers or "transfer-encoding" not in seen.headers


def test_http_2_is_spoken_to_whom_speaks_it(port, backend):
    with connected(port) as one:
        one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        assert one.recv(9)[3] == 4  # a frame SETTINGS: RFC 9113, 6.5
    assert backend.seen == []


# What reaches TorchServe, and how


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        (PLAIN, PLAIN), (f"{PLAIN}/", f"{PLAIN}/"), (f"{PLAIN}/1.0?beam=%zz", f"{PLAIN}/1.0"),
        ("/v1/models/seq2seq:predict", PLAIN), ("/v2/models/seq2seq/infer", PLAIN),
        ("/v2/models/seq2seq/versions/1.0/infer", f"{PLAIN}/1.0"),
        (f"http://x{PLAIN}", PLAIN),
    ],
)
def test_all_doors_lead_to_one_path(port, backend, path, seen):
    assert told(request(path), port).body == b"text"
    assert backend.seen[0].path == seen


def test_headers_that_steer_torchserve_do_not_reach_it(port, backend):
    given = {"Cookie": "a" * 9000, "explain": "true", "X_Front_Key": "mine"}
    sent = request(**given, Authorization="Bearer a\r\nurl_path: card")
    assert told(sent, port).status == 200
    headers = backend.seen[0].headers
    assert not headers.keys() & {"cookie", "explain", "url_path"}
    assert re.fullmatch(r"[0-9a-f-]{36}", headers["x-front-key"])
    assert headers["authorization"] == "Bearer a"
    told(request(Authorization="Bearer a\r\nAUTHORIZATION: Bearer b"), port)
    assert backend.seen[1].headers["authorization"] == "several"


@pytest.mark.parametrize("given", ["a-1.b_2", "", "a b", "é", "x" * 129, "a\r\nX-Request-Id: b"])
def test_a_request_has_an_id_its_clients_or_a_new_one(port, backend, lines, given):
    lines.clear()
    reply = told(request(X_Request_Id=given), port)
    found = reply.getheader("X-Request-Id")
    assert (found == given) == (given == "a-1.b_2")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", found)
    assert backend.seen[0].headers["x-request-id"] == found
    # A line of the test before may still come.
    until(lambda: found in [json.loads(line)["request"] for line in lines])


def logged(lines: list[str], count: int) -> list[str]:
    until(lambda: len(lines) >= count)
    return lines


def until(found) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_log_is_json_without_a_word_of_clients(port, lines):
    lines.clear()
    secret, sent = "geheim", 0
    for path in (f"{PLAIN}?q=geheim", "/geheim", "/\x1b[2Jgeheim", "/geheim%zz"):
        told(request(path, b"geheim", Content_Type=FORM, X_Secret="geheim"), port)
        told(request(path, b"geheim"), port)
        sent += 2
    told(request(PLAIN, b"", "GEHEIM"), port)
    for line in logged(lines, sent + 1):
        assert secret not in line.lower()
        assert line.isprintable()
        found = json.loads(line)
        assert found["client"] == "127.0.0.1"
        assert found["path"] in (PLAIN, "-")
    assert Counter(json.loads(line)["status"] for line in lines) == {200: 1, 400: 5, 404: 2, 405: 1}


def test_a_worker_that_died_is_told_by_one_status(port):
    assert error(told(request("/predictions/died"), port)) == (507, "WorkerDied")


def test_pipelined_requests_are_answered_in_order(port, backend):
    with connected(port) as one:
        one.sendall(request(WAIT, b"first") + request(PLAIN, b"second") + b"bad\r\n\r\n")
        until(lambda: backend.seen)
        assert len(backend.seen) == 1
        backend.go.set()
        reader = Reader(one)
        assert [answer(reader).body for _ in range(2)] == [b"first", b"second"]
        assert reader.read(12) in (b"", b"HTTP/1.1 400")


def test_events_are_passed_on_as_they_come(port, backend):
    with connected(port) as one:
        one.sendall(request("/predictions/events"))
        reply = http.client.HTTPResponse(one)
        reply.begin()
        assert reply.readline() == b"one\n"
        backend.go.set()
        assert reply.read() == b"\ntwo\n\n"


# Clients that are slow


def test_a_request_that_does_not_become_whole_never_reaches_torchserve(backend):
    backend.seen.clear()
    whole = request(body=b"x" * 100_000)
    with fronted(backend, body="1s", http_request="1s") as (_, port):
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(connected(port)) for _ in range(20)]
            for i, one in enumerate(waiting):
                one.sendall(whole[:-1] if i % 2 else whole[:60])
            assert told(whole, port).status == 200
            replies = [answer(one) for one in waiting]
            assert {reply.status for reply in replies} == {408}
            assert {error(reply)[1] for reply in replies[1::2]} == {"RequestTimeout"}
            assert all(one.recv(1) == b"" for one in waiting)
        with connected(port) as one:
            one.settimeout(0.1)
            sent = 0
            with contextlib.suppress(ConnectionError):
                while not readable(one):  # a byte now and then, for hours
                    one.sendall(whole[sent : sent + 1])
                    sent += 1
            assert sent < 100
    assert len(backend.seen) == 1


def readable(one: socket.socket) -> bool:
    """Whether something has come within the connection's time limit."""
    try:
        one.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return False
    return True


def test_a_quiet_stream_is_no_slow_client_and_who_takes_nothing_is(backend):
    backend.go.clear()
    with fronted(backend, client="1s", server="60s") as (_, port):
        with connected(port) as one, connected(port) as two:
            one.sendall(request("/predictions/events"))
            two.sendall(request(WAIT))
            time.sleep(2.5)
            backend.go.set()
            assert b"two" in answer(one).body
            assert answer(two).body == b"text"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall(request("/predictions/large"))
            time.sleep(2.5)
            slow.settimeout(GUARD_SECONDS)
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                answer(slow)


# As many as there is room for


def test_large_bodies_are_bounded_and_small_ones_are_not(backend):
    backend.go.clear()
    backend.seen.clear()
    large = request(body=b"x" * 200_000)
    with (
        fronted(backend, FrontLimits(uploads=10, answers=1)) as (_, port),
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(connected(port)) for _ in range(10)]
        for one in held:
            one.sendall(large[:-1])
        until(lambda: told(large, port).status == 503)
        reply = told(large, port)
        assert error(reply) == (503, "Overloaded")
        assert reply.getheader("Retry-After") == "1"
        assert told(request(body=b"x" * 9000), port).status == 200
        for one in held:
            one.sendall(b"x")
            assert answer(one).status == 200
        until(lambda: told(large, port).status == 200)


def test_large_answers_that_nobody_reads_are_bounded(backend):
    with (
        fronted(backend, FrontLimits(uploads=10, answers=3)) as (_, port),
        contextlib.ExitStack() as stack,
    ):
        slow = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in slow:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", port))
            one.sendall(request("/predictions/large"))
            assert one.recv(1)
        reply = told(request("/predictions/large"), port)
        assert error(reply) == (503, "Overloaded")
        assert reply.getheader("Retry-After") == "1"
        assert told(request(), port).status == 200
        slow[0].close()
        until(lambda: told(request("/predictions/large"), port).body == b"x" * LARGE)


def test_two_thousand_clients_at_once_are_all_answered(backend):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 5000:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 5000), hard))
    try:
        with fronted(backend) as (_, port), contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connected(port)) for _ in range(2000)]
            for number, one in enumerate(clients):
                one.sendall(request(body=b"%d" % number))
            for number, one in enumerate(clients):
                assert answer(one).body == b"%d" % number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Clients that leave


def test_a_client_that_leaves_is_told_and_its_connection_closed(backend):
    backend.go.clear()
    backend.seen.clear()
    with fronted(backend) as (front, port):
        pipe = os.open(front.left, os.O_RDONLY | os.O_NONBLOCK)
        with closing(os.fdopen(pipe, "rb", buffering=0)) as left:
            staying = connected(port)
            staying.sendall(request(WAIT))
            until(lambda: len(backend.seen) == 1)
            leaving = [connected(port) for _ in range(500)]
            for one in leaving:
                one.sendall(request(WAIT))
            until(lambda: len(backend.seen) == 501)
            for one in leaving:
                one.close()
            stays, *gone = backend.seen
            assert all(one.left.wait(GUARD_SECONDS) for one in gone)
            said = b""
            until(lambda: len(gone) <= said_so(left)[0].count(b"\n"))
            keys = [json.loads(line)["key"] for line in said_so(left)[0].splitlines()]
            ends = {json.loads(line)["end"] for line in said_so(left)[0].splitlines()}
            assert Counter(keys) == Counter(one.headers["x-front-key"] for one in gone)
            assert ends == {"CH"}
            assert said == b""
            backend.go.set()
            assert answer(staying).status == 200
            staying.close()
            assert not stays.left.is_set()


READ: dict[int, bytes] = {}


def said_so(pipe) -> tuple[bytes]:
    """All that a pipe has had until now."""
    READ[id(pipe)] = READ.get(id(pipe), b"") + (pipe.read(1 << 20) or b"")
    return (READ[id(pipe)],)


# How it lives and ends


def test_a_front_that_is_killed_is_replaced_and_no_connection_refused(backend):
    backend.go.set()
    with fronted(backend) as (front, port):
        for restarts in (1, 2):
            before = front.pid
            os.kill(before, signal.SIGKILL)
            assert told(request(), port).status == 200
            assert (front.restarts, front.failure) == (restarts, None)
            assert front.pid != before


def test_a_front_that_ends_again_and_again_is_given_up(backend):
    with fronted(backend) as (front, _):
        front.options.config.write_text("global\n  nothing\n")
        os.kill(front.pid, signal.SIGKILL)
        until(lambda: front.failure is not None)
        assert re.search("HAProxy ends again and again: .*nothing", str(front.failure))


def test_what_keeps_it_from_starting_is_told(backend, tmp_path, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"inference port {number} on 127.* cannot be used"):
            listening("inference", "127.0.0.1", number, BACKLOG)
    config = tmp_path / "haproxy.cfg"
    options = FrontOptions(config, tmp_path, 1, 1, 1, FrontLimits(1, 1))
    for text, said in (("frontend a\n  band x\n", "band"), (None, "haproxy.cfg")):
        if text is None:
            config.unlink()
        else:
            config.write_text(text)
        front = Front(options, *(listening(name, "127.0.0.1", 0, BACKLOG) for name in "ab"))
        with pytest.raises(ServerError, match=f"HAProxy does not start with .*: .*{said}"):
            front.start()
        front.left.unlink()
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"HAProxy not found for .*: run .pip install"):
        find_haproxy()


def test_it_speaks_of_itself_to_prometheus(backend):
    with fronted(backend) as (front, port):
        told(request("/nowhere"), port)
        with closing(http.client.HTTPConnection("127.0.0.1", front.metrics_port)) as one:
            one.request("GET", "/front/metrics")
            text = one.getresponse().read().decode()
            assert 'haproxy_frontend_http_responses_total{proxy="clients",code="4xx"} 1\n' in text
            for path, status in (("/metrics", 200), ("/models", 404)):
                one.request("GET", path)
                reply = one.getresponse()
                reply.read()
                assert reply.status == status
    assert backend.seen[-1].path == "/metrics"


def test_after_close_every_answer_is_the_last_of_its_connection(backend):
    backend.go.clear()
    with fronted(backend) as (front, port), connected(port) as kept, connected(port) as waits:
        kept.sendall(request())
        assert answer(kept).getheader("Connection") is None
        waits.sendall(request(WAIT))
        front.close()
        for sent in (request(), request("/nowhere"), request(PLAIN, b"", "GET")):
            assert told(sent, port).getheader("Connection") == "close"
        os.kill(front.pid, signal.SIGKILL)  # its successor knows
        until(lambda: front.restarts == 1)
        until(lambda: told(request(), port).getheader("Connection") == "close")


def asks(port: int, stop: threading.Event) -> Counter:
    """One who keeps a connection and asks now and then, as clients with a pool do: a connection
    that the server has announced to close is replaced."""
    found: Counter = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GUARD_SECONDS)
    while not stop.is_set():
        try:
            connection.request("POST", PLAIN, b"text")
            reply = connection.getresponse()
            found[f"{reply.status} {reply.read().decode()}"] += 1
        except (OSError, http.client.HTTPException) as error:
            found[repr(error)] += 1
            connection.close()
        stop.wait(0.2)
    connection.close()
    return found


def test_a_drain_with_two_hundred_kept_connections_loses_nothing(backend):
    backend.go.clear()
    stop = threading.Event()
    with fronted(backend) as (front, port), ThreadPoolExecutor(201) as pool:
        clients = [pool.submit(asks, port, stop) for _ in range(200)]
        idle = connected(port)
        idle.sendall(request())
        answer(idle)
        flight = connected(port)
        flight.sendall(request(WAIT, b"late"))
        until(lambda: len(backend.seen) > 600)
        front.close()
        time.sleep(1)
        stop.set()  # load balancers send no more
        found = sum((one.result(GUARD_SECONDS) for one in clients), Counter())
        front.leave()
        assert idle.recv(1) == b""
        assert not front.gone()
        with pytest.raises(ConnectionRefusedError):
            connected(port)
        backend.go.set()
        assert answer(flight).body == b"late"
        until(front.gone)
        assert not front.lost
        idle.close()
        flight.close()
    assert set(found) == {"200 text"}


def test_a_front_that_is_killed_while_it_leaves_has_lost_something(backend):
    backend.go.clear()
    with fronted(backend) as (front, port), connected(port) as one:
        one.sendall(request(WAIT))
        until(lambda: backend.seen and backend.seen[-1].path == WAIT)
        front.leave()
        os.kill(front.pid, signal.SIGKILL)
        until(lambda: front.lost)
        assert not front.gone()


def test_its_configuration_belongs_to_the_other_settings():
    """Numbers that stand in several files."""
    text = FRONT_CONFIG.read_text()
    (most,) = re.findall(r"^max_request_size=(\d+)$", CONFIG.read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:content-length\) gt|body_size gt) (\d{6})", text)) == {most}
    timeouts = re.findall(r"^ +timeout (\S+) (\d+)s$", text, re.MULTILINE)
    seconds = {name: int(given) for name, given in timeouts}
    assert seconds["http-keep-alive"] > 600  # of Google's load balancers
    asked = next(one for one in fields(DecodingOptions) if one.name == "max_time")
    assert seconds["server"] > asked.metadata["maximum"]
    buffer = int(re.search(r"tune\.bufsize (\d+)", text)[1])
    assert buffer == 288 * 1024
    assert buffer > int(most) + 7168 + 1024
