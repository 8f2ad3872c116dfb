"""The shapes of KServe: what goes in, what comes out, and how every mistake is told."""

import json

import pytest
from echo_service import Echo, answers, ask, left_nothing, service

from handler.doors import DOORS, KServeV1, Native, OpenInference
from handler.request import JSON, door_of
from handler.service import Incoming

BYTES = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}


def sent(body: object, number: object = 1) -> Incoming:
    return Incoming(str(number), "", JSON, body)


def v1(*instances: object, **parameters: object) -> dict:
    return {"instances": list(instances), "parameters": {"max_length": 2, **parameters}}


def v2(tensor: object = BYTES, *more: object, **parameters: object) -> dict:
    return {"inputs": [tensor, *more], "parameters": {"max_length": 2, **parameters}}


def answer(body: object) -> dict:
    """Of a service that answered it, and kept nothing."""
    one = service(rows=8, model=Echo(attention={}))
    reply = answers(one, [sent(body)])["1"]
    assert (reply.status, reply.content_type, reply.kind) == (200, JSON, "whole")
    assert left_nothing(one)
    return json.loads(reply.body)


def refused(body: object) -> dict:
    """An error in KServe's shape, which is ours besides."""
    one = service()
    (reply,) = one.round([sent(body)])
    assert reply is not None, "admitted"
    assert reply.content_type == JSON
    told = json.loads(reply.body)
    assert list(told) == ["error", "code", "type", "message"]
    assert told["error"] == told["message"]
    assert told["code"] == reply.status
    assert left_nothing(one)
    return told


def outputs(answered: dict) -> dict[str, dict]:
    found = {one["name"]: one for one in answered["outputs"]}
    assert len(found) == len(answered["outputs"])
    return found


def test_the_field_that_only_one_shape_has_is_its_door():
    assert [one.mark for one in DOORS] == ["text", "instances", "inputs"]
    assert [door_of({one.mark: 1}) for one in DOORS] == [Native, KServeV1, OpenInference]
    assert door_of({"text": 1, "instances": 2, "inputs": 3}) is Native
    assert [door_of(one) for one in ({}, [], None, "inputs", b"{}")] == [Native] * 5


# v1


def test_v1_answers_each_instance():
    told = answer(v1("a", {"text": "b"}, "c\nd"))
    assert told == {
        "predictions": [
            [{"text": text, "finish_reason": "length"}] for text in ("aa", "bb", "cc\ndd")
        ]
    }
    assert answer({"instances": ["a"]})["predictions"][0][0]["text"] == "a" * 19


def test_v1_answers_all_that_is_asked_for():
    asked = {"beam_size": 3, "n_best": 2, "return_scores": True, "return_tokens": True,
             "return_alignments": True}
    (native,) = answer({"text": "a", "max_length": 2, **asked})["translations"]
    assert answer(v1("a", **asked))["predictions"] == [native]
    assert len(native) == 2
    assert sorted(native[0]) == ["alignment", "finish_reason", "score", "text", "tokens"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"instances": []}, "instances: got a list of 0; allowed: "),
        ({"instances": None}, "instances: got null; allowed: "),
        ({"instances": {"text": "a"}}, "instances: got a mapping; allowed: "),
        ({"instances": ["a", 5]}, "instances[1]: got 5; allowed: a string"),
        ({"instances": [{"text": ["a"]}]}, "instances[0]: got a list of 1; allowed: a string"),
        ({"instances": [{"text": "a", "id": 1}]}, "instances[0]: got a mapping; allowed: a string"),
        ({"instances": [{}]}, "instances[0]: got a mapping"),
        ({"instances": ["a"], "parameters": [1]}, "parameters: got a list of 1; allowed"),
        ({"instances": ["a"], "signature_name": "x"}, "unknown; allowed: instances, parameters"),
        ({"instances": ["a"], "inputs": []}, "'inputs': unknown"),
        (v1("a", beam=2), "beam: unknown option"),
        (v1("a", beam_size=0), "beam_size: got 0; allowed: an integer from 1 to 64"),
        (v1("a", stream=True), "stream: got true; allowed in this shape of request: false"),
        (v1("a", prefix="xx"), "prefix: got 'xx'; allowed: characters that the model can write"),
        (v1("a", return_alignments=True), "return_alignments: got True; allowed by this model"),
    ],
)
def test_mistakes_in_v1_are_named(body, message):
    told = refused(body)
    assert (told["code"], told["type"]) == (400, "InvalidOption")
    assert message in told["message"]


