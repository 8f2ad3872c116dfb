"""What is read in large pieces is what TorchServe reads field by field."""

import hashlib
import itertools
import json
import logging
import random
import socket
import struct
import sys
import threading
import warnings
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler import buffered_reader
from handler.buffered_reader import DECODED, Reader, install, reader
from server.torchserve import torchserve_home

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it reads its version and closes no file
    import ts.protocol  # noqa: F401

NAME = "ts.protocol.otf_message_handler"
SOURCE = torchserve_home() / "ts" / "protocol" / "otf_message_handler.py"
END = struct.pack("!i", -1)


def fresh(source=SOURCE):
    """TorchServe's functions as they are, whatever another test put in place of them."""
    spec = spec_from_file_location(NAME, source)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OWN = fresh()


@pytest.fixture(scope="module")
def ours():
    """TorchServe's functions with two of them replaced."""
    with pytest.MonkeyPatch.context() as patch:
        module = fresh()
        patch.setitem(sys.modules, NAME, module)
        assert install()
        yield module


def field(content: bytes | int) -> bytes:
    """A number stands for a length alone; nothing follows one that is negative."""
    if isinstance(content, int):
        return struct.pack("!i", content)
    return struct.pack("!i", len(content)) + content


def request(name=b"1", headers=(), inputs=()) -> bytes:
    listed = (b"".join(field(one) for entry in some for one in entry) for some in (headers, inputs))
    return field(name) + b"".join(one + END for one in listed)


def asking(name=b"1", body=b'{"text": "12"}', kind=b"application/json") -> bytes:
    return request(name, [(b"Content-Type", kind)], [(b"body", kind, body)])


def message(*requests: bytes) -> bytes:
    return b"I" + b"".join(requests) + END


LOAD = (
    b"L" + field(b"seq2seq") + field("/tmp/mödel".encode()) + struct.pack("!i", 80)
    + field(b"seq2seq_handler.py") + struct.pack("!i", -1) + field(b"") + b"\1"
)

# What TorchServe 0.12.0 sent of a GET of .../seq2seq/1.0/card, of a line of text, and of a stream
# that had got its first part.
SENT = (
    b"I"
    b"\0\0\0$a4cc13d6-2de8-4ec1-a900-f26e6cf58148\0\0\0\7explain\0\0\0\5False\0\0\0\x0e"
    b"content-length\0\0\0\x010\0\0\0\4Host\0\0\0\x0f127.0.0.1:33553\0\0\0\x0f"
    b"Accept-Encoding\0\0\0\x08identity\0\0\0\x08url_path\0\0\0\4card\xff\xff\xff\xff"
    b"\0\0\0\4body\0\0\0\0\0\0\0\0\xff\xff\xff\xff"
    b"\0\0\0$56c7329d-192e-444f-a7b0-90c9d4b2b9be\0\0\0\7explain\0\0\0\5False\0\0\0\4Host"
    b"\0\0\0\x0f127.0.0.1:33553\0\0\0\x0fAccept-Encoding\0\0\0\x08identity\0\0\0\x0e"
    b"Content-Length\0\0\0\x0211\0\0\0\x0cContent-Type\0\0\0\ntext/plain\0\0\0\x08url_path"
    b"\0\0\0\0\xff\xff\xff\xff\0\0\0\4body\0\0\0\ntext/plain\0\0\0\x0bMay 5, 1999"
    b"\xff\xff\xff\xff"
    b"\0\0\0$3fef42d6-3fbb-4c5b-97a5-9cd8ed0ec902\0\0\0\7explain\0\0\0\5False\0\0\0\4Host"
    b"\0\0\0\x0f127.0.0.1:33553\0\0\0\x0fAccept-Encoding\0\0\0\x08identity\0\0\0\x0e"
    b"Content-Length\0\0\0\x041542\0\0\0\x0cContent-Type\0\0\0\x10application/json"
    b"\0\0\0\x08url_path\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"
    b"\xff\xff\xff\xff"
)


class Pieces:
    """A connection over which bytes come in pieces of given sizes, and which ends after them."""

    def __init__(self, data: bytes, sizes=(1 << 30,)) -> None:
        self.data, self.at = data, 0
        self.sizes = itertools.cycle(sizes)

    def recv(self, size: int) -> bytes:
        begin = self.at
        self.at = min(len(self.data), begin + min(size, next(self.sizes)))
        return self.data[begin : self.at]


def received(module, connection) -> list[str]:
    """Every message in turn, with all types, and what happened at the end."""
    found = []
    try:
        while True:
            found.append(repr(module.retrieve_msg(connection)))
    except (SystemExit, Exception) as error:
        return [*found, repr(error)]


