"""The module that TorchServe loads, in TorchServe's own hands: its context, its loader's rules."""

import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from handler import seq2seq_handler
from handler.authorization import ANYBODY, VARIABLE
from handler.decoding.failures import is_lost
from handler.fields import FieldError
from handler.integrity import DIGESTS, IntegrityError, write_digests
from handler.logs import Levelled
from handler.seq2seq_handler import Seq2SeqHandler
from handler.service_options import ServiceOptions
from training.recipe import TokenizerOptions
from training.tokenizer import learn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it reads its version and closes no file
    from ts.context import Context, RequestProcessor

MANIFEST = "MAR-INF/MANIFEST.json"
ONE_THREAD = {"threads": 1}


@pytest.fixture(scope="module")
def unpacked(toy, tmp_path_factory) -> Path:
    """The archive as TorchServe unpacks it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(toy.store / "seq2seq.mar") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def copy(unpacked, tmp_path) -> Path:
    return Path(shutil.copytree(unpacked, tmp_path / "model"))


@pytest.fixture(autouse=True)
def process_as_it_was():
    """What the handler sets for its whole process is taken back."""
    loggers = [logging.getLogger(), logging.getLogger("ts.metrics.caching_metric")]
    threads, filters = torch.get_num_threads(), [list(one.filters) for one in loggers]
    yield
    torch.set_num_threads(threads)
    for one, kept in zip(loggers, filters):
        one.filters[:] = kept


class Recorder:
    """TorchServe's cache of metrics; what was told is in `told`."""

    def __init__(self):
        self.told = []

    def add_metric_to_cache(self, name, unit, dimensions, kind):
        recorder = self

        class Metric:
            def add_or_update(self, value, values):
                recorder.told.append((name, kind.value, dict(zip(dimensions, values)), value))

        return Metric()


def context(folder, handler=ONE_THREAD, gpu=None) -> Context:
    manifest = json.loads((folder / MANIFEST).read_text())
    config = {"minWorkers": 1, "handler": handler}
    ctx = Context("seq2seq", str(folder), manifest, 80, gpu, "0.12.0", model_yaml_config=config)
    ctx.metrics = Recorder()
    return ctx


def initialized(folder, **more) -> Seq2SeqHandler:
    one = Seq2SeqHandler()
    one.initialize(context(folder, **more))
    return one


def unhurried(one: Seq2SeqHandler) -> Seq2SeqHandler:
    """However slow the machine is, each request is let in and answered within one call."""
    one.service.arrivals.clock = one.service.answers.clock = lambda: 0.0
    return one


def calls(one, ctx, requests, most=200) -> dict[str, tuple]:
    """Call `handle` as TorchServe does; status, content type and body of each request.

    requests: (id, headers, data) each.
    """
    live, got = list(requests), {}
    for _ in range(most):
        if not live:
            return got
        ctx.request_ids = {i: each[0] for i, each in enumerate(live)}
        ctx.request_processor = [RequestProcessor(dict(each[1])) for each in live]
        ctx.stopping_criteria = None
        bodies = one.handle([each[2] for each in live], ctx)
        assert len(bodies) == len(ctx.stopping_criteria) == len(live)
        # None, of each, is TorchServe's sign for a whole reply.
        assert [ends(None) for ends in ctx.stopping_criteria] == [None] * len(live)
        for i, each in enumerate(live):
            if i in ctx.request_ids:
                status, _ = ctx.get_response_status(i)
                got[each[0]] = (status, ctx.get_response_content_type(i), bodies[i])
            else:
                assert bodies[i] == ""
        live = [each for each in live if each[0] not in got]
    raise AssertionError(f"no reply to {live}")


