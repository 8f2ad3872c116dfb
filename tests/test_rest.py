"""The REST API end to end: a real TorchServe that has nothing but the archive."""

import dataclasses
import gzip
import hashlib
import io
import json
import random
import shutil
import socket
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psutil  # comes with torchserve
import pytest
import torch
from conftest import (
    INVISIBLE,
    INVISIBLE_IN_A_LINE,
    JSON,
    PREDICT,
    ROOT,
    TEXT,
    call,
    connected,
    options,
    raw,
    versions,
    workers,
)

from handler.decoding.model import load
from handler.request import RequestOptions
from handler.schema import schema
from handler.sentences import LINE_BREAK
from server.__main__ import main
from server.options import CONFIG
from server.torchserve import TorchServe
from training.archive import archive
from training.evaluate import best_model
from training.export import export, library
from training.lines import translations
from training.run import Run
from training.train import tokenizers
from training.translate import translate as translate_text

CPU = torch.device("cpu")


def offline(toy, lines, length=None, eager=False) -> list[str]:
    """What the offline engine says, of model.pt or of the network itself."""
    model = load(str(toy.run.model), CPU)
    if eager:
        model, _ = best_model(toy.recipe, toy.run)
    source, target = tokenizers(toy.run)
    asked = RequestOptions(max_length=length)
    return [
        told[0]["text"] for told in translations(model, source, target, lines, asked, CPU)
    ]


def spoken(count: int, seed: int = 7) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice("0123456789") for _ in range(draw.randint(1, 9))) for _ in range(count)
    ]


# Answers


def test_one_text_is_answered_in_the_shape_of_the_contract(server, toy):
    answer = call(server, body={"text": "123"}).json
    (expected,) = offline(toy, ["123"])
    (((translation,),), model, usage) = answer.values()
    assert list(answer) == ["translations", "model", "usage"]
    assert translation["text"] == expected
    assert translation["finish_reason"] in ("eos", "length")
    assert model == {"name": "seq2seq", "version": toy.recipe.export.version}
    assert sorted(usage) == ["source_tokens", "target_tokens"]


def test_served_is_offline_is_eager(server, toy):
    texts = [*spoken(150), "ä 12", "😀", "1" * 30, " 12  34 ", "1\n2\t3"]
    served = call(server, body={"text": texts}).texts
    assert served == offline(toy, texts)
    assert served == offline(toy, texts, eager=True)
    assert len(set(served)) > 10


def test_max_length_limits_each_text(server, toy):
    texts = spoken(20)
    for length in (1, 4, 10_000):
        reply = call(server, body={"text": texts, "max_length": length})
        assert reply.texts == offline(toy, texts, length)
    reply = call(server, body={"text": ["12345", "678"], "max_length": 1}).json
    assert [one[0]["finish_reason"] for one in reply["translations"]] == ["length"] * 2
    assert reply["usage"]["target_tokens"] == 2


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("headers", [TEXT, {}], ids=["text", "none"])
def test_text_is_translated_line_by_line(server, toy, method, headers):
    """`curl -T FILE` puts the file, and names no type."""
    lines = ["12", "", "345", "  ", "6"]
    reply = raw(server, "".join(f"{line}\n" for line in lines).encode(), headers, method)
    assert (reply.status, reply.content_type) == (200, "text/plain; charset=utf-8")
    expected = offline(toy, lines)
    assert expected[1] == expected[3] == ""
    assert reply.body.decode() == "".join(f"{line}\n" for line in expected)


def test_as_many_lines_come_as_go_whatever_does_not_show(server, toy):
    for lines in ([*INVISIBLE, *(f"1{c}2" for c in INVISIBLE_IN_A_LINE)], INVISIBLE, [" "]):
        reply = raw(server, "".join(f"{line}\n" for line in lines).encode(), TEXT)
        assert reply.status == 200
        expected = offline(toy, lines)
        assert reply.body.decode() == "".join(f"{line}\n" for line in expected)
        assert [i for i, line in enumerate(expected) if not line] == [
            i for i, line in enumerate(lines) if line in INVISIBLE
        ]


