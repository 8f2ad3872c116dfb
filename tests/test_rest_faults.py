"""What goes wrong around a server: clients that vanish, a worker that is killed, a queue that is
full, an archive that was changed."""

import contextlib
import dataclasses
import http.client
import ipaddress
import json
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import GUARD_SECONDS, JSON, PREDICT, Reply, call, connected, options, workers
from test_metrics import idle, opened, scrape, scraped
from test_rest import offline, spoken
from test_rest_streaming import address, heard, request, streamed

from handler.integrity import DIGESTS, write_digests
from server.errors import ServerError
from server.torchserve import TorchServe

CONFIG = "model-config.yaml"
BATCH, QUEUE, WAITING = 16, 16, 1100  # requests, requests, sentences
SLOW = {"text": ["9" * 60] * 24, "beam_size": 8, "min_length": 60}


LONG = {"text": ["9" * 60] * 1000, "split": False, "return_alignments": True}
EXPENSIVE = [  # and how they are answered
    (LONG | {"min_length": 60, "max_length": 60}, (413, "AnswerTooLong")),
    (LONG | {"min_length": 40, "max_time": 60}, (413, "AnswerTooLong")),
    (LONG | {"beam_size": 8, "n_best": 8}, (413, "TooExpensive")),
    ({"text": "1" + "\n" * 100_000 + "2", "beam_size": 64, "n_best": 64}, (413, "AnswerTooLong")),
    ({"text": ["12"] * 20, "beam_size": 64, "n_best": 64, "return_tokens": True}, None),
    ({"text": ["9" * 60] * 60, "return_alignments": True}, None),
]


def changed(source: Path, target: Path, member: str) -> None:
    """A whole and valid archive, in which one byte of one member is another."""
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w") as built:
        for name in given.namelist():
            content = given.read(name)
            if name == member:
                content = content[:-1] + bytes([content[-1] ^ 1])
            built.writestr(name, content)


def configured(source: Path, target: Path, folder: Path, handler: dict, **more: object) -> None:
    """The archive with another model-config.yaml, and digests that say so."""
    with zipfile.ZipFile(source) as given:
        given.extractall(folder)
    config = yaml.safe_load((folder / CONFIG).read_text())
    config |= more
    config["handler"] |= handler
    (folder / CONFIG).write_text(yaml.safe_dump(config))
    (folder / DIGESTS).unlink()
    write_digests(folder)
    with zipfile.ZipFile(target, "w") as built:
        for path in folder.rglob("*"):
            built.write(path, path.relative_to(folder))


@pytest.fixture(scope="module")
def narrow(toy, tmp_path_factory):
    """A server of few requests at once, which clients reach from outside."""
    store = tmp_path_factory.mktemp("narrow")
    unpacked = tmp_path_factory.mktemp("unpacked")
    configured(
        toy.store / "seq2seq.mar", store / "seq2seq.mar", unpacked,
        {"max_waiting": WAITING}, batchSize=BATCH, jobQueueSize=QUEUE,
    )
    with TorchServe(dataclasses.replace(options(store), host="0.0.0.0")) as started:
        yield started


# Clients


