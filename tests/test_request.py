"""What a client may send: every mistake is refused by name, and nothing else ever comes out."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.doors import KServeV1, Native, OpenInference, PlainText
from handler.fields import FieldError, read, shown
from handler.request import JSON, TEXT, Refusal, RequestOptions, TranslationRequest, parse

MOST = 4
PLAIN = RequestOptions()


def refusal(content_type, body) -> Refusal:
    with pytest.raises(Refusal) as error:
        parse(content_type, body, MOST)
    one = error.value
    assert one.told() == {"code": one.status, "type": one.kind, "message": str(one)}
    assert "\n" not in str(one)
    assert len(str(one)) < 400
    return one


# JSON


@pytest.mark.parametrize(
    ("given", "texts", "options"),
    [
        ({"text": "a"}, ["a"], PLAIN),
        ({"text": ["a", " b "]}, ["a", " b "], PLAIN),
        ({"text": "a", "max_length": 3}, ["a"], RequestOptions(max_length=3)),
        ({"text": "a", "max_length": None}, ["a"], PLAIN),
        ({"text": "a\nb\0\U0010ffff"}, ["a\nb\0\U0010ffff"], PLAIN),
    ],
)
def test_json_is_read_decoded_or_not(given, texts, options):
    expected = TranslationRequest(texts, options, Native())
    assert parse(JSON, given, MOST) == expected
    assert parse(JSON, json.dumps(given).encode(), MOST) == expected
    assert parse("Application/JSON ; charset=utf-8", bytearray(json.dumps(given), "utf-8"), MOST) \
        == expected


def test_every_option_is_read():
    options = {
        "beam_size": 4, "n_best": 2, "max_length": 9, "min_length": 1, "length_penalty": 0.5,
        "length_penalty_form": "gnmt", "coverage_penalty": 0.2, "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2, "sampling": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "seed": None, "max_time": 2.5, "return_scores": True, "return_alignments": True,
        "prefix": "é", "split": False, "stream": True, "return_tokens": True,
        "priority": "bulk", "join_lines": False,
    }
    assert set(options) == {one.name for one in dataclasses.fields(RequestOptions)}
    request = parse(JSON, {"text": "a", **options}, MOST)
    assert dataclasses.asdict(request.options) == options
    drawn = {"sampling": True, "temperature": 2, "top_k": 5, "top_p": 0.5, "seed": 7}
    assert parse(JSON, {"text": "a", **drawn}, MOST).options == RequestOptions(**drawn)


@pytest.mark.parametrize(
    ("given", "door"),
    [
        ({"instances": ["a", {"text": "b"}], "parameters": {"max_length": 3}}, KServeV1()),
        (
            {
                "id": "q",
                "inputs": [{"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}],
                "parameters": {"max_length": 3},
            },
            OpenInference("q"),
        ),
    ],
)
def test_the_shapes_of_kserve_are_read_decoded_or_not(given, door):
    expected = TranslationRequest(["a", "b"], RequestOptions(max_length=3), door)
    assert parse(JSON, given, MOST) == expected
    assert parse(JSON, json.dumps(given).encode(), MOST) == expected


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, "InvalidOption", "text: missing; allowed: a string or a list of strings"),
        ({"text": 5}, "InvalidOption", "text: got 5; allowed: a string or a list of at least one"),
        ({"text": None}, "InvalidOption", "text: got null; allowed"),
        ({"text": {}}, "InvalidOption", "text: got a mapping; allowed"),
        ({"text": []}, "InvalidOption", "text: got a list of 0; allowed"),
        ({"text": ["a", True]}, "InvalidOption", r"text[1]: got true; allowed: a string"),
        ({"text": "a", "beam": 2}, "InvalidOption", "beam: unknown option; "),
        (
            {"text": "a", "max_lenght": 2},
            "InvalidOption",
            "max_lenght: unknown option; did you mean 'max_length'? allowed: beam_size",
        ),
        ({"text": "a", "\ud800\n": 2}, "InvalidOption", r"'\ud800\n': unknown option"),
        ({"text": "a", "k" * 10**5: 2}, "InvalidOption", "(100000 characters): unknown option"),
        (
            {"text": "a", "max_length": 0},
            "InvalidOption",
            "max_length: got 0; allowed: an integer of at least 1 or null",
        ),
        ({"text": "a", "max_length": True}, "InvalidOption", "max_length: got true; allowed"),
        ({"text": "a", "max_length": 2.0}, "InvalidOption", "max_length: got 2.0; allowed"),
        ({"text": "a", "max_length": "9" * 99}, "InvalidOption", "(99 characters); allowed"),
        ({"text": "a", "max_length": -(10**400)}, "InvalidOption", "more than 64 bits; allowed"),
        ({"text": "a", "instances": ["a"]}, "InvalidOption", "instances: unknown option; "),
        (
            {"text": "a", "prefix": "e" * 4097},
            "InvalidOption",
            "(4097 characters); allowed: a string of at most 4096 characters or null",
        ),
        ({"text": "a", "stream": 1}, "InvalidOption", "stream: got 1; allowed: true or false"),
        (
            {"text": "a", "priority": "high"},
            "InvalidOption",
            "priority: got 'high'; allowed: 'interactive' or 'bulk'",
        ),
        ({"text": "a", "split": None}, "InvalidOption", "split: got null; allowed: true or false"),
        (
            {"text": "a", "max_time": 0},
            "InvalidOption",
            "max_time: got 0; allowed: a number above 0.0 and of at most 3600.0 or null",
        ),
        (
            {"text": "a", "coverage_penalty": "1e-3"},
            "InvalidOption",
            "coverage_penalty: got '1e-3'; allowed: a number",
        ),
        (
            {"text": "a", "coverage_penalty": 10.5},
            "InvalidOption",
            "coverage_penalty: got 10.5; allowed: a number from 0.0 to 10.0",
        ),
        (
            {"text": "a", "sampling": True, "seed": 2**63},
            "InvalidOption",
            "seed: got 9223372036854775808; allowed: an integer from 0 to 9223372036854775807",
        ),
        ({"text": ""}, "EmptyText", "text: got ''; allowed: text that is not blank"),
        ({"text": ["a", " \t\n"]}, "EmptyText", r"text[1]: got ' \t\n'; allowed: text that is not"),
        (
            {"text": ["a", "ab\udfff"]},
            "InvalidText",
            "text[1]: character 2 is the lone surrogate U+DFFF; allowed: whole Unicode characters",
        ),
        ([], "InvalidRequest", "the body: got a list of 0; allowed: an object such as"),
        (5, "InvalidRequest", "the body: got 5; allowed: an object"),
        ("text", "InvalidRequest", "the body: got 'text'; allowed: an object"),
        (False, "InvalidRequest", "the body: got false; allowed: an object"),
    ],
)
def test_wrong_json_is_refused_by_name(given, kind, message):
    for body in (given, json.dumps(given).encode()):
        one = refusal(JSON, body)
        assert (one.status, one.kind) == (400, kind)
        assert message in str(one)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"text": "a"', "Expecting ',' delimiter at line 1 column 13"),
        (b"text", "Expecting value at line 1 column 1"),
        (b'{"text": "a", "max_length": NaN}', "NaN is not JSON"),
        (b'{"text": "\xff"}', "byte 10 is not utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' * 100_000, "nested too deeply"),
        (b'{"text": "a", "max_length": ' + b"9" * 5000 + b"}", "integer"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(body, problem):
    one = refusal(JSON, body)
    assert (one.status, one.kind) == (400, "InvalidJSON")
    assert "the body is not valid JSON" in str(one)
    assert problem in str(one)


def test_more_texts_than_allowed_are_refused():
    assert len(parse(JSON, {"text": ["a"] * MOST}, MOST).texts) == MOST
    for content_type, body in ((JSON, {"text": ["a"] * 5}), (TEXT, "a\n" * 5)):
        one = refusal(content_type, body)
        assert (one.status, one.kind) == (413, "TooManyTexts")
        assert str(one) == "text: got 5 texts; allowed: at most 4 in a request"


# Text


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ("a", ["a"]),
        ("a\nb\n", ["a", "b"]),
        ("a\r\n\r\nb\r\n", ["a", "", "b"]),
        ("\n\na\n\n", ["", "", "a", ""]),
        ("\ufeffä 😀", ["ä 😀"]),
        ("a\u2028b\x0bc", ["a\u2028b\x0bc"]),
        ("{}", ["{}"]),
        ("\n", [""]),
        (" \n\t\n", ["", ""]),
        ("\u200b\n\x1aa\n\0\n\r\n", ["", "\x1aa", "", ""]),
    ],
)
@pytest.mark.parametrize("content_type", [TEXT, "TEXT/PLAIN;charset=UTF-8", None, ""])
def test_text_is_one_sentence_a_line(body, texts, content_type):
    expected = TranslationRequest(texts, PLAIN, PlainText())
    assert parse(content_type, body, MOST) == expected
    assert parse(content_type, body.encode(), MOST) == expected


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"ab\xff", "InvalidText", "the body is not UTF-8: byte 2 is 0xff; send UTF-8"),
        ({"text": "a"}, "InvalidText", "the body: got a mapping; allowed: text"),
    ],
)
def test_wrong_text_is_refused(body, kind, message):
    one = refusal(TEXT, body)
    assert (one.status, one.kind, str(one)) == (400, kind, message)


# Neither


@pytest.mark.parametrize("content_type", [JSON, TEXT, None])
@pytest.mark.parametrize("body", [None, b"", "", bytearray()])
def test_no_body_is_refused(content_type, body):
    one = refusal(content_type, body)
    assert (one.status, one.kind) == (400, "InvalidRequest")
    assert str(one) == "the request has no body; send application/json or text/plain"


@pytest.mark.parametrize(
    "content_type",
    ["application/xml", "application/x-www-form-urlencoded", "text/html", "\ud800", "x" * 999],
)
@pytest.mark.parametrize("body", [b"a", None])
def test_other_content_types_are_refused(content_type, body):
    one = refusal(content_type, body)
    assert (one.status, one.kind) == (400, "InvalidContentType")
    assert str(one).startswith(f"Content-Type: got {shown(content_type)}; allowed: ")
    told, _, hint = str(one).partition("; tell ")
    assert told.partition("; ")[2] == "allowed: application/json or text/plain"
    forgotten = "x-www-form-urlencoded" in content_type
    assert hint == ("curl: -H 'Content-Type: application/json'" if forgotten else "")


# Anything

NAMES = ["text", "max_length", "instances", "inputs", "parameters", "id", "data", "shape", "stream"]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    | st.sampled_from([10**400, "\ud800", "\udfff😀", "", " ", "\x01"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=12,
)
content_types = st.sampled_from([JSON, TEXT, "", None, "text/plain; charset=utf-16", "a/b"]) \
    | st.text()


def parses_or_refuses(content_type, body):
    try:
        request = parse(content_type, body, MOST)
    except Refusal as one:
        refused = one
    else:
        assert 1 <= len(request.texts) <= MOST
        assert request.door == PlainText() or all(text.strip() for text in request.texts)
        for text in request.texts:
            text.encode()
        return
    assert refused.status in (400, 413)
    json.dumps(refused.told()).encode()


@settings(max_examples=300)
@given(content_types, st.binary() | values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_parse_or_are_refused(content_type, body):
    parses_or_refuses(content_type, body)


@settings(max_examples=300)
@given(content_types, values | st.fixed_dictionaries({"text": values, "max_length": values}))
def test_any_value_parses_or_is_refused(content_type, value):
    parses_or_refuses(content_type, value)


# The fields themselves


@dataclass(frozen=True)
class Inner:
    name: str
    ratio: float = field(default=0.5, metadata={"above": 0.0, "maximum": 1.0})


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int = field(default=1, metadata={"minimum": 1, "maximum": 9})
    kind: Literal["a", "b"] = "a"
    most: float | None = None
    quick: bool = False

    def __post_init__(self):
        if self.quick and self.kind == "b":
            raise ValueError("quick: got true with kind 'b'; allowed: false")


def test_options_are_read_with_their_defaults():
    assert read(Outer, {"inner": {"name": "n"}}) == Outer(Inner("n"))
    given = {"inner": {"name": "", "ratio": 1}, "count": 9, "kind": "b", "most": 2, "quick": False}
    assert read(Outer, given) == Outer(Inner("", 1.0), 9, "b", 2.0)


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        ({"inner": None}, "at.inner", "got null; allowed: a mapping of options"),
        ({"inner": 3}, "at.inner", "got 3; allowed: a mapping of options"),
        ({"inner": {}}, "at.inner.name", "missing; allowed: a string"),
        ({"inner": {"name": 1}}, "at.inner.name", "got 1; allowed: a string"),
        (
            {"inner": {"name": "n", "rate": 1}},
            "at.inner.rate",
            "unknown option; did you mean 'ratio'? allowed: name, ratio",
        ),
        (
            {"inner": {"name": "n", "ratio": 0}},
            "at.inner.ratio",
            "got 0; allowed: a number above 0.0 and of at most 1.0",
        ),
        ({"count": 10}, "at.count", "got 10; allowed: an integer from 1 to 9"),
        ({"count": 10**400}, "at.count", "more than 64 bits; allowed: an integer from 1 to 9"),
        ({"count": True}, "at.count", "got true; allowed: an integer from 1 to 9"),
        ({"kind": "c"}, "at.kind", "got 'c'; allowed: 'a' or 'b'"),
        ({"kind": ["a"]}, "at.kind", "got a list of 1; allowed: 'a' or 'b'"),
        ({"most": float("nan")}, "at.most", "got nan; allowed: a number or null"),
        ({"most": float("inf")}, "at.most", "got inf; allowed: a number or null"),
        ({"most": 10**400}, "at.most", "more than 64 bits; allowed: a number or null"),
        ({"quick": 1}, "at.quick", "got 1; allowed: true or false"),
        ({"quick": True, "kind": "b"}, "at.quick", "got true with kind 'b'; allowed: false"),
        ({7: 1}, "at.7", "unknown option; allowed: inner"),
    ],
)
def test_wrong_fields_are_named(change, name, problem):
    with pytest.raises(FieldError) as error:
        read(Outer, {"inner": {"name": "n"}, **change}, "at")
    assert error.value.field == name
    assert str(error.value).startswith(f"{name}: ")
    assert problem in str(error.value)


@given(values)
def test_any_value_can_be_shown(value):
    text = shown(value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 100