def test_lines_of_a_text_that_show_nothing_stay_in_their_places(server, toy):
    lines = [one for one in INVISIBLE if not LINE_BREAK.search(one)]
    text = "12\n" + "\n".join(lines) + "\n34"
    one, other = offline(toy, ["12", "34"])
    found = call(server, body={"text": text}).texts[0]
    assert found.split("\n") == [one, *[""] * len(lines), other]


@pytest.mark.parametrize(("pack", "coding"), [(gzip.compress, "gzip"), (zlib.compress, "deflate")])
@pytest.mark.parametrize(("headers", "body"), [(JSON, b'{"text": "12"}'), (TEXT, b"12\n34\n")])
def test_a_compressed_body_is_read_like_any_other(server, headers, body, pack, coding):
    packed = {**headers, "Content-Encoding": coding}
    assert raw(server, pack(body), packed) == raw(server, body, headers)
    assert raw(server, pack(bytes(10**7)), packed).error == (413, "BodyTooLarge")
    assert raw(server, body, {**headers, "Content-Encoding": "br"}).error[0] == 415


@pytest.mark.parametrize("name", ["content-type", "Content-Type", "CONTENT-TYPE"])
@pytest.mark.parametrize("value", ["application/json", "Application/JSON; charset=UTF-8"])
def test_headers_are_understood_in_any_case(server, name, value):
    assert raw(server, b'{"text": "12"}', {name: value}).status == 200


def test_each_of_many_clients_gets_its_own_answer(server, toy):
    """32 at once, of one text and of several, in every content type, with and without limits."""
    texts = spoken(32 * 6, seed=8)
    whole, limited = offline(toy, texts), offline(toy, texts, 3)

    def client(i: int) -> None:
        own = range(6 * i, 6 * i + 6)
        for k in own[:3]:
            assert call(server, body={"text": texts[k]}).texts == [whole[k]]
        many = [texts[k] for k in own]
        reply = call(server, body={"text": many, "max_length": 3})
        assert reply.texts == [limited[k] for k in own]
        bad = call(server, body={"text": many, "max_length": 0})
        assert bad.error == (400, "InvalidOption")
        plain = call(server, body="\n".join(many).encode(), headers=TEXT)
        assert plain.body.decode().splitlines() == [whole[k] for k in own]

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32)))


def test_the_card_is_that_of_the_run(server, toy):
    version = toy.recipe.export.version
    for method, path in (("GET", "card"), ("POST", "card")):
        reply = raw(server, None, {}, method, f"{PREDICT}/{version}/{path}")
        assert reply.status == 200
        card = reply.json
        serving = card.pop("serving")
        assert card == json.loads(load(str(toy.run.model), CPU).card)
        assert (serving["device"], serving["weights"], serving["rows"]) == ("cpu", "float32", 64)
        assert serving["splitter"] == "sentencex 0.6.1, en"
        assert card["scores"] == toy.run.read_json(toy.run.scores, "evaluate")


def test_the_schema_is_that_of_the_options(server, toy):
    for method in ("GET", "POST"):
        reply = raw(server, None, {}, method, f"{PREDICT}/{toy.recipe.export.version}/schema")
        assert reply.status == 200
        assert reply.json == schema(RequestOptions, 1024)


def test_a_paragraph_is_answered_sentence_by_sentence(server, toy):
    lines = ["271", "", "82\t81", "8"]
    text = "\n".join(lines)
    (answer,) = call(server, body={"text": text}).texts
    assert answer == "\n".join(offline(toy, lines))
    whole = call(server, body={"text": text, "split": False}).json
    assert "\n" not in whole["translations"][0][0]["text"]
    assert whole["usage"]["source_tokens"] == len(tokenizers(toy.run)[0].encode(text)) + 1


