"""The service round by round: order, cancellation, isolation, bounds, and nothing left behind."""

import itertools
import json
import logging
import sys

import pytest
from echo_service import (
    BAD,
    IDS,
    LETTERS,
    TOKENIZER,
    Clock,
    Echo,
    answers,
    ask,
    error,
    left_nothing,
    refusal,
    service,
    texts,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.request import JSON, TEXT
from handler.service import Incoming, Reply


def test_every_letter_is_one_piece():
    assert TOKENIZER.size == 12
    assert len(set(IDS.values())) == len(LETTERS)
    assert TOKENIZER.decode([IDS["a"], IDS["b"]]) == "ab"


def test_one_answer_has_the_shape_of_the_contract():
    one = service()
    reply = answers(one, [ask(1, "ba", 3)])["1"]
    assert json.loads(reply.body) == {
        "translations": [[{"text": "bbb", "finish_reason": "length"}]],
        "model": {"name": "echo", "version": "1.0"},
        "usage": {"source_tokens": 4, "target_tokens": 3},  # space, b, a, EOS
    }
    assert left_nothing(one)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_texts_are_answered_in_their_order(rows):
    one = service(rows)
    spoken = list("abcdefabcabc")
    reply = answers(one, [ask(1, spoken, 2)])["1"]
    assert texts(reply) == [letter * 2 for letter in spoken]
    assert json.loads(reply.body)["usage"] == {"source_tokens": 36, "target_tokens": 24}
    assert left_nothing(one)


def test_each_request_has_its_own_answer_whatever_the_others_ask():
    one = service(rows=2)
    live = [ask(i, letter, i + 1) for i, letter in enumerate("abcdef")]
    got = answers(one, live)
    assert {key: texts(reply) for key, reply in got.items()} == {
        str(i): [letter * (i + 1)] for i, letter in enumerate("abcdef")
    }


def test_an_answer_is_given_in_the_round_in_which_it_is_ready():
    model = Echo()
    one = service(model=model, round_ms=4.5, clock=Clock(model))
    live = [ask("long", "a", 19), ask("short", "b", 1)]
    assert [reply is None for reply in one.round(live)] == [True, False]
    assert model.rows_computed == 5  # of the long one alone, when the short one was ready
    assert texts(answers(one, live[:1])["long"]) == ["a" * 19]


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_a_round_decodes_for_a_bounded_time(steps):
    model = Echo()
    one = service(model=model, round_ms=steps - 0.5, clock=Clock(model))
    live = [ask(1, "a", 18)]
    for i in range(1, 18 // steps + (18 % steps > 0)):
        assert one.round(live) == [None]
        assert model.rows_computed == i * steps
    assert one.round(live) != [None]
    assert model.rows_computed == 18


def test_requests_that_vanish_free_their_rows():
    one = service(rows=2)
    live = [ask(1, ["a", "b", "c"], 19), ask(2, ["d", "e"], 1)]
    assert one.round(live) == [None, None]
    assert one.engine.rows_in_use == 1  # "d" is answered in full
    (reply,) = one.round(live[1:])
    assert texts(reply) == ["d", "e"]
    assert left_nothing(one)
    one.round([ask(3, ["a", "b", "c"], 19)])
    assert one.round([]) == []
    assert left_nothing(one)


def test_hypotheses_scores_and_tokens_are_told_when_asked_for():
    one = service(rows=6)
    asked = ask(1, ["a", "b"], 2, beam_size=3, n_best=2, return_scores=True, return_tokens=True)
    first, second = json.loads(answers(one, [asked])["1"].body)["translations"]
    for letter, hypotheses in (("a", first), ("b", second)):
        assert [sorted(each) for each in hypotheses] == [
            ["finish_reason", "score", "text", "tokens"]
        ] * 2
        assert hypotheses[0]["tokens"] == [letter, letter]
        assert hypotheses[0]["score"] >= hypotheses[1]["score"]
    assert left_nothing(one)


def test_a_beam_wider_than_the_service_is_refused_alone():
    one = service(rows=4)
    got = answers(one, [ask("wide", ["a", "b"], beam_size=5), ask("good", "c", beam_size=4)])
    assert error(got["wide"]) == (400, "InvalidOption")
    assert texts(got["good"]) == ["cc"]
    assert left_nothing(one)


def test_an_id_that_comes_again_is_a_new_request():
    one = service()
    assert one.round([ask(1, "a", 9)]) == [None]
    one.round([])
    assert texts(answers(one, [ask(1, "b", 3)])["1"]) == ["bbb"]


@pytest.mark.parametrize(("bad", "expected"), BAD)
def test_a_bad_request_hurts_nobody(bad, expected):
    one = service(rows=2, max_texts=8)
    good = [ask(i, [letter, "f"], 3) for i, letter in enumerate("abc")]
    got = answers(one, [good[0], bad, *good[1:]])
    assert error(got.pop("bad")) == expected
    assert {key: texts(reply) for key, reply in got.items()} == {
        str(i): [letter * 3, "fff"] for i, letter in enumerate("abc")
    }
    assert left_nothing(one)


def test_a_stream_of_bad_requests_does_not_hold_up_a_good_one():
    one = service()
    good = ask("good", "a", 10)
    for i in range(10):
        good_reply, bad_reply = one.round([good, Incoming(str(i), "", JSON, b"{")])
        assert error(bad_reply) == (400, "InvalidJSON")
    assert texts(good_reply) == ["a" * 10]


def test_a_refused_text_is_named_with_its_number_and_what_is_allowed():
    long, longer = answers(service(), [ask(1, "abcdefg"), ask(2, ["a", "abcdefga"])]).values()
    assert json.loads(long.body)["message"] == (
        "text: got a sentence of 7 characters, 8 tokens; allowed: at most 7 tokens; "
        "send shorter sentences"
    )
    assert "text[1]: got a sentence of 8 characters, 9 tokens" in json.loads(longer.body)["message"]


def test_what_is_too_long_is_translated_in_pieces_and_told():
    given = ["ab, cdef\nab", "ab", "abc def"]
    reply = answers(service(), [ask(1, given)])["1"]
    assert texts(reply) == ["aa cc\naa", "aa", "aa dd"]
    assert json.loads(reply.body)["usage"]["cut_texts"] == [0, 2]
    assert "cut_texts" not in json.loads(answers(service(), [ask(1, "ab")])["1"].body)["usage"]


def test_what_is_too_long_is_refused_without_split_and_where_it_cannot_be_cut():
    for text, more, advice in (
        ("abc def", {"split": False}, "; send shorter sentences, or with split true a text"),
        ("a abcdefgabc", {}, "got a sentence of 10 characters, 11 tokens"),
    ):
        refused = refusal(service(), ask(1, text, **more))
        assert (refused["code"], refused["type"]) == (413, "TextTooLong")
        assert advice in refused["message"]


def test_pieces_of_a_sentence_count_as_sentences():
    given = ["abc def", "a"]
    assert texts(answers(service(max_sentences=3), [ask(1, given)])["1"]) == ["aa dd", "aa"]
    refused = refusal(service(max_sentences=2), ask(1, given))
    assert refused["type"] == "TooManySentences"
    assert "got 3 sentences; allowed: at most 2" in refused["message"]
    assert refusal(service(max_waiting=2), ask(1, given))["type"] == "Overloaded"


def test_pieces_of_a_sentence_stream_as_one_text():
    one, asked, sent = service(), ask(1, "abc def", 3, stream=True), ""
    for _ in range(20):
        (reply,) = one.round([asked])
        if reply is not None:
            sent += reply.body
            if reply.kind != "more":
                break
    told = [json.loads(line[6:]) for line in sent.splitlines() if line.startswith("data: ")]
    assert "".join(each["text"] for each in told[:-1]) == "aaa ddd"
    assert told[-1]["usage"]["cut_texts"] == [0]


def test_lines_of_a_paragraph_are_one_where_they_are_to_be_joined():
    given = "a\nbc\n\nd"
    one = service()
    assert texts(answers(one, [ask(1, given)])["1"]) == ["aa\nbb\n\ndd"]
    assert texts(answers(one, [ask(2, given, join_lines=True)])["2"]) == ["aa\n\ndd"]
    refused = refusal(one, ask(3, given, join_lines=True, split=False))
    assert refused["message"] == "join_lines: got true with split false; allowed: with split true"


def test_without_the_splitter_its_option_is_refused_and_all_else_is_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    one = service()
    refused = refusal(one, ask(1, ["a", "ab! Ba"]))
    assert (refused["code"], refused["type"]) == (400, "InvalidOption")
    assert refused["message"] == (
        "split: got true for a text of several sentences, which needs sentencex 0.6.1, found none: "
        "build the archive again, or install seq2serve[serving]; allowed on this server: false, or "
        "one sentence a line"
    )
    served = [
        ask(2, "a\nb"), ask(3, "abc def"), ask(4, "a\n\nb", join_lines=True),
        ask(5, "b", beam_size=2), ask(6, "ab! Ba", split=False),
    ]
    assert all(reply.status == 200 for reply in answers(one, served).values())


@pytest.mark.parametrize("broken", ["encode", "step"])
def test_a_failing_model_is_an_error_of_its_requests_alone(broken, monkeypatch, caplog):
    one = service()

    def fail(*_):
        raise RuntimeError("out of memory on device 7")

    with monkeypatch.context() as patch:
        patch.setattr(one.engine.model, broken, fail)
        got = answers(one, [ask(1, ["a", "b"]), ask(2, "c"), Incoming("3", "card", "", None)])
    assert error(got["1"]) == error(got["2"]) == (500, "DecodingFailed")
    assert got["3"].status == 200
    assert "device 7" not in got["1"].body
    assert "device 7" in caplog.text
    assert left_nothing(one)
    assert texts(answers(one, [ask(1, "a", 1)])["1"]) == ["a"]


@pytest.mark.parametrize(
    "part", ["scheduler.plan", "scheduler.settle", "runner.apply", "runner.run"]
)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_an_error_of_the_engine_ends_the_requests_it_had_and_nothing_else(
    rounds, part, monkeypatch, caplog
):
    one = service(rows=2)
    live = [ask(1, ["a", "b", "c"], 9, beam_size=2), ask(2, "d", 9, max_time=3600), ask(3, "e", 9)]
    for _ in range(rounds):
        assert one.round(live) == [None] * 3

    def fail(*_):
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        whose, method = part.split(".")
        patch.setattr(getattr(one.engine, whose), method, fail)
        replies = one.round([*live, Incoming("4", "card", "", None)])
    assert [error(reply) for reply in replies[:3]] == [(500, "DecodingFailed")] * 3
    assert replies[3].status == 200
    assert "secret" in caplog.text
    assert "secret" not in "".join(reply.body for reply in replies)
    assert left_nothing(one)
    assert one.gauges() == dict.fromkeys(one.gauges(), 0) | {"row_capacity": 2}
    got = answers(one, [ask(5, ["a", "b", "c"], 2, beam_size=2), ask(6, "d", 3)])
    assert (texts(got["5"]), texts(got["6"])) == (["aa", "bb", "cc"], ["ddd"])


ALONE = [  # what fails there concerns one request
    *(f"engine.{name}" for name in ("admit", "check", "committed")),
    *(f"narrator.{name}" for name in ("translated", "told", "source.encode", "target.decode")),
    *(
        f"admission.{name}"
        for name in ("check", "enter", "reserve", "hold", "afford", "tokens", "prefix")
    ),
    "last",
]
PLACES = [
    *ALONE,
    *(f"engine.{name}" for name in ("cancel", "advance", "begun")),
    *(f"engine.scheduler.{name}" for name in ("plan", "settle", "cancel", "admit")),
    *(f"engine.runner.{name}" for name in ("apply", "run", "rest", "committed")),
    *(f"metrics.{name}" for name in ("count", "observe")),
    *(f"arrivals.{name}" for name in ("add", "drop", "advance")),
    *(f"answers.{name}" for name in ("add", "drop", "advance")),
    *("begin", "step", "fail", "finish", "forget", "counted", "send"),
    *("note_ended", "note_whole", "note_complete"),
]


class Standing:
    """A tokenizer whose methods can be replaced."""

    def __init__(self):
        for name in ("encode", "decode", "pieces", "settled"):
            setattr(self, name, getattr(TOKENIZER, name))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(PLACES), st.integers(1, 30), st.booleans(), st.sampled_from([0.0, 3.0]),
    st.integers(1, 3),
)
def test_whatever_raises_once_each_request_ends_once_and_nothing_is_left(
    place, number, cleared, round_ms, rows
):
    one = service(rows, source=Standing(), target=Standing(), round_ms=round_ms)
    *path, name = place.split(".")
    whose = one
    for step in path:
        whose = getattr(whose, step)
    real, calls = getattr(whose, name), itertools.count(1)

    def fails(*given, **more):
        if next(calls) == number:
            if not cleared:  # nor can the engine be cleared, at first
                one.engine.clear = lambda: setattr(one.engine, "clear", clear) or 1 // 0
            raise KeyError("secret")
        return real(*given, **more)

    clear = one.engine.clear
    object.__setattr__(whose, name, fails)  # some are frozen
    live = [
        ask(1, ["a", "b", "c"], 5, stream=True), ask(2, "d", 7, beam_size=rows),
        ask(3, ["a\nb", "c"], 3, stream=True), ask(4, "a", beam_size=0),
        Incoming("5", "card", "", None), ask(6, ["e"] * 4, 2), ask("leaves", ["f"] * 5, 19),
    ]
    ended = {}
    for now in range(300):
        here = [each for each in live if each.id not in ended and (each.id != "leaves" or now < 3)]
        for each, reply in zip(here, one.round(here)):
            if reply is not None and reply.kind != "more":
                ended[each.id] = reply
        if not here:
            break
    assert not here
    one.round([])
    for reply in ended.values():
        assert "secret" not in reply.body
    errors = sum('"type": "InternalError"' in reply.body for reply in ended.values())
    assert errors <= (1 if place in ALONE else len(live))
    assert {each.id for each in live} - {"leaves"} <= set(ended)
    object.__setattr__(whose, name, real)
    one.engine.clear = clear
    for _ in range(100):  # what an engine that could not be cleared has left
        one.round([])
    got = answers(one, [ask(7, ["a", "b"], 2), ask(8, "c", 3, stream=True)])
    assert texts(got["7"]) == ["aa", "bb"]
    assert '"ccc"' in answers(one, [ask(9, "c", 3)])["9"].body
    assert left_nothing(one)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_failing_tokenizer_is_an_error_of_its_request_alone(side, caplog):
    method = "encode" if side == "source" else "decode"

    class Failing:
        def __getattr__(self, name):
            def call(given):
                fatal = "e" if side == "source" else [IDS["e"]] * 2
                if name == method and fatal in (given, [*given]):
                    raise KeyError("secret")
                return getattr(TOKENIZER, name)(given)

            return call

    one = service(**{side: Failing()})
    with caplog.at_level(logging.ERROR):
        got = answers(one, [ask(1, "a"), ask(2, "e"), ask(3, "b")])
    assert texts(got["1"]) == ["aa"]
    assert texts(got["3"]) == ["bb"]
    assert error(got["2"]) == (500, "InternalError")
    assert "secret" not in got["2"].body
    assert "secret" in caplog.text
    assert left_nothing(one)


def test_an_answer_that_is_too_long_is_refused_before_torchserve_dies_of_it():
    one = service(rows=64, max_response_bytes=1000)
    got = answers(one, [ask(1, ["a"] * 20, 19), ask(2, ["a"] * 2, 19)])
    assert error(got["1"]) == (413, "AnswerTooLong")
    assert "allowed: 1000; send fewer texts, lower max_length" in got["1"].body
    assert texts(got["2"]) == ["a" * 19] * 2


def test_a_line_of_text_is_answered_by_a_line():
    one = service(rows=1)
    reply = answers(one, [Incoming("1", "", TEXT, "\na\n \t\nb\r\n\n")])["1"]
    assert (reply.status, reply.content_type) == (200, "text/plain; charset=utf-8")
    most = 3 * 3 + 10  # of two letters and EOS, which nobody limited
    assert reply.body == f"\n{'a' * most}\n\n{'b' * most}\n\n"
    assert left_nothing(one)


def test_the_card_and_nothing_else_has_a_path():
    one = service()
    live = [Incoming(str(i), path, "", None) for i, path in enumerate(("card", "cards", "card/"))]
    card, *others = one.round(live)
    assert card == Reply(200, JSON, Echo.card)
    assert [error(reply) for reply in others] == [(404, "NotFound")] * 2
    assert "path: got 'cards'; allowed: 'card'" in others[0].body
    assert one.round([Incoming("9", "x" * 10**5, "", None)])[0].status == 404


def test_warming_up_leaves_nothing():
    one = service()
    one.warm_up()
    assert one.engine.model.rows_computed > 0
    assert left_nothing(one)
