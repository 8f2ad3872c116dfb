"""The JSON Schema and the service say the same; and whatever is drawn from it, or from around it,
is answered or refused, in the service alone and through a real TorchServe."""

import copy
import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from conftest import JSON as JSON_HEADERS
from conftest import call, raw
from echo_service import Clock, ask, left_nothing, service
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema
from test_streaming import BYTES, Babbler, told, transcript

from handler.request import JSON, RequestOptions
from handler.schema import schema
from handler.service import EVENTS, Incoming, Reply, Service

WHOLE = schema(RequestOptions, 8)
REQUEST = WHOLE["$defs"]["request"]
OPTIONS = {name: one for name, one in REQUEST["properties"].items() if name != "text"}
FIELDS = {one.name: one for one in dataclasses.fields(RequestOptions)}


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**WHOLE, "$ref": f"#/$defs/{name}"})


ANSWER, ERROR, VALID = validator("answer"), validator("error"), validator("request")


def test_it_is_a_json_schema_and_json():
    assert WHOLE["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$schema"]
    jsonschema.Draft202012Validator.check_schema(WHOLE)
    assert json.loads(json.dumps(WHOLE, allow_nan=False)) == WHOLE


def test_the_service_gives_it():
    one = service(max_texts=8)
    (reply,) = one.round([Incoming("1", "schema", "", None)])
    assert (reply.status, reply.content_type) == (200, JSON)
    assert json.loads(reply.body) == WHOLE


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_a_description_its_default_and_its_limits(name):
    told = OPTIONS[name]
    assert len(told["description"]) > 10
    assert told["description"].endswith(".")
    assert told["default"] == FIELDS[name].default
    VALID.validate({"text": "a", name: told["default"]})
    limits = {
        key: value
        for one in (told, *told.get("anyOf", ()))
        for key, value in one.items()
        if key in ("minimum", "exclusiveMinimum", "maximum", "maxLength")
    }
    words = {"above": "exclusiveMinimum", "longest": "maxLength"}
    assert limits == {words.get(k, k): v for k, v in FIELDS[name].metadata.items()}


def test_nothing_but_the_options_and_the_text_is_in_it():
    assert set(OPTIONS) == set(FIELDS)
    assert REQUEST["required"] == ["text"]
    assert not VALID.is_valid({"text": "a", "beam": 2})


def outside(told: dict) -> list[object]:
    """Values of an option that are just not allowed, and some of other types."""
    wrong: list[object] = [[], {}, [told["default"]]]
    for one in (told, *told.get("anyOf", ())):
        if "minimum" in one:
            wrong.append(one["minimum"] - 1)
        if "exclusiveMinimum" in one:
            wrong.append(one["exclusiveMinimum"])
        if "maximum" in one:
            wrong.append(one["maximum"] * 2)
        if "maxLength" in one:
            wrong.append("a" * (one["maxLength"] + 1))
        if one.get("type") in ("integer", "number"):
            wrong += ["1", True]
        if one.get("type") == "boolean" or "enum" in one:
            wrong += [0, "true", None]
    return wrong


@pytest.mark.parametrize("name", FIELDS)
def test_what_an_option_may_not_be_the_service_refuses_by_name(name):
    one = service()
    for value in outside(OPTIONS[name]):
        assert not VALID.is_valid({"text": "a", name: value}), value
        (reply,) = one.round([ask(1, "a", **{"length": None, name: value})])
        assert reply is not None, value
        assert reply.status == 400
        assert json.loads(reply.body)["message"].startswith(f"{name}: got ")
        ERROR.validate(json.loads(reply.body))
    assert left_nothing(one)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("a", True), (["a"], True), (["a"] * 8, True), ("é\n", True),
        (["a"] * 9, False), ([], False), ("", False), (" \n\u3000", False), (["a", ""], False),
        (5, False), (None, False), ([["a"]], False), ({}, False),
    ],
)
def test_the_text_is_what_the_service_takes(text, valid):
    assert VALID.is_valid({"text": text}) == valid
    one = service(max_texts=8, source=BYTES, target=BYTES, model=Babbler(0), round_ms=1e6)
    (reply,) = one.round([Incoming("1", "", JSON, {"text": text})])
    assert (reply.status == 200) == valid


# Anything that the schema allows, and what is near it


def limited() -> dict:
    """The schema of a request, with fewer and shorter texts."""
    short = copy.deepcopy(REQUEST)
    one, many = short["properties"]["text"]["anyOf"]
    one |= {"maxLength": 40}
    many |= {"items": one, "maxItems": 4}
    return short


def consistent(document: dict) -> dict:
    """Without what contradicts itself, so that most of it is answered."""
    one = dict(document)
    if one.get("sampling"):
        one["beam_size"] = 1
    else:
        for name in ("temperature", "top_k", "top_p", "seed"):
            one.pop(name, None)
    one["n_best"] = min(one.get("n_best", 1), one.get("beam_size", 1))
    one["min_length"] = min(one.get("min_length", 0), one.get("max_length") or 20, 20)
    return one