def test_a_sentence_that_is_too_long_is_cut_and_told(server, toy):
    long = " ".join(["271"] * 60) + ", " + " ".join(["82"] * 60)
    reply = call(server, body={"text": ["8", long]})
    assert reply.texts == offline(toy, ["8", long])
    assert reply.json["usage"]["cut_texts"] == [1]
    assert call(server, body={"text": long, "split": False}).error == (413, "TextTooLong")
    wrapped = call(server, body={"text": "27\n1\n\n8", "join_lines": True})
    assert wrapped.texts == ["\n\n".join(offline(toy, ["27 1", "8"]))]


def test_a_prefix_begins_the_first_sentence_of_each_text(server, toy):
    given = ["12\n34", "56"]
    free, led = (
        call(server, body={"text": given, "max_length": 9, **more}).texts
        for more in ({}, {"prefix": "997"})
    )
    assert [text.startswith("997") for text in free] == [False, False]
    assert [text.startswith("997") for text in led] == [True, True]
    assert led[0].splitlines()[1] == free[0].splitlines()[1]


def test_alignments_are_shares_of_the_source_for_each_target_token(server):
    asked = {"text": ["123\n45", "6"], "return_alignments": True, "coverage_penalty": 0.2,
             "beam_size": 3, "n_best": 2, "return_tokens": True}
    for hypotheses in call(server, body=asked).json["translations"]:
        for one in hypotheses:
            pieces = [piece for part in one["alignment"] for piece in part["target"]]
            assert pieces == one["tokens"]
            for part in one["alignment"]:
                assert part["source"][-1] == "</s>"
                assert len(part["weights"]) == len(part["target"])
                for row in part["weights"]:
                    assert len(row) == len(part["source"])
                    assert sum(row) == pytest.approx(1.0, abs=0.01)


def test_time_that_is_over_is_told_and_what_there_is_answered(server):
    late = {"max_time": 1e-6, "beam_size": 2, "length_penalty": 1.0}
    reply = call(server, body={"text": ["12", "345"], **late}).json
    assert [[one["finish_reason"] for one in found] for found in reply["translations"]] == [
        ["time"], ["time"],
    ]
    hour = call(server, body={"text": "12", "max_time": 3600}).json
    assert hour["translations"] == call(server, body={"text": "12"}).json["translations"]


def test_the_shapes_of_kserve_are_served_at_their_paths(server, toy):
    given = ["12", "345"]
    expected = offline(toy, given, 9)
    options = {"max_length": 9, "return_scores": True}
    asked = {"instances": ["12", {"text": "345"}], "parameters": options}
    reply = call(server, "/v1/models/seq2seq:predict", asked).json
    assert list(reply) == ["predictions"]
    assert [one[0]["text"] for one in reply["predictions"]] == expected
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": given}
    asked = {"id": "é-7", "inputs": [tensor], "parameters": options}
    reply = call(server, "/v2/models/seq2seq/infer", asked).json
    outputs = {one.pop("name"): one for one in reply.pop("outputs")}
    assert reply == {
        "model_name": "seq2seq", "model_version": toy.recipe.export.version, "id": "é-7"
    }
    assert outputs["translation"] == {"shape": [2, 1], "datatype": "BYTES", "data": expected}
    assert outputs["score"]["datatype"] == "FP32"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"]
)
def test_errors_of_kserve_have_its_shape(server, content_type):
    """TorchServe decodes a body for the handler only where its type is in lower case."""
    for body, named in (
        ({"instances": [5]}, "instances[0]"),
        ({"inputs": [{"shape": [2], "datatype": "BYTES", "data": ["12"]}]}, "inputs[0].shape"),
        ({"instances": ["12"], "parameters": {"stream": True}}, "stream"),
    ):
        reply = raw(server, json.dumps(body).encode(), {"Content-Type": content_type})
        assert reply.status == 400
        assert list(reply.json) == ["error", "code", "type", "message"]
        assert reply.json["error"] == reply.json["message"]
        assert reply.json["message"].startswith(named)