def test_headers_are_read_whatever_their_case(unpacked):
    ctx = context(unpacked)
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    body = {"body": b'{"text": "12"}'}
    requests = [
        *((name, {name: "application/json"}, body)
          for name in ("content-type", "Content-Type", "CONTENT-TYPE")),
        ("text", {"Content-type": "text/plain"}, {"body": b"12"}),
        # TorchServe names the parameters of a form beside the headers.
        ("form", {"text": {"content-type": "a/b"}, "Content-Type": "a/b"}, {"text": "12"}),
        ("data", {"content-type": "text/plain"}, {"data": "12"}),
        ("card", {"Url_Path": "card"}, {}),
        ("path", {"url_path": "other"}, {}),
        ("nothing", {}, {}),
    ]
    got = calls(one, ctx, requests)
    assert {key: reply[0] for key, reply in got.items()} == {
        **dict.fromkeys(("content-type", "Content-Type", "CONTENT-TYPE", "text"), 200),
        **{"form": 400, "data": 200, "card": 200, "path": 404, "nothing": 400},
    }
    json_reply, text_reply = got["content-type"], got["text"]
    assert json_reply[1] == "application/json"
    assert json_reply == got["Content-Type"] == got["CONTENT-TYPE"]
    (translation,) = json.loads(json_reply[2])["translations"]
    assert text_reply[1:] == ("text/plain; charset=utf-8", translation[0]["text"] + "\n")
    assert got["data"] == text_reply
    assert got["card"][1] == "application/json"
    assert "version" in json.loads(got["card"][2])


def test_a_request_that_is_not_finished_is_left_out_of_the_reply(unpacked):
    ctx = context(unpacked, {**ONE_THREAD, "round_ms": 0.0})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    ctx.request_ids = {0: "long", 1: "bad"}
    ctx.request_processor = [RequestProcessor({"content-type": "text/plain"}) for _ in range(2)]
    assert one.handle([{"body": "12345"}, {"body": b"\xff"}], ctx)[0] == ""
    assert ctx.request_ids == {1: "bad"}
    assert ctx.get_response_status(1)[0] == 400
    assert ctx.get_response_status(0)[0] == 200
    ctx.request_ids, ctx.request_processor = {}, []
    assert one.handle([], ctx) == []
    assert one.service.engine.idle


def rounds(one, ctx, requests) -> list[tuple[str, bool | None] | None]:
    """One call of `handle`: body of each request, and whether its stream has ended; None where
    nothing is told."""
    ctx.request_ids = {i: each[0] for i, each in enumerate(requests)}
    ctx.request_processor = [RequestProcessor(dict(each[1])) for each in requests]
    bodies = one.handle([each[2] for each in requests], ctx)
    return [
        (bodies[i], ctx.stopping_criteria[i](None)) if i in ctx.request_ids else None
        for i in range(len(requests))
    ]


def test_a_stream_goes_out_part_by_part_and_its_last_part_ends_it(unpacked):
    ctx = context(unpacked, {**ONE_THREAD, "round_ms": 0.0})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    headers = {"content-type": "application/json"}
    plain = ("plain", headers, {"body": {"text": "1234567"}})
    stream = ("stream", headers, {"body": {"text": "1234567", "stream": True}})
    whole, parts = None, []
    for _ in range(99):
        told = rounds(one, ctx, [each for each in (plain, stream) if each is not None])
        if told[-1] is not None:
            assert ctx.get_response_content_type(len(told) - 1) == "text/event-stream"
            parts.append(told[-1])
            # TorchServe repeats no body of a request that has been sent something.
            stream = ("stream", headers, {})
        if plain and told[0] is not None:
            whole, plain = told[0], None
        if parts[-1][1]:
            break
    assert [ended for _, ended in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 2
    assert whole[1] is None
    translations = json.loads(whole[0])["translations"]
    lines = "".join(body for body, _ in parts).split("\n")
    *news, answer = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
    assert answer["translations"] == translations
    assert "".join(each["text"] for each in news) == translations[0][0]["text"]
    assert one.service.engine.idle


def test_a_stream_whose_first_part_is_its_last_is_a_plain_reply(unpacked):
    ctx = context(unpacked, {**ONE_THREAD, "round_ms": 1000.0})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    asked = {"body": {"text": "12", "stream": True, "max_length": 2}}
    ((body, ended),) = rounds(one, ctx, [("1", {"content-type": "application/json"}, asked)])
    assert ended is None
    assert "event: answer" in body
    assert ctx.get_response_content_type(0) == "text/event-stream"


def test_a_compressed_body_is_expanded_within_the_limit(unpacked):
    ctx = context(unpacked, {**ONE_THREAD, "max_request_bytes": 100})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)

    def packed(name, body, coding="gzip"):
        return name, {"content-type": "text/plain", "Content-Encoding": coding}, {"body": body}

    plain = ("plain", {"content-type": "text/plain"}, {"body": "12"})
    bodies = {
        "gzip": gzip.compress(b"12"), "bomb": gzip.compress(b"1\n" * 10**6), "wrong": b"12",
    }
    requests = [plain, *(packed(*each) for each in bodies.items()), packed("other", b"12", "br")]
    got = calls(one, ctx, requests)
    assert got["gzip"] == got["plain"]
    kinds = {name: (got[name][0], json.loads(got[name][2])["type"]) for name in got.keys() - {
        "gzip", "plain"}}
    assert kinds == {
        "bomb": (413, "BodyTooLarge"), "wrong": (400, "InvalidEncoding"),
        "other": (415, "UnsupportedEncoding"),
    }
    other = [packed("another", b"12", "br"), plain]
    rounds(one, ctx, other)
    assert ctx.get_response_headers(0)["Accept-Encoding"] == "gzip, deflate"
    assert "Accept-Encoding" not in ctx.get_response_headers(1)