# TorchServe takes a negative length for nothing, where a list does not end with it.
nothing = st.integers(-(1 << 31), -1)
first = st.binary(max_size=9) | st.integers(-(1 << 31), -2)
strings = st.binary(max_size=9) | nothing
kinds = st.sampled_from(
    [b"application/json", b"text/plain", b"text", b"a/b", b"", b"application/json;charset=utf-8"]
)
contents = (
    st.binary(max_size=30)
    | st.text(max_size=9).map(str.encode)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=3).map(
        lambda value: json.dumps(value).encode()
    )
)
names = st.text("aé", max_size=3).map(str.encode) | st.just(-2)
requests = st.builds(
    request,
    st.sampled_from([b"a", b"b", b"c", b"", "é".encode()]) | st.just(-7),
    st.lists(st.tuples(first, strings), max_size=3),
    st.lists(st.tuples(names, kinds | nothing, contents | nothing), max_size=2),
)


@st.composite
def streams(draw) -> bytes:
    """Calls, each of which has some of the requests of the one before, in any order."""
    live, told = [], []
    for _ in range(draw(st.integers(1, 4))):
        kept = [one for one in live if draw(st.booleans())]
        live = draw(st.permutations([*kept, *draw(st.lists(requests, max_size=3))]))
        told.append(LOAD if draw(st.integers(0, 5)) == 0 else message(*live))
    return b"".join(told)


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@settings(max_examples=300)
@given(streams(), sizes, st.integers(0, 60))
def test_messages_in_any_pieces_are_as_torchserve_reads_them(ours, data, sizes, lost):
    whole = received(OWN, Pieces(data))
    assert whole[-1] == "SystemExit(0)"
    assert received(ours, Pieces(data, sizes)) == whole
    # The frontend may go away at any byte.
    data = data[: max(0, len(data) - lost)]
    assert received(ours, Pieces(data, sizes)) == received(OWN, Pieces(data))


def test_what_torchserve_sent(ours):
    told = received(OWN, Pieces(SENT * 2))
    for size in (1, 40, len(SENT)):
        assert received(ours, Pieces(SENT * 2, [size])) == told
    _, (card, text, stream) = ours.retrieve_msg(Pieces(SENT))
    assert card["headers"][-1] == {"name": b"url_path", "value": b"card"}
    assert card["parameters"] == [{"name": "body", "contentType": "", "value": b""}]
    assert text["requestId"] == b"56c7329d-192e-444f-a7b0-90c9d4b2b9be"
    assert text["parameters"] == [
        {"name": "body", "contentType": "text/plain", "value": "May 5, 1999"}
    ]
    assert stream["parameters"] == []


@pytest.mark.parametrize("decode", ["true", "false", "True", ""])
def test_bodies_are_decoded_where_torchserve_decodes_them(ours, monkeypatch, decode):
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", decode)
    data = message(asking(), asking(b"2", b"a", b"text/plain"), asking(b"3", b"a", b"a/b"))
    assert received(ours, Pieces(data)) == received(OWN, Pieces(data))


@pytest.mark.parametrize(
    ("kind", "body"),
    [(b"application/json", b"{"), (b"application/json", b"\xff"), (b"text/plain", b"\xff")],
)
def test_what_cannot_be_decoded_stays_bytes_and_is_told_as_torchserve_tells(
    ours, caplog, kind, body
):
    data, lines = message(asking(body=body, kind=kind)), []
    for module in (OWN, ours):
        caplog.clear()
        _, (one,) = module.retrieve_msg(Pieces(data))
        assert one["parameters"][0]["value"] == bytearray(body)
        lines.append([(r.name, r.levelno, r.msg) for r in caplog.records if r.exc_info])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"X",
        message(request(inputs=[(b"\xff", b"a/b", b"")])),
        message(request(inputs=[(b"body", b"\xff", b"")])),
        b"",
    ],
)
def test_what_torchserve_dies_of_has_the_same_error(ours, data):
    assert received(ours, Pieces(data)) == received(OWN, Pieces(data))


def test_a_request_that_comes_again_is_not_decoded_again(ours):
    again, other = asking(b"1"), asking(b"2")
    connection = Pieces(message(again) + message(other, again) + message(again))
    (first,), (_, second), (third,) = (ours.retrieve_msg(connection)[1] for _ in range(3))
    assert first is second is third
    assert list(reader(connection).known) == [b"1"]  # the other one is forgotten