# Refusals

REFUSED = [
    ({"text": "12", "beam": 4}, JSON, (400, "InvalidOption"), "beam: unknown option"),
    ({"text": "12", "beam_size": 0}, JSON, (400, "InvalidOption"), "beam_size"),
    ({"text": "12", "max_length": "1"}, JSON, (400, "InvalidOption"), "max_length: got '1'"),
    ({"text": "12", "max_length": -(10**400)}, JSON, (400, "InvalidOption"), "max_length: got"),
    ({"text": 12}, JSON, (400, "InvalidOption"), "text: got 12; allowed: a string or a list"),
    ({"text": ["12", None]}, JSON, (400, "InvalidOption"), "text[1]: got null"),
    ({"text": []}, JSON, (400, "InvalidOption"), "text: got a list of 0"),
    ({"texts": "12"}, JSON, (400, "InvalidOption"), "text: missing"),
    ({"text": ""}, JSON, (400, "EmptyText"), "text: got ''"),
    ({"text": ["12", "   "]}, JSON, (400, "EmptyText"), "text[1]: got '   '"),
    ({"text": "\x01\x02\u200b"}, JSON, (400, "EmptyText"), "control characters"),
    (b'{"text": "1\\ud800"}', JSON, (400, "InvalidText"), "character 1 is the lone surrogate"),
    (["12"], JSON, (400, "InvalidRequest"), "got a list of 1; allowed: an object"),
    ("12", JSON, (400, "InvalidRequest"), "got '12'; allowed: an object"),
    (b"[" * 100_000 + b"]" * 100_000, JSON, (400, "InvalidJSON"), "nested too deeply"),
    (b'{"text": "12"', JSON, (400, "InvalidJSON"), "line 1 column 14"),
    (b'{"text": "\xff"}', JSON, (400, "InvalidJSON"), "byte 10"),
    (b'{"text": "12", "max_length": NaN}', JSON, (400, "InvalidOption"), "max_length: got nan"),
    (b"12\n\xe4\n", TEXT, (400, "InvalidText"), "byte 3 is 0xe4"),
    (b"<a/>", {"Content-Type": "application/xml"}, (400, "InvalidContentType"), "application/xml"),
    (
        b'{"text": "12"}',
        {"Content-Type": "application/x-www-form-urlencoded"},
        (400, "InvalidContentType"),
        "allowed: application/json or text/plain",
    ),
    (
        b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n12\r\n--x--\r\n',
        {"Content-Type": "multipart/form-data; boundary=x"},
        (400, "InvalidContentType"),
        "multipart/form-data",
    ),
    (None, JSON, (400, "InvalidRequest"), "no body"),
    (b"", TEXT, (400, "InvalidRequest"), "no body"),
    (None, {}, (400, "InvalidRequest"), "no body"),
    ({"text": ["12"] * 1025}, JSON, (413, "TooManyTexts"), "got 1025 texts; allowed: at most 1024"),
    ({"text": ["12", "01" * 3000]}, JSON, (413, "TextTooLong"), "text[1]: got a sentence of 6000"),
    (b"x" * 10_000, TEXT, (413, "TextTooLong"), "text: got a sentence of 10000 characters"),
]


@pytest.mark.parametrize(("body", "headers", "expected", "message"), REFUSED)
def test_bad_input_is_refused_with_its_reason(server, body, headers, expected, message):
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    reply = raw(server, body, headers)
    assert reply.error == expected
    assert message in reply.json["message"]


def test_all_bad_input_at_once_hurts_no_good_request(server, toy):
    texts = spoken(len(REFUSED), seed=9)
    expected = offline(toy, texts)

    def client(i: int) -> None:
        body, headers, refused, _ = REFUSED[i]
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        assert raw(server, body, headers).error == refused
        assert call(server, body={"text": texts[i]}).texts == [expected[i]]

    before = set(server._log.lines)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(len(REFUSED))))
    news = [line for line in server._log.lines if line not in before]
    assert not [line for line in news if "Traceback" in line or "Error" in line]