def test_when_too_many_wait_the_client_is_told_when_to_come_again(unpacked):
    ctx = context(unpacked, {**ONE_THREAD, "max_waiting": 1})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    headers = {"content-type": "text/plain"}
    few, many = ((str(i), headers, {"body": "1\n" * i}) for i in (1, 2))
    told = rounds(one, ctx, [many, few])
    assert json.loads(told[0][0])["type"] == "Overloaded"
    assert ctx.get_response_status(0)[0] == 503
    assert ctx.get_response_headers(0)["Retry-After"] == "1"
    assert ctx.get_response_status(1)[0] == 200
    assert "Retry-After" not in ctx.get_response_headers(1)


class Odd(Context):
    """TorchServe's context, in which one thing fails for one request. `fails`: a method's name."""

    fails = ""

    def failing(self, name, idx):
        if self.fails == name and self.request_ids.get(idx) == "bad":
            raise KeyError("secret")

    def get_request_id(self, idx=0):
        self.failing("get_request_id", idx)
        return super().get_request_id(idx)

    def set_response_status(self, code=200, phrase="", idx=0):
        self.failing("set_response_status", idx)
        super().set_response_status(code, phrase, idx)

    def set_response_content_type(self, idx, value):
        self.failing("set_response_content_type", idx)
        super().set_response_content_type(idx, value)

    def set_response_header(self, idx, key, value):
        self.failing("set_response_header", idx)
        super().set_response_header(idx, key, value)


class OddProperties(RequestProcessor):
    def get_request_properties(self):
        raise KeyError("secret")


class OddTokens:
    """What cannot look at its folder, when "bad" asks."""

    def admit(self, values):
        if values == ["bad"]:
            raise OSError("secret")
        return ANYBODY


class OddBody(dict):
    def get(self, *given):
        raise KeyError("secret")