def test_stream_may_be_false_in_every_shape():
    assert answer(v1("a", stream=False))["predictions"][0][0]["text"] == "aa"
    assert outputs(answer(v2(stream=False)))["translation"]["data"] == ["aa", "bb"]


# v2


@pytest.mark.parametrize(
    ("shape", "data"), [([2], ["a", "b"]), ([2, 1], ["a", "b"]), ([2, 1], [["a"], ["b"]])]
)
def test_v2_answers_a_tensor_of_each_thing(shape, data):
    told = answer(v2({**BYTES, "shape": shape, "data": data}) | {"id": "q"})
    assert told == {
        "model_name": "echo",
        "model_version": "1.0",
        "outputs": [
            {"name": name, "shape": [2, 1], "datatype": "BYTES", "data": found}
            for name, found in (("translation", ["aa", "bb"]), ("finish_reason", ["length"] * 2))
        ],
        "id": "q",
    }


def test_v2_answers_all_that_is_asked_for():
    asked = {"beam_size": 3, "n_best": 2, "return_scores": True, "return_tokens": True,
             "return_alignments": True}
    native = answer({"text": ["a", "b"], "max_length": 2, **asked})["translations"]
    flat = [one for hypotheses in native for one in hypotheses]
    found = outputs(answer(v2(**asked)))
    assert {name: (one["datatype"], one["shape"]) for name, one in found.items()} == {
        "translation": ("BYTES", [2, 2]),
        "score": ("FP32", [2, 2]),
        "tokens": ("BYTES", [2, 2]),
        "alignment": ("BYTES", [2, 2]),
        "finish_reason": ("BYTES", [2, 2]),
    }
    assert found["translation"]["data"] == [one["text"] for one in flat]
    assert found["score"]["data"] == [one["score"] for one in flat]
    for name in ("tokens", "alignment"):  # JSON in strings
        assert [json.loads(one) for one in found[name]["data"]] == [one[name] for one in flat]


def test_v2_fills_what_a_beam_did_not_find_with_its_last():
    """Time is over before the beam has begun, so that it has one hypothesis of two."""
    told = answer(v2(beam_size=2, n_best=2, max_time=1e-9))
    found = outputs(told)
    count = found["translation"]["shape"][1]
    assert found["translation"] == {
        "name": "translation", "shape": [2, count], "datatype": "BYTES", "data": [""] * 2 * count
    }


def test_no_parameters_may_be_said_by_null():
    nothing = {"parameters": None}
    assert answer({"instances": ["a"], **nothing})["predictions"][0][0]["text"] == "a" * 19
    told = answer({"inputs": [BYTES | nothing], "outputs": None, **nothing})
    assert outputs(told)["translation"]["data"] == ["a" * 19, "b" * 19]
    assert "parameters" not in told


