"""Streams over HTTP, and requests of very different sizes beside each other."""

import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import BinaryIO
from urllib.parse import urlsplit

import pytest
from conftest import GUARD_SECONDS, JSON, PREDICT, Reply, call
from test_metrics import idle, opened, scraped, settled
from test_rest import offline, spoken

LONG = {"text": ["9" * 60] * 300, "min_length": 60}
GREEDY = {"text": ["271828", "31"]}
STREAMED = [
    GREEDY,
    {"text": "271828", "beam_size": 5, "n_best": 3, "return_scores": True},
    {"text": spoken(40), "beam_size": 3, "length_penalty": 1.0},
    {"text": ["12\n\n345\n6", " 7 "], "return_tokens": True},
    {"text": ["12\n345"], "prefix": "99", "return_alignments": True},
    {"text": spoken(9), "sampling": True, "seed": 11, "temperature": 3.0},
    {"text": "1" * 60, "sampling": True, "seed": 5, "temperature": 50.0, "top_k": 200,
     "min_length": 60},  # bytes of broken characters
]


def events(body: bytes) -> list[tuple[str | None, dict]]:
    """Name and data of each server-sent event; comments are skipped."""
    assert body.endswith(b"\n\n")
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        if not block.startswith(":"):
            *name, data = block.split("\n")
            found.append((name[0].removeprefix("event: ") if name else None, json.loads(data[6:])))
    return found


def heard(body: bytes) -> tuple[dict[int, str], dict]:
    """What a stream said of each text, and the answer that ends it."""
    *news, (name, answer) = events(body)
    assert name == "answer", answer
    said: dict[int, str] = {}
    for name, data in news:
        assert name is None
        said[data["index"]] = said.get(data["index"], "") + data["text"]
    return said, answer


def streamed(server, body: dict) -> dict:
    """The answer that ends a stream, which said its texts before."""
    reply = call(server, body={**body, "stream": True})
    assert (reply.status, reply.content_type) == (200, "text/event-stream")
    said, answer = heard(reply.body)
    best = [hypotheses[0]["text"] for hypotheses in answer["translations"]]
    assert [said.get(i, "") for i in range(len(best))] == best
    return answer


