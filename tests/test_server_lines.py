"""The lines of a file through a server, whose answers are a function here: in order, in requests
that it takes, and a bad line costs itself alone."""

import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ReplyError, ServerError
from server.lines import BYTES, LINES, LONGEST, Line, read, translated

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=8)


class Server:
    """Translates into capitals, but no request that has a text with "bad" in it."""

    def __init__(self, status: int = 413, kind: str = "TextTooLong") -> None:
        self.requests: list[list[bytes]] = []
        self.status, self.kind = status, kind

    def ask(self, sent: Sequence[bytes]) -> list[bytes]:
        self.requests.append(list(sent))
        if any(b"bad" in text for text in sent):
            raise ReplyError(self.status, self.kind, "text[50]: not this")
        return [text.upper() for text in sent]


def through(content: bytes, server: Server) -> list[Line]:
    return list(translated(read(io.BytesIO(content)), server.ask))


@given(st.lists(texts | st.just("bad") | st.just("x" * 9000), min_size=1, max_size=200))
def test_each_line_has_its_own_translation_or_problem(lines: list[str]) -> None:
    server = Server()
    content = "\n".join(lines).encode()
    found = through(content, server)
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not expected[-1]:  # a line feed ends the line before it
        expected.pop()
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    for line, text in zip(found, expected):
        if b"bad" in text:
            assert (line.text, line.problem) == (b"", "413 TextTooLong: text[50]: not this")
        else:
            assert (line.text, line.problem) == (text.removesuffix(b"\r").upper(), None)
    for sent in server.requests:
        assert 1 <= len(sent) <= LINES
        assert sum(len(text) + 1 for text in sent) <= BYTES


def test_requests_are_filled() -> None:
    server = Server()
    through(b"a\n" * 130, server)
    assert [len(sent) for sent in server.requests] == [64, 64, 2]
    server = Server()
    through(("한" * 900 + "\n").encode() * 64, server)  # 64 paragraphs of 2.7 kB
    assert [len(sent) for sent in server.requests] == [24, 24, 16]
    server = Server()
    through(b"a" * 100_000 + b"\n" + b"b\n", server)  # one that a server takes, but alone
    assert [len(sent) for sent in server.requests] == [1, 1]


def test_a_bad_line_takes_few_further_requests() -> None:
    server = Server()
    lines = [b"good"] * 1000
    lines[500] = b"bad"
    found = through(b"\n".join(lines), server)
    assert [line.number for line in found if line.problem] == [501]
    assert len(server.requests) <= 16 + 2 * 6


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "Unauthorized"), (404, "NotFound"), (503, "Overloaded"), (500, "x")]
)
def test_what_would_meet_every_request_stops_it(status: int, kind: str) -> None:
    server = Server(status, kind)
    with pytest.raises(ReplyError):
        through(b"good\nbad\n", server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413])
def test_an_error_of_a_proxy_without_a_type_is_one_of_the_text(status: int) -> None:
    found = through(b"good\nbad\nx", Server(status, "HTTPError"))
    assert [line.problem is None for line in found] == [True, False, True]


def test_bad_bytes_and_lines_that_no_server_takes_are_never_sent() -> None:
    server = Server()
    long = b"x" * (3 * LONGEST)
    found = through(b"one\n\xff\n" + long + b"\ntwo\r\n" + long, server)
    assert [line.text for line in found] == [b"ONE", b"", b"", b"TWO", b""]
    assert [line.problem and line.problem.split()[0] for line in found] == [
        None, "byte", f"{len(long) + 1}", None, f"{len(long)}",
    ]  # fmt: skip
    assert server.requests == [[b"one", b"two"]]


@given(st.integers(LONGEST - 3, LONGEST + 5), st.booleans())
def test_a_line_is_kept_or_refused_whole(length: int, ended: bool) -> None:
    content = b"x" * length + b"\n" * ended + b"y"
    if not ended:
        content = content[:-1]
    lines = list(read(io.BytesIO(content)))
    assert len(lines) == 1 + ended
    assert (lines[0].problem is None) == (length + ended <= LONGEST)
    assert lines[0].problem or lines[0].text == b"x" * length


def test_utf16_is_refused_at_once() -> None:
    with pytest.raises(ServerError, match="standard input is UTF-16"):
        through("one\n".encode("utf-16"), Server())
