"""Compressed bodies: expanded within the limit, or refused by what is wrong with them."""

import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.coding import ACCEPTED, decoded
from handler.request import Refusal

PACKERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, " GZip ": gzip.compress,
           "deflate": zlib.compress}  # fmt: skip


def refusal(*arguments: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decoded(*arguments)
    return caught.value


@given(st.sampled_from(sorted(PACKERS)), st.binary(max_size=300), st.integers(0, 300))
def test_what_was_compressed_comes_back_if_it_is_within_the_limit(coding, content, most):
    body = bytearray(PACKERS[coding](content))
    if len(content) <= most:
        assert decoded(body, coding, most) == content
    else:
        assert (refusal(body, coding, most).status) == 413


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
@pytest.mark.parametrize("body", [b"a", {"text": "a"}, "a", None])
def test_what_was_not_compressed_stays_as_it_is(coding, body):
    assert decoded(body, coding, 0) is body


def test_a_bomb_is_refused_and_never_held():
    bomb = gzip.compress(bytes(50_000_000))
    told = refusal(bomb, "gzip", 1000)
    assert (told.status, told.kind) == (413, "BodyTooLarge")
    assert "more than 1000 bytes" in str(told)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip;q=1", "\x1b[2J" + "x" * 9999])
def test_another_coding_is_named(coding):
    told = refusal(b"a", coding, 1000)
    assert (told.status, told.kind) == (415, "UnsupportedEncoding")
    assert f"allowed: one of {ACCEPTED}" in str(told)
    assert str(told).isprintable()
    assert len(str(told)) < 200


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "spoilt",
    [
        lambda b: b[:-1], lambda b: b + b"x", lambda b: b + b, lambda b: b"",
        lambda b: b"plain text", lambda b: None, lambda b: "text", lambda b: {"text": "a"},
        lambda b: b"x" + b, lambda b: b[:-6] + b"\0" + b[-5:],
    ],
)  # fmt: skip
def test_a_body_that_is_not_in_its_coding_is_refused(coding, spoilt):
    body = spoilt(PACKERS[coding](json.dumps({"text": "a"}).encode()))
    told = refusal(body, coding, 1000)
    assert (told.status, told.kind) == (400, "InvalidEncoding")
    assert f"not {coding}" in str(told)