words = st.text(st.sampled_from("the cat.A\n éあ😀"), min_size=1, max_size=20).filter(str.strip)
drawn = from_schema(limited())
requests = drawn | drawn.map(consistent) | st.builds(
    lambda one, text: consistent(one) | {"text": text}, drawn,
    words | st.lists(words, min_size=1, max_size=4),
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), 2**63, 2.0, 1e308, math.nan, -math.inf, "\ud800", ""])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
nested = st.integers(1, 50).map(lambda depth: json.loads("[" * depth + "]" * depth))


@st.composite
def mutated(draw) -> object:
    """A request with a few fields that are other, more or missing, through any door."""
    document = dict(draw(requests))
    for _ in range(draw(st.integers(1, 3))):
        names = st.sampled_from(sorted(REQUEST["properties"])) | st.text(max_size=8)
        name, kind = draw(names), draw(st.sampled_from(["other", "other", "other", "missing"]))
        if kind == "other":
            document[name] = draw(values | nested)
        else:
            document.pop(name, None)
    shape = draw(st.sampled_from(["text", "text", "text", "instances", "inputs", "list"]))
    if shape == "text":
        return document
    text = document.pop("text", None)
    texts = text if isinstance(text, list) else [text]
    if shape == "instances":
        return {"instances": draw(st.just(texts) | values), "parameters": document}
    if shape == "inputs":
        size, datatype = draw(st.just([len(texts)]) | values), draw(st.just("BYTES") | values)
        tensor = {"name": "x", "shape": size, "datatype": datatype, "data": texts}
        name = draw(st.sampled_from(["q", "\ud800"]) | values)
        return {"id": name, "inputs": [tensor], "parameters": document}
    return [document]


def fits(reply: Reply) -> bool:
    """Whether a reply is an answer, which fits the schema; as every error does."""
    if reply.content_type == EVENTS:
        name, last = told(reply)[-1]
        assert name == "answer", last
        ANSWER.validate(last)
        return True
    body = json.loads(reply.body)
    if reply.status == 200:
        if "translations" in body:
            ANSWER.validate(body)
        return True
    assert reply.status in (400, 413), body
    ERROR.validate({key: body[key] for key in body if key != "error"})
    assert set(body) <= {"code", "type", "message", "error"}
    return False


def served() -> Service:
    model = Babbler(1)
    return service(
        64, model, Clock(model), source=BYTES, target=BYTES, max_texts=8, round_ms=100.0
    )


@settings(max_examples=150)
@given(requests)
def test_what_the_schema_allows_is_answered_or_refused(document):
    VALID.validate(document)
    one = served()
    fits(transcript(one, Incoming("1", "", JSON, document), rounds=2000)[-1])
    assert left_nothing(one)


@settings(max_examples=250)
@given(mutated())
def test_what_is_near_the_schema_is_answered_or_refused(document):
    one = served()
    answered = fits(transcript(one, Incoming("1", "", JSON, document), rounds=2000)[-1])
    if isinstance(document, dict) and "text" in document and not VALID.is_valid(document):
        assert not answered
    assert left_nothing(one)


def test_most_of_what_is_drawn_is_answered():
    """Or the two tests above would only see refusals."""
    statuses = []

    @settings(max_examples=60, database=None, derandomize=True)
    @given(requests)
    def see(document):
        one = served()
        statuses.append(transcript(one, Incoming("1", "", JSON, document), rounds=2000)[-1].status)

    see()
    assert statuses.count(200) > len(statuses) / 4
    assert set(statuses) > {200}


# The same through TorchServe


def sent(server, document: object) -> Reply:
    """Streams and whole answers, with NaN as Python's JSON has it."""
    reply = raw(server, json.dumps(document).encode(), JSON_HEADERS)
    return Reply(reply.status, reply.content_type, reply.body.decode())


@pytest.mark.parametrize("kind", ["allowed", "near"])
def test_a_server_answers_or_refuses_whatever_is_drawn(server, kind):
    """Six at a time; the fixture sees that its worker is the same process in the end."""

    @settings(max_examples=10, database=None, phases=[Phase.generate])
    @given(st.lists(requests if kind == "allowed" else mutated(), min_size=6, max_size=6))
    def send(documents):
        with ThreadPoolExecutor(6) as pool:
            for document, reply in zip(documents, pool.map(lambda d: sent(server, d), documents)):
                answered = fits(reply)
                if kind == "near" and isinstance(document, dict) and "text" in document:
                    assert not answered or VALID.is_valid(document)

    send()
    assert call(server, body={"text": "271"}).texts == ["172"]
