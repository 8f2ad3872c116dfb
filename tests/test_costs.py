"""What requests take: no more memory than was estimated, no more time in a round than it has, and a
refusal that names what to lower where it would be too much."""

import gc
import json
import tracemalloc

import pytest
import torch
from echo_service import TOKENIZER, Clock, Echo, answers, ask, error, left_nothing, service, texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from table_model import TableMemory

from handler import admission, costs
from handler.request import JSON, RequestOptions
from handler.sentences import Splitter, line_breaks
from handler.service import Incoming, Service

ROWS, BEAM = 32, 8
APART = 400_000  # bytes that decoding itself takes here


class Spendthrift:
    """Writes letters for as long as it may, and pays all source tokens."""

    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3
    source_vocabulary = target_vocabulary = TOKENIZER.size
    max_source_length, max_target_length = 100, 60
    has_attention, card = True, "{}"

    def __init__(self):
        self.rows_computed = 0

    def encode(self, source, lengths):
        return TableMemory([source.unsqueeze(2).float()], [source[:, :1].float()])

    def start(self, memory):
        return [memory.initial[0]]

    def step(self, previous, state, memory):
        self.rows_computed += previous.numel()
        logits = torch.zeros(*previous.shape, self.target_vocabulary)
        logits[..., :4] = -30.0
        logits[..., 5] += 1.0  # a letter, and hardly ever a space
        length = memory.attended[0].size(1)
        return logits, state, torch.full((*previous.shape, length), 1 / length)


def spendthrift(**options) -> Service:
    model = Spendthrift()
    return service(ROWS, model, Clock(model), round_ms=5.0, **options)


def served(one: Service, asked: Incoming) -> tuple[int, str, int]:
    """Status and body of the end of a request, and the most that it was estimated to hold."""
    held = 0
    for _ in range(10_000):
        (reply,) = one.round([asked])
        held = max(held, one.admission.held)
        if reply is not None and reply.kind != "more":
            return reply.status, reply.body, held
    raise AssertionError("no end")


long_texts = st.builds(
    lambda words, gap: gap.join(words),
    st.lists(st.sampled_from(["a", "abc", "gfedcba", "g" * 60]), min_size=1, max_size=8),
    st.sampled_from([" ", ". ", "\n", "\n" * 300, "\r \n", " " * 200]),
)
expensive = st.fixed_dictionaries(
    {"text": st.lists(long_texts, min_size=1, max_size=8)},
    optional={
        "split": st.booleans(),
        "max_length": st.sampled_from([20, 60]),
        "min_length": st.just(20),
        "return_alignments": st.booleans(),
        "return_tokens": st.booleans(),
        "return_scores": st.booleans(),
        "stream": st.booleans(),
        "coverage_penalty": st.just(0.5),
        "max_time": st.just(0.5),
        "prefix": st.just("abcdefg"),
    },
)
beams = st.sampled_from([{}, {"beam_size": 4}, {"beam_size": BEAM, "n_best": BEAM}])
ONE_OF_ALL = {
    "text": ["abc " * 20] * 8, "split": False, "max_length": 60, "min_length": 20,
    "return_alignments": True, "return_tokens": True, "return_scores": True, "stream": True,
}  # fmt: skip


@settings(max_examples=25)
@given(expensive, beams)
@example(ONE_OF_ALL, {"beam_size": BEAM, "n_best": BEAM})
@example({"text": ["a" + "\n" * 60_000 + "b"]}, {"beam_size": BEAM, "n_best": BEAM})
@example({"text": ["a\n" * 200] * 10, "max_length": 1}, {})
def test_no_request_takes_more_memory_than_was_estimated(asked, beam):
    one = spendthrift()
    served(one, ask("before", "a", 5))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        given = json.dumps(asked | beam).encode()
        status, body, held = served(one, Incoming("1", "", JSON, given))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= held + costs.SENT * len(body.encode()) + costs.PARSED * len(given) + APART
    assert status in (200, 413), body
    assert held <= one.options.request_memory / 4
    assert left_nothing(one)


@pytest.mark.parametrize(
    ("asked", "kind", "named"),
    [
        ({"n_best": 8, "beam_size": 8}, "TooExpensive", "lower max_length or n_best"),
        ({"return_alignments": True}, "TooExpensive", "ask for no return_alignments"),
        ({"return_alignments": True, "min_length": 60}, "AnswerTooLong", "would have"),
    ],
)  # fmt: skip
def test_what_could_be_too_much_is_refused_before_it_is_decoded(asked, kind, named):
    one = spendthrift(request_memory=12_000_000)
    many = Incoming("1", "", JSON, {"text": ["abc " * 20] * 900, "split": False, **asked})
    got = answers(one, [many, ask("other", "a", 3)], rounds=2000)
    assert error(got["1"]) == (413, kind)
    assert named in json.loads(got["1"].body)["message"]
    assert len(texts(got["other"])[0]) == 3
    assert one.engine.model.rows_computed <= 3
    assert left_nothing(one)