@pytest.mark.parametrize("body", STREAMED)
def test_a_stream_says_what_a_whole_answer_says(server, body):
    whole = call(server, body=body).json
    answer = streamed(server, body)
    assert [[one["text"] for one in found] for found in answer["translations"]] == [
        [one["text"] for one in found] for found in whole["translations"]
    ]
    assert answer["usage"] == whole["usage"]
    assert answer["model"] == whole["model"]


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The parts of a chunked HTTP body, to its end."""
    while length := int(file.readline(), 16):
        yield file.read(length)
        assert file.read(2) == b"\r\n"
    assert file.read(2) == b"\r\n"


def request(body: dict) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def address(server) -> tuple[str, int]:
    url = urlsplit(server.url)
    assert url.hostname
    assert url.port
    return url.hostname, url.port


def test_a_stream_comes_in_many_chunks_of_whole_events(server):
    body = {**LONG, "stream": True}
    with socket.create_connection(address(server), GUARD_SECONDS) as connection:
        connection.sendall(request(body))
        with connection.makefile("rb") as file:
            head = [line.decode().strip().lower() for line in iter(file.readline, b"\r\n")]
            parts = list(chunks(file))
    assert head[0] == "http/1.1 200 ok"
    assert {"content-type: text/event-stream", "transfer-encoding: chunked"} <= set(head)
    assert len(parts) > 3
    assert all(part.endswith(b"\n\n") for part in parts)
    said, answer = heard(b"".join(parts))
    assert [said[i] for i in range(300)] == [one[0]["text"] for one in answer["translations"]]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text": "12", "beam_size": 65}, (400, "InvalidOption")),
        ({"text": ["12", " "]}, (400, "EmptyText")),
        ({"text": "1" * 999}, (413, "TextTooLong")),
        ({"text": ["1\n" * 600] * 10}, (413, "TooManySentences")),
    ],
)
def test_a_stream_that_is_refused_has_its_status(server, body, expected):
    assert call(server, body={**body, "stream": True}).error == expected


def test_a_hundred_clients_that_leave_their_streams_hold_no_row(server, toy):
    before = settled(server)

    def client(i: int) -> None:
        connection, reply = opened(server, {**LONG, "beam_size": 1 + i % 4})
        reply.read(i)
        connection.close()

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(client, range(100)))
    texts = spoken(20, seed=12)
    assert call(server, body={"text": texts}).texts == offline(toy, texts)
    gone = "cancellations_total", ()
    after = scraped(
        server,
        lambda f: idle(f) and f.get(gone, 0) >= before.get(gone, 0) + 100,
    )
    assert after[gone] == before.get(gone, 0) + 100


def test_a_slow_reader_hinders_nobody_and_loses_nothing(server, toy):
    texts = spoken(30, seed=13)
    expected = offline(toy, texts)
    whole = call(server, body=LONG).json
    with closing(socket.socket()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.settimeout(GUARD_SECONDS)
        slow.connect(address(server))
        slow.sendall(request({**LONG, "stream": True}))
        received = slow.recv(7)
        for text, right in zip(texts, expected):
            assert call(server, body={"text": text}).texts == [right]
            assert streamed(server, {"text": text})["translations"][0][0]["text"] == right
            received += slow.recv(7)
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += slow.recv(65536)
    _, _, rest = received.partition(b"\r\n\r\n")
    said, answer = heard(b"".join(chunks(io.BytesIO(rest))))
    assert answer == whole
    assert len(said) == 300


def test_a_beam_of_all_rows_and_small_requests_do_not_disturb_each_other(server, toy):
    texts = spoken(50, seed=14)
    expected = offline(toy, texts)
    wide = {"text": "27182818", "beam_size": 64, "n_best": 64}
    alone = call(server, body=wide).json["translations"]
    assert len(alone[0]) == 64
    with ThreadPoolExecutor(26) as pool:
        beam = pool.submit(call, server, body=wide)
        stream = pool.submit(streamed, server, wide)
        small = list(pool.map(lambda text: call(server, body={"text": text}).texts, texts))
        together = [beam.result().json["translations"], stream.result()["translations"]]
    assert small == [[one] for one in expected]
    for found in together:
        assert [one["text"] for one in found[0]] == [one["text"] for one in alone[0]]


def test_the_same_seed_draws_the_same_in_any_company(server):
    drawn = {"text": ["27", "31\n41"], "sampling": True, "seed": 3, "temperature": 4.0,
             "min_length": 20, "max_length": 30}
    alone = call(server, body=drawn).texts
    other = call(server, body={**drawn, "seed": 4}).texts
    assert other != alone
    company = [
        {"text": spoken(20), "sampling": True, "temperature": 9.0}, {"text": "1", "beam_size": 9},
        {"text": spoken(30)}, {**drawn, "seed": 4},
    ]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(call, server, body=body) for body in company * 4]
        again = [pool.submit(call, server, body=drawn) for _ in range(6)]
        again_streamed = [pool.submit(streamed, server, drawn) for _ in range(2)]
        assert [one.result().texts for one in again] == [alone] * 6
        for one in again_streamed:
            assert [found[0]["text"] for found in one.result()["translations"]] == alone
        assert {one.result().status for one in others} == {200}


def test_small_requests_are_answered_while_a_thousand_texts_are_translated(server, toy):
    texts = spoken(8, seed=15)
    expected = offline(toy, texts)
    crowd = {"text": ["9" * 60] * 1000, "beam_size": 2, "min_length": 60}
    with ThreadPoolExecutor(1) as pool:
        connection, reply = opened(server, {**crowd, "text": ["8" * 60] * 1000})
        large = pool.submit(call, server, body=crowd)
        for text, right in zip(texts, expected):
            assert call(server, body={"text": text}).texts == [right]
        assert not large.done()
        answer: Reply = large.result()
        said, _ = heard(reply.read())
        connection.close()
    assert len(answer.texts) == len(said) == 1000
    assert len(set(answer.texts)) == 1


def test_streams_and_whole_answers_share_a_connection(server):
    """Keep-alive: what comes after a stream on the same connection is an answer of its own."""
    connection, reply = opened(server, GREEDY)
    with closing(connection):
        _, answer = heard(reply.read())
        connection.request("POST", PREDICT, json.dumps(GREEDY).encode(), JSON)
        assert json.load(connection.getresponse())["translations"] == answer["translations"]