@pytest.mark.parametrize(
    "text",
    [
        "😀👩‍👩‍👧‍👦",
        "\u200b\ufeff",
        "\0",
        "\x01\x1f\x7f\x80",
        "\U0010ffff",
        "e\u0301" * 5,
        "\u202e12",
        "1" * 60,
        "▁",
        "</s><pad><unk>",
        "\r",
        "\u2028",
    ],
)
def test_any_unicode_is_translated_or_refused(server, text):
    reply = call(server, body={"text": text})
    if reply.status != 200:
        assert reply.error == (400, "EmptyText") or reply.error == (413, "TextTooLong")
    else:
        assert len(reply.texts) == 1


def test_requests_with_different_options_share_the_server(server):
    """Greedy, beams and sampling at once; each answer is what it is alone."""
    bodies = [
        {"text": "271828", "beam_size": 4, "n_best": 3, "length_penalty": 1.0},
        {"text": ["3141", "999"]},
        {"text": "161803", "sampling": True, "seed": 5, "temperature": 2.0, "max_length": 9},
        {"text": "27182", "beam_size": 2, "return_scores": True, "return_tokens": True},
    ]

    def answer(body):
        return json.loads(call(server, body=json.dumps(body).encode(), headers=JSON).body)

    alone = [answer(body)["translations"] for body in bodies]
    assert [len(one) for one in alone[0]] == [3]
    assert alone[0][0][0]["text"] == "828172"
    assert alone[3][0][0]["score"] <= 0
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answer, bodies * 8))
    for i, one in enumerate(together):
        for mine, expected in zip(one["translations"], alone[i % 4]):
            assert [each["text"] for each in mine] == [each["text"] for each in expected]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam_size": 65}, "beam_size"),
        ({"beam_size": 2.0}, "beam_size"),
        ({"n_best": 2}, "n_best"),
        ({"min_length": 9, "max_length": 3}, "min_length"),
        ({"min_length": 1000}, "min_length"),
        ({"sampling": True, "beam_size": 2}, "sampling"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 3}, "seed"),
        ({"length_penalty_form": "other"}, "length_penalty_form"),
        ({"n_best": 3, "beam_size": 2}, "n_best"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 5}, "top_k"),
        ({"prefix": "1234", "max_length": 3}, "prefix"),
        ({"prefix": "1" * 65}, "prefix"),
        ({"prefix": "1" * 4097}, "prefix"),
        ({"prefix": "\ud800"}, "prefix"),
        ({"prefix": ["1"]}, "prefix"),
        ({"max_time": 0}, "max_time"),
        ({"max_time": 3601}, "max_time"),
        ({"coverage_penalty": -0.1}, "coverage_penalty"),
        ({"split": 1}, "split"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "beam_size": 65}, "beam_size"),
    ],
)
def test_options_out_of_range_or_contradictory_are_refused(server, options, named):
    reply = call(server, body=json.dumps({"text": "12", **options}).encode(), headers=JSON)
    assert reply.error == (400, "InvalidOption")
    assert reply.json["message"].startswith(f"{named}: ")


def test_what_is_larger_than_any_request_is_refused_by_the_front(server):
    largest = next(
        int(line.split("=")[1])
        for line in CONFIG.read_text().splitlines()
        if line.startswith("max_request_size=")
    )
    # Answered at the announced length: a client that went on sending might see a reset instead.
    for announced in (largest + 1, 10_000_000):
        with closing(connected(server.url)) as client:
            client.putrequest("POST", PREDICT)
            for name, value in (*TEXT.items(), ("Content-Length", str(announced))):
                client.putheader(name, value)
            client.endheaders()
            reply = client.getresponse()
            kind = json.loads(reply.read())["type"]
            assert (reply.status, kind) == (413, "RequestTooLarge")
    assert call(server, body=b"1" * (largest - 1000), headers=TEXT).error == (413, "TextTooLong")