def test_an_answer_is_refused_as_soon_as_it_is_too_long():
    one = spendthrift(max_response_bytes=20_000)
    status, body, _ = served(one, ask(1, ["abc " * 20] * 80, 60, return_alignments=True))
    assert (status, json.loads(body)["type"]) == (413, "AnswerTooLong")
    assert one.engine.model.rows_computed <= ROWS * 60  # of 80 sentences
    assert left_nothing(one)


def test_requests_that_hold_the_memory_make_others_come_again_and_give_it_back():
    one = spendthrift(request_memory=4_000_000)
    asked = {"n_best": 8, "beam_size": 8}
    live = [ask(i, ["abc " * 20] * 20, 60, **asked) for i in range(12)]
    replies = []
    for _ in range(50):
        replies = one.round(live)
        if any(replies):
            break
    refused = [reply for reply in replies if reply is not None]
    assert {error(reply) for reply in refused} == {(503, "Overloaded")}
    assert {reply.retry_after for reply in refused} == {1}
    assert one.admission.held <= 4_000_000
    one.round([])
    assert left_nothing(one)
    assert served(one, live[0])[0] == 200


def test_long_answers_are_sent_one_a_round():
    one = spendthrift(max_response_bytes=40_000)
    live = [ask(i, ["abc " * 20] * 2, 60, return_alignments=True) for i in range(4)]
    sent = []
    while live:
        replies = one.round(live)
        sent.append(sum(len(reply.body) for reply in replies if reply is not None))
        live = [each for each, reply in zip(live, replies) if reply is None]
    assert max(sent) > 0
    assert max(sent) <= 40_000
    assert left_nothing(one)


# Time


class Reading(Clock):
    """Time passes in telling too: a millisecond for each row of an alignment, and so on."""

    told = 0

    def __call__(self):
        return super().__call__() + self.told / 1000


class Telling:
    def __init__(self, clock):
        self.clock = clock

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def decode(self, ids):
        self.clock.told += 1
        return TOKENIZER.decode(ids)


@pytest.mark.parametrize("shape", ["texts", "sentences"])
def test_a_stream_has_its_events_while_its_own_long_answer_is_written(shape):
    model = Echo()
    clock = Reading(model)
    one = service(4, model, clock, target=Telling(clock), round_ms=20.0)
    spoken = ["b"] * 200 if shape == "texts" else "b\n" * 200
    asked, last, gaps, reply = ask(1, spoken, 2, stream=True), clock(), [], None
    while reply is None or reply.kind == "more":
        (reply,) = one.round([asked])
        if reply is not None and "data: {\"index" in reply.body:
            gaps.append(clock() - last)
            last = clock()
    assert max(gaps) <= 3 * 0.020
    assert len(gaps) > 10
    assert left_nothing(one)


# Splitting and tokenizing

soup = st.lists(
    st.sampled_from([
        "a", "B. ", "\n", "\r", " ", "\r\n", "“", "Foo.", "Ab. Cd", "。", "1", "...", "("
    ]),
    max_size=40,
).map("".join)  # fmt: skip


@given(soup)
def test_of_white_space_no_more_is_held_than_a_translation_keeps(text):
    found = spendthrift().admission.segments(text, RequestOptions(split=True))
    expected = Splitter().split(text)
    assert [(one.text, one.gap) for one in found if one is not None] == [
        (one.text, line_breaks(one.gap) or one.gap) for one in expected
    ]


def test_a_million_line_breaks_are_one_white_space():
    one = spendthrift()
    assert texts(answers(one, [ask(1, "a" + "\n" * 10**6 + "b", 1)])["1"])[0].count("\n") == 10**6
    got = answers(one, [ask(2, "a" + "\n" * 10**6 + "b", 1, beam_size=8, n_best=8)])["2"]
    assert error(got) == (413, "AnswerTooLong")
    assert left_nothing(one)


def test_a_sentence_that_is_far_too_long_is_refused_before_all_of_it_is_tokenized(monkeypatch):
    one, read = spendthrift(), []

    class Watched:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def encode(self, text):
            read.append(len(text))
            return TOKENIZER.encode(text)

    one.admission.narrator = one.narrator.__class__(Watched(), TOKENIZER, {})
    for text in ("abc" * 80_000, "a " * 120_000):
        got = answers(one, [ask(1, text, split=False)])["1"]
        assert error(got) == (413, "TextTooLong")
        assert max(read) <= admission.WINDOW
        assert sum(read) <= 4 * admission.WINDOW
        read.clear()
    assert len(texts(answers(one, [ask(2, "a" + " " * 9000 + "b", 1, split=False)])["2"])[0]) == 1
    assert left_nothing(one)