def test_clients_that_leave_hurt_nobody(server, toy):
    whole = request({"text": spoken(10)})
    for sent in (len(whole), len(whole) // 2, 40):
        for _ in range(20):
            with socket.create_connection(address(server)) as gone:
                gone.sendall(whole[:sent])
    texts = spoken(5, seed=10)
    assert call(server, body={"text": texts}).texts == offline(toy, texts)


def test_streams_that_are_reset_hurt_nobody(server, toy):
    """A client that is killed sends a reset, not a farewell."""
    reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # struct linger: on, 0 seconds
    for _ in range(10):
        connection, _ = opened(server, SLOW)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
    assert streamed(server, {"text": "12"})["translations"][0][0]["text"] == offline(toy, ["12"])[0]
    scraped(server, idle)


def test_a_client_that_sends_its_request_slowly_hinders_nobody(server, toy):
    whole = request({"text": "345"})
    (expected,) = offline(toy, ["345"])
    with socket.create_connection(address(server), GUARD_SECONDS) as slow:
        for i in range(len(whole)):
            slow.sendall(whole[i : i + 1])
            if i % 40 == 0:
                assert call(server, body={"text": "345"}).texts == [expected]
        reply = http.client.HTTPResponse(slow)
        reply.begin()
        assert json.load(reply)["translations"][0][0]["text"] == expected
        reply.close()


# The network


def test_only_predictions_are_reached_from_outside(narrow):
    """gRPC breaks with continuous batching, management stays at home, and TorchServe's HTTP is old:
    the front alone is open to others."""

    def listening(pid: int) -> dict[int, bool]:
        """Ports, and whether they are on loopback."""
        return {
            one.laddr.port: ipaddress.ip_address(one.laddr.ip.removeprefix("::ffff:")).is_loopback
            for one in psutil.Process(pid).net_connections("inet")
            if one.status == psutil.CONN_LISTEN
        }

    ports, front = narrow._ports, {"inference", "metrics"}
    behind = {"torchserve", "torchserve metrics", "management", "grpc inference", "grpc management"}
    assert listening(narrow.pid).keys() >= {ports[name] for name in behind}
    assert all(listening(narrow.pid).values())
    assert listening(narrow.front.pid) == {ports["inference"]: False, ports["metrics"]: True}
    assert set(ports) == behind | front | {"worker"}


# What clients send wrong


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /predictions/seq2seq HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n"
         b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntext=50% geheim", 400),
        (b"POST /predictions/seq2seq HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n"
         b"Content-Type: multipart/form-data; boundary=\r\n\r\ngeheim", 400),
        (b"GET /%zz\x1b[2J\x1b]0;geheim\x07 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /geheim%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /predictions/seq2seq/1.0/%00geheim HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"TRACE /predictions/seq2seq HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"POST /predictions/geheim HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na", 404),
        (b"POST /predictions/seq2seq HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n"
         b"Content-Type: application/json\r\n\r\n{\"geheim", 400),
    ],
)
def test_no_client_makes_an_error_of_the_log_or_a_text_in_it(server, sent, status):
    before = server._log.lines
    with socket.create_connection(address(server), GUARD_SECONDS) as one:
        one.sendall(sent)
        reply = http.client.HTTPResponse(one)
        reply.begin()
        assert reply.status == status
    assert call(server, body={"text": "12"}).status == 200
    new = [line for line in server._log.lines if line not in before]
    assert not [line for line in new if "ERROR" in line or "geheim" in line]


def written(server) -> float:
    return scrape(server).get(("tokens_total", (("side", "target"),)), 0)


def test_the_work_of_clients_that_left_is_not_done(server):
    """They do not stream, and more of them wait than are worked on at once."""
    whole = request({**SLOW, "text": SLOW["text"] * 4})
    before = written(server)
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            one = stack.enter_context(socket.create_connection(address(server), GUARD_SECONDS))
            one.sendall(whole)
        scraped(server, lambda figures: not idle(figures))
    assert call(server, body={"text": "12"}).status == 200
    scraped(server, idle)
    # All of it would be 150 * 96 sentences of 60 tokens.
    assert written(server) - before < 150 * 96 * 60 / 10


def test_kserve_is_told_whether_it_is_ready_and_what_there_is(server, toy):
    version = toy.recipe.export.version
    for path in (
        "/v2/health/live", "/v2/health/ready", "/v2/models/seq2seq/ready",
        f"/v2/models/seq2seq/versions/{version}/ready", "/v1/models/seq2seq",
    ):
        reply = call(server, path)
        assert (reply.status, True) == (200, reply.json.get("ready", reply.json.get("live")))
    described = call(server, "/v2/models/seq2seq").json
    assert described == call(server, f"/v2/models/seq2seq/versions/{version}").json
    assert (described["name"], described["versions"]) == ("seq2seq", [version])
    assert call(server, "/v2").json["name"] == "seq2serve"
    assert call(server, "/v1/models").json == {"models": ["seq2seq"]}
    for path in ("/v2/models/other", "/v2/models/seq2seq/versions/9", "/v1/models/other/ready"):
        assert call(server, path).status == 404


# Too much at once


def test_requests_beyond_the_queue_are_told_so_and_the_others_answered(narrow):
    (expected,) = {tuple(call(narrow, body=SLOW).texts)}
    with ThreadPoolExecutor(80) as pool:
        replies = list(pool.map(lambda _: call(narrow, body=SLOW), range(80)))
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= QUEUE
    assert {tuple(reply.texts) for reply in replies if reply.status == 200} == {expected}
    assert call(narrow, body=SLOW).texts == list(expected)