@pytest.mark.parametrize(
    "path",
    [
        "/predictions/other",
        "/predictions/seq2seq/9.9",
        "/predictions/seq2seq/{version}/cards",
        "/predictions/seq2seq/{version}/card/more",
        "/other",
    ],
)
def test_what_is_not_there_is_not_found(server, toy, path):
    path = path.format(version=toy.recipe.export.version)
    status, _ = call(server, path, {"text": "12"}).error
    assert status == 404


@pytest.mark.parametrize("path", ["/v1/models/seq2seq:explain", "/explanations/seq2seq"])
def test_explanations_are_not_offered(server, path):
    assert call(server, path, {"text": "12"}).error == (404, "NotFound")
    assert call(server, path, {"instances": ["12"]}).status == 404


@pytest.mark.parametrize(
    "path",
    ["/models", "/models/seq2seq", "/models/seq2seq?customized=true", "/models/seq2seq/all"],
)
def test_clients_reach_no_management(server, path):
    """A customized description would never return, and keep the worker from everybody."""
    for body in (None, {}):
        assert call(server, path, body).status in (404, 405)


def test_headers_of_any_bytes_are_harmless(server):
    headers = {**JSON, "X-Name": b"\xe9\xff".decode("latin-1"), "url_Path": ""}
    assert raw(server, b'{"text": "12"}', headers).status == 200


def test_nothing_of_the_repository_is_near_the_worker(server):
    (pid,) = workers(server)
    worker = psutil.Process(pid)
    places = [worker.cwd(), *worker.environ().get("PYTHONPATH", "").split(":")]
    assert not [place for place in places if place == str(ROOT) or f"{ROOT}/" in f"{place}/"]


# Archives


def test_two_versions_are_served_side_by_side(toy, tmp_path):
    store, shorter = tmp_path / "store", 8
    second = dataclasses.replace(
        toy.recipe,
        export=dataclasses.replace(toy.recipe.export, version="2.0", max_source_length=shorter),
    )
    run = Run(shutil.copytree(toy.run.root, tmp_path / "run"))
    export(second, run)
    other = archive(second, run, tmp_path / "other")
    store.mkdir()
    shutil.copy(toy.store / "seq2seq.mar", store)
    shutil.copy(other, store / "seq2seq-2.0.mar")
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    (store / "seq2seq-2.0.mar.sha256").write_text(f"{digest}  seq2seq-2.0.mar\n")
    first = toy.recipe.export.version
    assert first != "2.0"
    with TorchServe(options(store, "seq2seq=seq2seq.mar", "seq2seq=seq2seq-2.0.mar")) as server:
        assert {one["modelVersion"]: len(one["workers"]) for one in versions(server)} == {
            first: 1, "2.0": 1,
        }
        texts = [text for text in spoken(8, seed=11) if len(text) < shorter - 1]
        for path, version in (("", first), (f"/{first}", first), ("/2.0", "2.0")):
            reply = call(server, PREDICT + path, {"text": texts, "max_length": 5})
            assert reply.texts == offline(toy, texts, 5)
            assert reply.json["model"] == {"name": "seq2seq", "version": version}
        long = {"text": "1" * shorter}
        assert call(server, f"{PREDICT}/{first}", long).status == 200
        assert call(server, f"{PREDICT}/2.0", long).error == (413, "TextTooLong")
        for version in (first, "2.0"):
            assert call(server, f"{PREDICT}/{version}/card").json["version"] == version