@pytest.mark.parametrize(
    "fails",
    ["properties", "tokens", "body", "get_request_id", "set_response_status",
     "set_response_content_type", "set_response_header"],
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
def test_what_fails_of_a_request_in_torchserve_s_hands_fails_it_alone(
    unpacked, fails, streams, caplog
):
    ctx = context(unpacked, {**ONE_THREAD, "round_ms": 0.0})
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    ctx.__class__, ctx.fails = Odd, fails
    if fails == "tokens":
        one.tokens = OddTokens()
    headers = {"content-type": "application/json", "authorization": "good"}
    body = {"text": ["12", "34"] * 30, "stream": streams}
    if fails == "set_response_header":
        body, one.service.options = {"text": "1\n2"}, ServiceOptions(max_waiting=1)
    live = {
        "good": RequestProcessor(dict(headers)), "bad": RequestProcessor(dict(headers)),
        "other": RequestProcessor(dict(headers)),
    }
    live["bad"]._request_header["authorization"] = "bad"
    if fails == "properties":
        live["bad"] = OddProperties({})
    told: dict[str, list[str]] = {name: [] for name in live}
    status = {}
    for _ in range(500):
        names = list(live)
        ctx.request_ids = dict(enumerate(names))
        ctx.request_processor = list(live.values())
        sent = {"text": "12"} if fails == "set_response_header" else body
        data = [{"body": body if name == "bad" else sent} for name in names]
        if fails == "body" and "bad" in live:
            data[names.index("bad")] = OddBody()
        bodies = one.handle(data, ctx)
        for i, name in enumerate(names):
            if i in ctx.request_ids:
                told[name].append(bodies[i])
                status[name] = ctx.get_response_status(i)[0]
                if ctx.stopping_criteria[i](None) is not False:
                    del live[name]
        if not live:
            break
    assert not live
    for name in ("good", "other"):
        assert status[name] == 200
        last = told[name][-1].split("data: ")[-1]
        assert json.loads(last)["translations"]
    if streams and fails in ("set_response_status", "set_response_content_type"):
        assert '"translations"' in told["bad"][-1]  # 200 is TorchServe's own
    elif fails == "set_response_header":
        assert json.loads(told["bad"][-1])["code"] == 500
    else:
        assert json.loads(told["bad"][-1])["type"] == "InternalError"
        assert status["bad"] == (200 if fails == "set_response_status" else 500)
    assert "secret" in caplog.text
    assert not any("secret" in each for each in told["bad"])
    ctx.request_ids, ctx.request_processor = {}, []
    assert one.handle([], ctx) == []
    assert one.service.engine.idle
    assert not one.service.known


def test_the_client_of_a_token_reaches_the_service(unpacked, tmp_path, monkeypatch):
    (tmp_path / "first").write_text("0123456789abcdef\nshare: 2\nmost_waiting: 1\n")
    (tmp_path / "second").write_text("fedcba9876543210")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    ctx = context(unpacked)
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    got = calls(one, ctx, [
        (name, {"content-type": "text/plain", "authorization": f"Bearer {token}"}, {"body": "1\n2"})
        for name, token in (("x", "0123456789abcdef"), ("y", "fedcba9876543210"), ("z", "0" * 16))
    ])
    assert {name: reply[0] for name, reply in got.items()} == {"x": 429, "y": 200, "z": 401}
    assert json.loads(got["x"][2])["type"] == "TooManyWaiting"


@pytest.mark.parametrize(("weights", "device", "kernels", "told", "advice"), [
    (None, "cpu", "avx2", "float32", ""),
    ("float16", "cuda", "", "float16", ""),
    ("int8", "cpu", "avx2", "int8 (avx2)", ""),
    ("int8", "cpu", "", "int8 (plain)", r"export for this machine, .*\.so that works$"),
    ("int8", "cuda", "avx2", "int8 (plain)", "for a GPU export with float32 weights$"),
])
def test_int8_weights_without_their_operators_are_warned_of(
    weights, device, kernels, told, advice, monkeypatch, caplog
):
    monkeypatch.setattr("handler.decoding.native.enabled", lambda: kernels)
    card = json.dumps({"weights": "int8" if weights == "int8" else "float32"})
    dtype = getattr(torch, told, torch.float32)
    assert seq2seq_handler.number_format(card, dtype, torch.device(device)) == told
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == bool(advice)
    assert all(re.search(advice, one) for one in warned)


@pytest.mark.parametrize("name", ["explain", "Explain"])
def test_explanations_are_refused_by_the_header_that_asks_for_them(unpacked, name):
    ctx = context(unpacked)
    one = Seq2SeqHandler()
    one.initialize(ctx)
    unhurried(one)
    body, headers = {"body": {"text": "12"}}, {"content-type": "application/json"}
    got = calls(one, ctx, [
        ("asks", {**headers, name: "True"}, body), ("does not", {**headers, name: "False"}, body),
    ])
    assert {key: reply[0] for key, reply in got.items()} == {"asks": 404, "does not": 200}
    assert json.loads(got["asks"][2])["type"] == "NotFound"


def test_the_archive_as_it_was_built_is_served_with_its_name_and_version(unpacked):
    one = initialized(unpacked)
    described = json.loads((unpacked / MANIFEST).read_text())["model"]
    assert one.service.narrator.model == {
        "name": described["modelName"], "version": described["modelVersion"]
    }
    assert one.service.engine.device == torch.device("cpu")
    assert torch.get_num_threads() == 1


def test_the_splitter_is_the_archive_s_own(unpacked, tmp_path):
    ask = "from handler.extras import package; print(package('sentencex').__file__)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
    )
    assert Path(done.stdout.strip()).is_relative_to(unpacked)