def test_when_too_many_sentences_wait_the_client_is_told_when_to_come_again(narrow):
    connection, first = opened(narrow, {"text": ["9" * 60] * 1024, "min_length": 60})
    with closing(connection):
        for body, shape in (
            ({"text": ["12"] * 1024}, ["code", "type", "message"]),
            ({"instances": ["12"] * 1024}, ["error", "code", "type", "message"]),
        ):
            reply = call(narrow, body=body)
            assert (reply.status, reply.retry_after) == (503, "1")
            assert list(reply.json) == shape
            assert reply.json["type"] == "Overloaded"
        assert call(narrow, body={"text": "12"}).retry_after is None
        said, _ = heard(first.read())
    assert len(said) == 1024
    assert len(call(narrow, body={"text": ["12"] * 1024}).texts) == 1024


# A worker that is killed


def outcome(server, body: dict, right: list[str], begun: threading.Event) -> str:
    """What becomes of one request; when the first part of a stream is there, `begun` is set."""

    def judged(answer: dict) -> str:
        best = [found[0]["text"] for found in answer["translations"]]
        return "answered" if best == right else "wrong"

    try:
        with closing(connected(server.url)) as connection:
            connection.request("POST", PREDICT, json.dumps(body).encode(), JSON)
            reply = connection.getresponse()
            if reply.status != 200:
                return str(reply.status)
            if not body.get("stream"):
                return judged(json.load(reply))
            reply.peek(1)
            begun.set()
            received = reply.read()
            if b"event: error" in received:
                return "told"
            return judged(heard(received)[1])
    except (OSError, http.client.HTTPException):
        return "broken off"


def test_after_its_worker_is_killed_a_server_answers_again(narrow, toy):
    (before,) = workers(narrow)
    right = call(narrow, body=SLOW).texts
    begun = threading.Event()
    with ThreadPoolExecutor(20) as pool:
        streams, others = (
            [pool.submit(outcome, narrow, body, right, begun) for _ in range(count)]
            for body, count in (({**SLOW, "stream": True}, 6), (SLOW, 14))
        )
        assert begun.wait(GUARD_SECONDS)
        os.kill(before, signal.SIGKILL)
        parts, whole = (
            Counter(one.result(GUARD_SECONDS) for one in some) for some in (streams, others)
        )
    errors = {"503", "507"}
    assert set(whole) <= errors | {"answered"}
    assert sum(whole[end] for end in errors) > 0
    assert set(parts) <= errors | {"answered", "told", "broken off"}
    assert parts["told"] + parts["broken off"] > 0
    texts = spoken(20, seed=16)
    assert again(narrow, {"text": texts}).texts == offline(toy, texts)
    (after,) = workers(narrow)
    assert after != before
    assert streamed(narrow, {"text": texts})["translations"][3][0]["text"] == offline(
        toy, texts[3:4]
    )[0]
    scraped(narrow, idle)


def again(server, body: dict) -> Reply:
    """The answer to a request that is sent until it is answered."""
    deadline = time.monotonic() + GUARD_SECONDS
    while (reply := call(server, PREDICT, body, JSON)).status >= 500:
        assert time.monotonic() < deadline, reply
        time.sleep(0.5)
    return reply


# Archives


@pytest.mark.parametrize("member", ["source.model", "model.pt"])
def test_a_changed_archive_is_refused_by_the_name_of_its_file(toy, tmp_path, member):
    changed(toy.store / "seq2seq.mar", tmp_path / "seq2seq.mar", member)
    shutil.copy(toy.store / "seq2seq.mar.sha256", tmp_path)
    with pytest.raises(ServerError, match=r"seq2seq\.mar has SHA-256"):
        TorchServe(options(tmp_path)).start()
    (tmp_path / "seq2seq.mar.sha256").unlink()
    server = TorchServe(options(tmp_path))
    with pytest.raises(ServerError, match=f"IntegrityError: {member} in the archive"), server:
        pytest.fail("is ready")


def test_expensive_requests_at_once_neither_kill_the_worker_nor_stop_a_stream(server):
    worker = psutil.Process(workers(server)[0])
    before, most = worker.memory_info().rss, 0
    with ThreadPoolExecutor(len(EXPENSIVE) + 1) as pool:
        asked = [pool.submit(call, server, body=body) for body, _ in EXPENSIVE]
        stream = pool.submit(
            streamed, server, {"text": ["123456"] * 20, "min_length": 20, "stream": True}
        )
        while not all(one.done() for one in asked):
            most = max(most, worker.memory_info().rss)
            time.sleep(0.01)
        for one, (_, expected) in zip(asked, EXPENSIVE):
            reply = one.result()
            assert (reply.status == 200) if expected is None else (reply.error == expected)
        assert stream.result()
    assert most - before < 200e6