def test_int8_weights_are_served_like_any_other(toy, native_library, tmp_path):
    """Streams, beams and options that need all logits, at once: what the same archive gives
    offline."""
    recipe = dataclasses.replace(
        toy.recipe, export=dataclasses.replace(toy.recipe.export, weights="int8")
    )
    run = Run(shutil.copytree(toy.run.root, tmp_path / "run"))
    export(recipe, run)
    assert run.model.stat().st_size < 0.6 * toy.run.model.stat().st_size  # code and card included
    built = archive(recipe, run, tmp_path / "store")
    with zipfile.ZipFile(built) as content:
        held = [name for name in content.namelist() if name.endswith(".so")]
        assert held == ([library(run).name] if native_library else [])
    texts = spoken(12, seed=5)
    out = io.StringIO()
    translate_text(recipe, run, io.BytesIO("\n".join(texts).encode()), out)
    with TorchServe(options(tmp_path / "store")) as server:
        assert call(server, PREDICT, {"text": texts}).texts == out.getvalue().splitlines()
        assert call(server, f"{PREDICT}/{toy.recipe.export.version}/card").json["weights"] == "int8"
        for asked in ({"beam_size": 4}, {"repetition_penalty": 1.2}, {"min_length": 3}):
            alone = [call(server, PREDICT, {"text": one, **asked}).texts[0] for one in texts]
            assert call(server, PREDICT, {"text": texts, **asked}).texts == alone


# The command line


@pytest.fixture
def translate(server, monkeypatch, capsys):
    def run(*texts: str, lines: bytes = b"", url: str = server.url) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
        capsys.readouterr()
        status = main(["translate", "--url", url, *texts])
        return status, *capsys.readouterr()

    return run


def test_the_command_line_translates_its_arguments(translate, toy):
    texts = ["12", "", "345"]
    assert translate(*texts) == (0, "".join(f"{t}\n" for t in offline(toy, texts)), "")


def test_the_command_line_translates_lines_and_keeps_blank_ones(translate, toy):
    texts = ["", "12", "", *spoken(100), *[""] * 100, "é 7", " "]
    expected = "".join(f"{text}\n" for text in offline(toy, texts))
    assert translate(lines="\n".join(texts).encode()) == (0, expected, "")
    assert translate(lines=b"") == (0, "", "")
    assert translate(lines=b"\n\n") == (0, "\n\n", "")


def test_the_command_line_says_in_one_line_what_is_wrong(translate):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for given, said in (
        ({"url": f"http://127.0.0.1:{port}", "lines": b"12"}, "cannot be reached"),
        ({"lines": "12".encode("utf-16")}, "standard input is UTF-16: convert it first"),
    ):
        status, out, err = translate(**given)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert said in err
        assert err.count("\n") == 1


def test_a_line_that_cannot_be_translated_costs_itself_alone(translate, toy):
    """Of a thousand; and a large file, whose lines fill few requests by their number."""
    texts = spoken(300)
    given = [text.encode() for text in texts]
    bad = {50: b"1" * 2000, 200: b"12\xff3", 250: b"1" * 300_000}
    for i, line in bad.items():
        given[i], texts[i] = line, ""
    for i in (70, 71):
        given[i], texts[i] = "\u200b".encode(), ""
    for i in range(120, 184):  # 64 lines of 5 kB, more than one request may have
        texts[i] += " " * 5000 + "7"
        given[i] = texts[i].encode()
    status, out, err = translate(lines=b"\n".join(given))
    assert status == 1
    assert out.split("\n") == [*offline(toy, texts), ""]
    told = err.splitlines()
    assert told[0].startswith("line 51: 413 TextTooLong: text: got a sentence of 2000 characters")
    assert told[1].startswith("line 201: byte 0xff at offset 2 of the line is not UTF-8")
    assert told[2] == "line 251: 300001 bytes; allowed: at most 262144"
    assert told[3].startswith("error: 3 of 300 lines could not be translated: an empty line is in")
    assert len(told) == 4


def test_lines_that_show_nothing_stay_blank_by_pipe(translate, toy):
    lines = [*INVISIBLE, *(f"1{c}2" for c in INVISIBLE_IN_A_LINE)]
    expected = "".join(f"{line}\n" for line in offline(toy, lines))
    assert translate(lines="\n".join(lines).encode()) == (0, expected, "")