def test_v2_ignores_parameters_that_it_does_not_know_and_names_them():
    told = answer({
        "inputs": [BYTES | {"parameters": {"content_type": "str"}}],
        "parameters": {"max_length": 2, "priority": "bulk", "binary_data_output": False,
                       "a\ud800": 1},
        "outputs": [{"name": "translation", "parameters": {"binary_data": False}}],
    })  # fmt: skip
    assert told["outputs"] == [
        {"name": "translation", "shape": [2, 1], "datatype": "BYTES", "data": ["aa", "bb"]}
    ]
    assert told["parameters"] == {"ignored": (
        "binary_data_output, 'a\\ud800', inputs[0].content_type, outputs[0].binary_data"
    )}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [["score"], ["finish_reason", "translation"], ["tokens", "alignment", "tokens"], []],
)
def test_v2_answers_the_tensors_that_are_asked_for(names):
    """What an option would have told is told."""
    asked = {"return_scores": True, "return_tokens": True, "return_alignments": True}
    all_of_them = outputs(answer(v2(**asked)))
    told = outputs(answer(v2(return_scores=False) | {"outputs": [{"name": n} for n in names]}))
    expected = dict.fromkeys(names) if names else ("translation", "finish_reason")
    assert told == {name: all_of_them[name] for name in expected}


@pytest.mark.parametrize("name", ["", "q", "é😀", "x" * 256])
def test_the_id_of_v2_is_echoed(name):
    assert answer(v2() | {"id": name})["id"] == name
    assert "id" not in answer(v2())
    assert "id" not in answer(v2() | {"id": None})


@pytest.mark.parametrize("name", [5, ["q"], "x" * 257, True])
def test_an_id_that_is_none_is_refused(name):
    assert refused(v2() | {"id": name})["message"].startswith("id: got ")


def test_an_id_that_is_no_unicode_text_is_refused():
    """It could not be sent back."""
    told = refused(v2() | {"id": "a\ud800"})
    assert (told["code"], told["type"]) == (400, "InvalidOption")
    assert told["message"].startswith("id: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": None}, "inputs[0].shape: got null; allowed for 2 strings: [2] or [2, 1]"),
        ({"shape": [3]}, "inputs[0].shape: got a list of 1; allowed for 2 strings"),
        ({"shape": [1, 2]}, "inputs[0].shape: got a list of 2; allowed for 2 strings"),
        ({"shape": [2, 1, 1]}, "inputs[0].shape: got a list of 3"),
        ({"shape": 2}, "inputs[0].shape: got 2"),
        ({"shape": ["2"]}, "inputs[0].shape: got "),
        ({"datatype": "FP32"}, "inputs[0].datatype: got 'FP32'; allowed: 'BYTES'"),
        ({"datatype": None}, "inputs[0].datatype: got null"),
        ({"datatype": ["BYTES"]}, "inputs[0].datatype: got a list of 1"),
        ({"data": None}, "inputs[0].data: got null"),
        ({"data": []}, "inputs[0].data: got a list of 0"),
        ({"data": ["a", 5]}, "inputs[0].data[1]: got 5; allowed: a string"),
        ({"data": [["a"], "b"]}, "inputs[0].data[0]: got a list of 1; allowed: a string"),
        ({"data": [["a"], [["b"]]]}, "inputs[0].data[1]: got a list of 1; allowed: a string"),
        ({"data": [[], []]}, "inputs[0].data: got a list of 0"),
        ({"extra": 1}, "inputs[0].'extra': unknown; allowed: name, shape, datatype, parameters, "),
    ],
)
def test_mistakes_in_a_tensor_are_named(change, message):
    told = refused(v2({**BYTES, **change}))
    assert (told["code"], told["type"]) == (400, "InvalidOption")
    assert message in told["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (v2(BYTES, BYTES), "inputs: got a list of 2; allowed: a list of one tensor"),
        (v2("a"), "inputs: got a list of 1; allowed: a list of one tensor"),
        ({"inputs": []}, "inputs: got a list of 0"),
        ({"inputs": BYTES}, "inputs: got a mapping"),
        (v2() | {"extra": []}, "'extra': unknown; allowed: id, inputs, outputs, parameters"),
        (v2() | {"outputs": "score"}, "outputs: got 'score'; allowed: a list of tensors"),
        (v2() | {"outputs": ["score"]}, "outputs: got a list of 1; allowed: a list of tensors"),
        (v2() | {"outputs": [{}]}, "outputs[0].name: got null; allowed: translation, score"),
        (v2() | {"outputs": [{"name": "text"}]}, "outputs[0].name: got 'text'; allowed: transl"),
        (v2() | {"outputs": [{"name": ["score"]}]}, "outputs[0].name: got a list of 1"),
        (v2() | {"outputs": [{"name": "score", "x": 1}]}, "outputs[0].'x': unknown; allowed: name"),
        (v2() | {"outputs": [{"name": "score", "parameters": 1}]}, "outputs[0].parameters: got 1"),
        (v2({**BYTES, "parameters": [1]}), "inputs[0].parameters: got a list of 1; allowed: "),
        (v2() | {"parameters": "x"}, "parameters: got 'x'; allowed: a mapping of options"),
        (v2(stream=True), "stream: got true; allowed in this shape of request: false"),
        (v2(n_best=2), "n_best: got 2; allowed: at most beam_size, 1"),
    ],
)
def test_mistakes_in_v2_are_named(body, message):
    told = refused(body)
    assert (told["code"], told["type"]) == (400, "InvalidOption")
    assert message in told["message"]