def test_an_archive_without_the_splitter_says_so_and_is_served(copy, monkeypatch, caplog):
    for one in copy.glob("sentencex*"):
        shutil.rmtree(one)
    write_digests(copy)
    monkeypatch.setitem(sys.modules, "sentencex", None)
    one = initialized(copy)
    assert "texts of several sentences are refused unless split is false" in caplog.text
    assert "needs sentencex" in caplog.text
    assert one.service.admission.splitter.name is None


def test_any_changed_byte_is_refused_by_the_name_of_its_file(copy):
    names = [p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()]
    assert {"model.pt", "source.model", "target.model", "seq2serve.py"} <= set(names)
    assert {"model-config.yaml", "handler/service.py", "handler/decoding/engine.py"} <= set(names)
    for name in set(names) - {MANIFEST, DIGESTS}:
        path = copy / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        for changed in (
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            whole + b"\0",
            whole[:-1],
        ):
            path.write_bytes(changed)
            with pytest.raises(IntegrityError, match=f"^{name} in the archive is not the file"):
                initialized(copy)
        path.unlink()
        with pytest.raises(IntegrityError, match=f"^{name} is missing from the archive"):
            initialized(copy)
        path.write_bytes(whole)
    initialized(copy)


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"{", b"[]", b'{"model.pt": 5}'])
def test_without_a_record_of_digests_nothing_is_served(copy, content):
    (copy / DIGESTS).unlink()
    if content is not None:
        (copy / DIGESTS).write_bytes(content)
    with pytest.raises(IntegrityError, match="build the archive again"):
        initialized(copy)


def test_a_model_of_another_format_is_refused(copy):
    model = torch.jit.load(copy / "model.pt")
    model.format_version = 99
    model.save(str(copy / "model.pt"))
    write_digests(copy)
    with pytest.raises(ValueError, match=r"model\.pt: format version 99; this code reads"):
        initialized(copy)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(copy, side):
    content = learn(TokenizerOptions(), 266, ["0 1 2 3 4"] * 3, "source_vocabulary")
    (copy / f"{side}.model").write_bytes(content)
    write_digests(copy)
    with pytest.raises(ValueError, match=r"source\.model and target\.model have .*266"):
        initialized(copy)


@pytest.mark.parametrize("gpu", [None, -1, 0, "0"])
def test_a_gpu_that_is_required_and_missing_is_an_error(unpacked, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    expected = f"require_gpu or .* is true, .* gpu_id {gpu} and .* 0 GPUs"
    with pytest.raises(RuntimeError, match=expected):
        initialized(unpacked, handler={"require_gpu": True}, gpu=gpu)
    with monkeypatch.context() as cluster:
        cluster.setenv("SEQ2SERVE_REQUIRE_GPU", "true")
        with pytest.raises(RuntimeError, match="SEQ2SERVE_REQUIRE_GPU is true"):
            initialized(unpacked, gpu=gpu)
    one = initialized(unpacked, gpu=gpu)
    assert one.service.engine.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ({"rows": 0}, "handler.rows: got 0; allowed: an integer from 1 to 65536"),
        ({"rows": "64"}, "handler.rows: got '64'; allowed"),
        ({"beams": 5}, "handler.beams: got 5; allowed: a list, each of it an integer from 1 to 64"),
        ({"beams": [1, 65]}, "handler.beams[1]: got 65; allowed: an integer from 1 to 64"),
        ({"row": 64}, "handler.row: unknown option; did you mean 'rows'?"),
        ({"round_ms": -1}, "handler.round_ms: got -1; allowed: a number from 0.0 to 1000.0"),
        ({"threads": 0}, "handler.threads: got 0; allowed: an integer of at least 1 or null"),
        ({"require_gpu": "yes"}, "handler.require_gpu: got 'yes'; allowed: true or false"),
        (["rows"], "handler: got a list of 1; allowed: a mapping of options"),
        (64, "handler: got 64; allowed: a mapping of options"),
    ],
)
def test_a_wrong_option_of_the_yaml_is_named(unpacked, handler, message):
    with pytest.raises(FieldError) as error:
        initialized(unpacked, handler=handler)
    assert str(error.value).startswith(message)


