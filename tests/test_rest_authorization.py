"""Bearer tokens end to end: every door of a real server is shut without one."""

import http.client
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from conftest import GUARD_SECONDS, JSON, PREDICT, TEXT, connected, options, versions
from test_metrics import scraped
from test_rest_streaming import heard

from handler.authorization import INTERVAL, VARIABLE
from server.errors import ServerError
from server.torchserve import TorchServe

FIRST, SECOND = "first-token-" + "0" * 16, "second-token-" + "1" * 16
LIMITED = "limited-token-" + "2" * 16
LONG = {"text": ["9" * 60] * 100, "min_length": 60, "stream": True}
NATIVE, KSERVE = ["code", "type", "message"], ["error", "code", "type", "message"]
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["12"]}
V1, V2 = "/v1/models/seq2seq:predict", "/v2/models/seq2seq/infer"


def body(value) -> bytes:
    return json.dumps(value).encode()


# Path, body and headers of a request, its status with a token, and an error's fields without one
DOORS = {
    "native": (PREDICT, body({"text": "12"}), JSON, 200, NATIVE),
    "stream": (PREDICT, body({"text": "12", "stream": True}), JSON, 200, NATIVE),
    "version": (f"{PREDICT}/{{version}}", body({"text": "12"}), JSON, 200, NATIVE),
    "text": (PREDICT, b"12\n", TEXT, 200, NATIVE),
    "v1": (V1, body({"instances": ["12"]}), JSON, 200, KSERVE),
    "v2": (V2, body({"inputs": [TENSOR]}), JSON, 200, KSERVE),
    "card": (f"{PREDICT}/{{version}}/card", None, {}, 200, NATIVE),
    "schema": (f"{PREDICT}/{{version}}/schema", None, {}, 200, NATIVE),
    "elsewhere": (f"{PREDICT}/{{version}}/elsewhere", None, {}, 404, NATIVE),
    "broken": (PREDICT, b"{", JSON, 400, NATIVE),
    "nothing": (PREDICT, b"", {}, 400, NATIVE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokens = tmp_path_factory.mktemp("tokens")
    (tokens / "first").write_text(FIRST + "\n")
    (tokens / "limited").write_text(f"{LIMITED}\nshare: 2\nmost_waiting: 3\n")
    return tokens


@pytest.fixture(scope="module")
def guarded(toy, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        server = TorchServe(options(toy.store))
        server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def asked(server, path, content, headers) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Headers are pairs, as one may come twice."""
    with closing(connected(server.url)) as connection:
        connection.putrequest("GET" if content is None else "POST", path)
        for name, value in headers:
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(content or b"")))
        connection.endheaders(content)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def opened(server, token) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A long stream, of which the first part has come."""
    connection = connected(server.url)
    connection.request("POST", PREDICT, body(LONG), {**JSON, "Authorization": bearer(token)})
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.peek(1)
    return connection, reply


def through(server, door, *authorization):
    path, content, headers, *_ = DOORS[door]
    path = path.format(version=versions(server)[0]["modelVersion"])
    given = [("Authorization", value) for value in authorization]
    return asked(server, path, content, [*headers.items(), *given])


def bearer(token):
    return f"Bearer {token}"


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_shut_without_a_token(guarded, door):
    *_, status, fields = DOORS[door]
    assert through(guarded, door, bearer(FIRST))[0] == status
    for given in ((), (bearer(SECOND),)):
        status, headers, content = through(guarded, door, *given)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert headers["Content-Type"] == "application/json"
        error = json.loads(content)
        assert list(error) == fields
        assert (error["code"], error["type"]) == (401, "Unauthorized")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("authorization", f"bearer {FIRST}")], 200),
        ([("AUTHORIZATION", f"BEARER  {FIRST}")], 200),
        ([("Authorization", f"Basic {FIRST}")], 401),
        ([("Authorization", "")], 401),
        ([("Authorization", FIRST)], 401),
        ([("Authorization", bearer(FIRST)), ("authorization", bearer(FIRST))], 401),
        ([("Authorization", bearer(FIRST)), ("Authorization", "Bearer x")], 401),
        ([("Authorization", "Bearer ä".encode())], 401),
        ([("Authorization", b"Bearer " + b"\xff" * 20)], 401),
        ([("X-Authorization", bearer(FIRST))], 401),
    ],
)
def test_a_header_in_another_form_is_refused(guarded, headers, status):
    assert asked(guarded, PREDICT, b"12\n", headers)[0] == status


def test_those_that_are_refused_hinder_no_other(guarded):
    """A stream and many requests, with and without a token, in the same rounds."""
    stream, begun = opened(guarded, FIRST)
    tokens = [FIRST, SECOND, "", "x" * 5000] * 30
    with closing(stream), ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda one: through(guarded, "native", bearer(one))[0], tokens))
        assert Counter(zip(tokens, replies)) == {
            (one, 200 if one == FIRST else 401): 30 for one in set(tokens)
        }
        said, _ = heard(begun.read())
    assert len(said) == len(LONG["text"])


def test_a_token_s_own_limit_concerns_it_alone(guarded):
    def told(token, texts, *more):
        content = body({"text": texts, **dict(more)})
        return asked(guarded, PREDICT, content, [*JSON.items(), ("Authorization", bearer(token))])

    assert told(LIMITED, ["12"] * 3)[0] == 200
    status, headers, content = told(LIMITED, ["12"] * 4)
    error = json.loads(content)
    assert (status, error["code"], error["type"]) == (429, 429, "TooManyWaiting")
    assert headers["Retry-After"] == "1"
    assert "allowed with this token: 3 together" in error["message"]
    assert told(FIRST, ["12"] * 4, ("priority", "bulk"))[0] == 200


def test_a_token_is_replaced_while_the_server_runs(guarded, folder):
    def until(token, status):
        """The change is seen at the first request that comes an interval after the last look."""
        deadline = time.monotonic() + GUARD_SECONDS
        while through(guarded, "text", bearer(token))[0] != status:
            assert time.monotonic() < deadline
            time.sleep(INTERVAL / 4)

    (folder / "second").write_text(SECOND)
    until(SECOND, 200)
    assert through(guarded, "text", bearer(FIRST))[0] == 200
    stream, begun = opened(guarded, FIRST)
    (folder / "first").unlink()
    until(FIRST, 401)
    assert through(guarded, "text", bearer(SECOND))[0] == 200
    with closing(stream):  # was admitted, and goes on
        assert len(heard(begun.read())[0]) == len(LONG["text"])
    (folder / "second").unlink()
    until(SECOND, 401)
    (folder / "first").write_text(FIRST)
    until(FIRST, 200)


def test_what_watches_the_server_needs_no_token(guarded):
    through(guarded, "native")
    assert guarded.is_ready()
    scraped(guarded, lambda figures: any("Unauthorized" in str(key) for key in figures))
    with closing(connected(guarded.url)) as connection:
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().status == 200


def test_a_folder_without_tokens_is_fatal(toy, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = TorchServe(options(toy.store))
    message = f"ValueError: {VARIABLE}: got .*allowed: a folder"
    with pytest.raises(ServerError, match=message), server:
        pytest.fail("is ready")