@pytest.mark.parametrize("key", ["instances", "inputs[0].data"])
def test_what_is_allowed_in_a_list_of_texts_does_not_name_what_was_given(key):
    """A lone string is no list."""
    told = refused({"instances": "a"} if key == "instances" else v2({**BYTES, "data": "a"}))
    assert told["message"].startswith(f"{key}: got 'a'; allowed: ")
    assert "a string or" not in told["message"]


# Both


@pytest.mark.parametrize("body", [v1("a"), v2()])
def test_explanations_are_refused_in_the_shape_of_their_door(body):
    """`:explain` is a verb of KServe's v1."""
    (reply,) = service().round([Incoming("1", "", JSON, body, explain=True)])
    assert reply.status == 404
    assert list(json.loads(reply.body)) == ["error", "code", "type", "message"]


@pytest.mark.parametrize("shape", [lambda *texts: v1(*texts), lambda *texts: v2(
    {"shape": [len(texts)], "datatype": "BYTES", "data": list(texts)})], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", " "], (400, "EmptyText")),
        (["a", "\ud800"], (400, "InvalidText")),
        (["a", "abcdefab"], (413, "TextTooLong")),
        (["a"] * 1025, (413, "TooManyTexts")),
        (["a\n" * 4097], (413, "TooManySentences")),
    ],
)
def test_bad_texts_are_refused_in_the_shape_of_their_door(shape, texts, expected):
    told = refused(shape(*texts))
    assert (told["code"], told["type"]) == expected


def test_errors_after_admission_have_the_shape_of_their_door():
    one = service(max_response_bytes=1000, max_waiting=60)
    live = [sent(v1("gab"), 1), sent(v1(*["a"] * 40), 2), sent(v1(*["a"] * 60), 3)]
    got = answers(one, live)
    for key, status in (("1", 500), ("2", 413), ("3", 503)):
        assert got[key].status == status
        assert list(json.loads(got[key].body)) == ["error", "code", "type", "message"]
    assert got["3"].retry_after == 1
    assert left_nothing(one)


def test_all_doors_at_once_are_answered_in_their_own_shape():
    one = service()
    live = [
        ask("native", "a"), sent(v1("b"), "v1"), sent(v2() | {"id": "v2"}, "v2"),
        Incoming("text", "", "text/plain", "d\n"),
    ]
    got = {key: reply.body for key, reply in answers(one, live).items()}
    assert json.loads(got["native"])["translations"][0][0]["text"] == "aa"
    assert json.loads(got["v1"])["predictions"][0][0]["text"] == "bb"
    assert outputs(json.loads(got["v2"]))["translation"]["data"] == ["aa", "bb"]
    assert got["text"] == "d" * 19 + "\n"
    assert left_nothing(one)