@pytest.mark.parametrize("more", [0, 1])
def test_json_that_is_long_stays_bytes_for_the_handler_to_parse(ours, more):
    body = b'"' + b"a" * (DECODED - 2 + more) + b'"'
    ((one,),) = (ours.retrieve_msg(Pieces(message(asking(body=body))))[1],)
    assert one["parameters"][0]["value"] == (body if more else json.loads(body))


def test_other_bytes_under_the_same_id_are_another_request(ours):
    """Of a stream that is open, the frontend sends no body."""
    short = request(b"1", [(b"Content-Type", b"application/json")])
    longer = asking(b"1", b'{"text": "123"}')
    told = [message(one) for one in (asking(b"1"), short, longer, short, asking(b"1"))]
    data = b"".join(told)
    found = received(ours, Pieces(data))
    assert found == received(OWN, Pieces(data))
    assert len(set(found[:-1])) == 3


def test_nothing_is_held_of_a_call_that_was_read_but_its_requests(ours):
    connection = Pieces(message(asking()))
    ours.retrieve_msg(connection)
    assert reader(connection).data == b""


def test_a_call_in_one_piece_is_read_at_once():
    class Counted(Pieces):
        asked = 0

        def recv(self, size):
            self.asked += 1
            return super().recv(size)

    connection = Counted(message(*(asking(b"%d" % i) for i in range(80)))[1:])
    assert len(Reader(connection).requests()) == 80
    assert connection.asked == 1


def test_no_more_than_a_megabyte_is_asked_for_at_once():
    """Of a length that nothing follows, too, for which memory would be held."""
    most = []

    class Asked(Pieces):
        def recv(self, size):
            most.append(size)
            return super().recv(size)

    connection = Asked(field(b"1") + struct.pack("!i", (1 << 31) - 1))
    with pytest.raises(SystemExit):
        Reader(connection).requests()
    assert max(most) == buffered_reader.LARGEST


# Over sockets


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for one in ends:
        one.close()


def test_two_messages_at_once(ours, pair):
    near, far = pair
    data = LOAD + message(asking(b"1"), asking(b"2")) + message(asking(b"2"))
    near.sendall(data)
    near.close()
    found = received(ours, far)
    assert found == received(OWN, Pieces(data))
    assert len(found) == 4


def test_large_bodies(ours, pair):
    draw = random.Random(0)
    bodies = [draw.randbytes(size) for size in (0, 1, 65_536, 7_000_000, 100)]
    data = message(*(asking(b"%d" % i, body, b"a/b") for i, body in enumerate(bodies)))
    near, far = pair
    writer = threading.Thread(target=lambda: [near.sendall(data) for _ in range(2)])
    writer.start()
    for _ in range(2):
        _, found = ours.retrieve_msg(far)
        assert [one["parameters"][0]["value"] for one in found] == bodies
    writer.join()


def test_the_frontend_goes_away_within_a_message(ours, pair, caplog):
    near, far = pair
    near.sendall(message(asking())[:-9])
    threading.Timer(0.05, near.close).start()
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as end:
        ours.retrieve_msg(far)
    assert end.value.code == 0
    assert caplog.messages == ["Frontend disconnected."]


def test_connections_are_apart_and_forgotten(ours):
    before = len(buffered_reader.READERS)
    one, other = (Pieces(message(asking(body=body)) * 2) for body in (b"1", b"2"))
    for _ in range(2):
        for connection, value in ((one, 1), (other, 2)):
            _, (found,) = ours.retrieve_msg(connection)
            assert found["parameters"][0]["value"] == value
    del one, other, connection
    assert len(buffered_reader.READERS) == before


# Putting it in place


def test_it_was_written_for_the_torchserve_that_is_installed():
    """A change of TorchServe fails here first: compare what is replaced with what replaces it."""
    assert hashlib.sha256(SOURCE.read_bytes()).hexdigest() == buffered_reader.SHA256


def test_another_torchserve_is_left_as_it_is(tmp_path, monkeypatch, caplog):
    source = tmp_path / SOURCE.name
    source.write_bytes(SOURCE.read_bytes() + b"\n")
    module = fresh(source)
    before = dict(vars(module))
    monkeypatch.setitem(sys.modules, NAME, module)
    assert not install()
    source.unlink()
    assert not install()
    assert vars(module) == before
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_it_may_be_put_in_place_twice(monkeypatch):
    module = fresh()
    monkeypatch.setitem(sys.modules, NAME, module)
    connection = Pieces(message(asking()) * 2)
    for _ in range(2):
        assert install()
        assert len(module.retrieve_msg(connection)[1]) == 1