def test_options_may_be_left_out(unpacked):
    one = initialized(unpacked, handler=None)
    assert (one.service.options.rows, one.service.engine.capacity) == (None, 64)


def test_no_client_can_fill_the_log(unpacked, caplog):
    initialized(unpacked)
    with caplog.at_level(logging.INFO):
        logging.info("Backend received inference at: %d", 5)
        for what in ("json", "utf-8"):
            logging.warning("Failed %s decoding", what)  # as another message would be
            logging.warning(f"Failed {what} decoding of input data. Forwarding encoded payload")
        logging.warning("something else")
    assert caplog.messages == ["Failed json decoding", "Failed utf-8 decoding", "something else"]


@pytest.mark.parametrize(("batch", "rows", "warned"), [(80, 64, 0), (64, 64, 0), (80, 1024, 1)])
def test_rows_that_torchserve_cannot_fill_are_told_with_what_to_set(caplog, batch, rows, warned):
    seq2seq_handler.warn_of_few_requests(batch, rows)
    assert len(caplog.records) == warned
    for record in caplog.records:
        assert record.getMessage().startswith(
            "TorchServe sends 80 requests at once, which do not fill 1024 rows"
        )
        assert "model-config.yaml to 1040" in record.getMessage()


def test_each_line_tells_its_level_but_what_the_frontend_reads():
    def formatted(message, **more):
        record = logging.makeLogRecord({"msg": message, "levelname": "WARNING", **more})
        return Levelled().format(record)

    try:
        raise ValueError("of two\nlines")
    except ValueError:
        lines = formatted("it failed", exc_info=sys.exc_info()).split("\n")
    assert lines[:2] == ["WARNING it failed", "WARNING Traceback (most recent call last):"]
    assert lines[-2:] == ["WARNING ValueError: of two", "WARNING lines"]
    assert formatted("\x1b[2J\r\u2028 날짜\tä") == "WARNING \\x1b[2J\\r\\u2028 날짜\tä"
    metric = "[METRICS]rows.Count:1|#type:GAUGE"
    assert formatted(metric) == metric


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [("200000 100000", 2), ("50000 100000", 1), ("150000 100000", 2), ("max 100000", 9),
     ("9900000 100000", 9), ("", 9), (None, 9)],
)  # fmt: skip
def test_cpus_are_no_more_than_a_container_has(tmp_path, monkeypatch, limit, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    monkeypatch.setattr(seq2seq_handler, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert seq2seq_handler.usable_cpus() == cpus


@pytest.mark.parametrize("text", [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure", "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: device lost",
])  # fmt: skip
def test_a_lost_device_ends_the_worker(unpacked, monkeypatch, text):
    """Whatever else is going on: TorchServe then starts another."""
    one = initialized(unpacked)
    ended = []

    def leave(code):
        ended.append(code)
        raise SystemExit

    def lost(*_):
        raise RuntimeError(text + "\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    one.service.engine.runner.model = SimpleNamespace(encode=lost, pad_id=0)
    body = {"body": {"text": "1"}}
    with pytest.raises(SystemExit):
        calls(one, context(unpacked), [("a", {"content-type": "application/json"}, body)])
    assert ended == [1]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"), ValueError("CUDA error: what a client wrote"),
])  # fmt: skip
def test_a_device_without_memory_is_not_lost(error):
    assert not is_lost(error)
