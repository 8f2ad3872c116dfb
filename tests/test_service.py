"""The service round by round: order, cancellation, isolation, bounds, and nothing left behind.

Texts are spelt with letters that are one piece each, so expected answers are written by hand.
"""

import json
import logging
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import TableModel

from handler.decoding import Engine
from handler.request import JSON, TEXT
from handler.service import Incoming, Reply, Service, ServiceOptions
from handler.tokenizer import Tokenizer
from training.recipe import TokenizerOptions
from training.tokenizer import learn

LETTERS = "abcdefg"
TOKENIZER = Tokenizer(
    learn(
        TokenizerOptions(algorithm="bpe", byte_fallback=False, normalization="identity"),
        12,  # of a TableModel: 4 special ones, 7 letters and the space
        [" ".join(LETTERS)] * 3,
        "source_vocabulary",
    )
)
IDS = {letter: TOKENIZER.encode(letter)[-1] for letter in LETTERS}


def test_every_letter_is_one_piece():
    assert TOKENIZER.size == 12
    assert len(set(IDS.values())) == len(LETTERS)
    assert TOKENIZER.decode([IDS["a"], IDS["b"]]) == "ab"


class Echo(TableModel):
    """Says the first letter of the source again and again, until `max_length`. A source that
    starts with `g` gives NaN, for its own row only."""

    card = '{"name": "echo"}'

    def __init__(self):
        super().__init__({}, poison=IDS["g"])

    def start(self, memory):
        # The first piece is a space. Warming up, there is nothing else.
        return [memory.attended[0][:, :2, 0][:, -1:].clone()]

    def step(self, previous, state, memory):
        logits, state, attention = super().step(previous, state, memory)
        for row, letter in enumerate(state[0][:, 0].tolist()):
            if letter != self.poison:
                logits.view(-1, logits.size(2))[row, int(letter)] = 0.0
        return logits, state, attention


def service(
    rows=4, model=None, clock=time.monotonic, source=TOKENIZER, target=TOKENIZER, **options
) -> Service:
    """Rounds of one step, unless `round_ms` is given."""
    engine = Engine(model or Echo(), rows, clock=clock)
    options = ServiceOptions(**{"round_ms": 0.0, **options})
    return Service(engine, source, target, "echo", "1.0", options, clock)


def ask(number, text, length=2, **options) -> Incoming:
    body = {"text": text, "max_length": length, **options}
    return Incoming(str(number), "", JSON, body)


def answers(one: Service, live: list[Incoming], rounds=200) -> dict[str, Reply]:
    """Rounds, as TorchServe calls them, until every request has its reply."""
    live, got = list(live), {}
    for _ in range(rounds):
        if not live:
            return got
        replies = one.round(live)
        assert len(replies) == len(live)
        got |= {each.id: reply for each, reply in zip(live, replies) if reply is not None}
        live = [each for each, reply in zip(live, replies) if reply is None]
    raise AssertionError(f"no reply to {live}")


def texts(reply: Reply) -> list[str]:
    assert (reply.status, reply.content_type) == (200, JSON)
    return [one[0]["text"] for one in json.loads(reply.body)["translations"]]


def error(reply: Reply) -> tuple[int, str]:
    assert reply.content_type == JSON
    body = json.loads(reply.body)
    assert list(body) == ["code", "type", "message"]
    assert body["code"] == reply.status
    return reply.status, body["type"]


def left_nothing(one: Service) -> bool:
    return one.engine.idle and not one.pending and not one.owner


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


class Clock:
    """Time that passes only in decoding: a millisecond a step."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        return self.model.rows_computed / 1000


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


BAD = [
    (Incoming("bad", "", JSON, b"{"), (400, "InvalidJSON")),
    (Incoming("bad", "", JSON, None), (400, "InvalidRequest")),
    (Incoming("bad", "", "a/b", b"a"), (400, "InvalidContentType")),
    (Incoming("bad", "", TEXT, b"\xff"), (400, "InvalidText")),
    (Incoming("bad", "nowhere", JSON, {"text": "a"}), (404, "NotFound")),
    (ask("bad", "a", beam_size=0), (400, "InvalidOption")),
    (ask("bad", ["a", " "]), (400, "EmptyText")),
    (ask("bad", ["a", "\ud800"]), (400, "InvalidText")),
    (ask("bad", ["a"] * 9), (413, "TooManyTexts")),
    (ask("bad", ["a", "abcdefab"]), (413, "TextTooLong")),
    (ask("bad", ["a", "gab"]), (500, "DecodingFailed")),
]


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


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_failing_tokenizer_is_an_error_of_its_request_alone(side, caplog):
    method = "encode" if side == "source" else "decode"

    class Failing:
        def __getattr__(self, name):
            def call(given):
                fatal = "e" if side == "source" else [IDS["e"]] * 2
                if name == method and given == fatal:
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
    assert "allowed: 1000; send fewer texts" in got["1"].body
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


@dataclass
class Client:
    """A request that arrives at one round and may leave at another."""

    incoming: Incoming
    expected: object
    arrives: int
    leaves: int


clients = st.tuples(
    st.lists(st.sampled_from(LETTERS[:-1]), min_size=1, max_size=4),
    st.integers(1, 19),
    st.none() | st.sampled_from(BAD),
    st.integers(0, 12),
    st.none() | st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(clients, max_size=12), st.integers(1, 5), st.integers(1, 9))
def test_nothing_is_left_whoever_comes_and_goes(drawn, rows, steps):
    one = service(rows, max_texts=8, round_ms=float(steps))
    everybody = []
    for i, (spoken, length, bad, arrives, stays) in enumerate(drawn):
        incoming = ask(i, spoken, length)
        expected = [letter * length for letter in spoken]
        if bad is not None:
            incoming, expected = Incoming(str(i), *list(vars(bad[0]).values())[1:]), bad[1]
        leaves = arrives + stays if stays is not None else 10**6
        everybody.append(Client(incoming, expected, arrives, leaves))
    answered = set()
    for now in range(500):
        live = [
            c for c in everybody if c.arrives <= now < c.leaves and c.incoming.id not in answered
        ]
        for client, reply in zip(live, one.round([c.incoming for c in live])):
            if reply is None:
                continue
            answered.add(client.incoming.id)
            got = texts(reply) if reply.status == 200 else error(reply)
            assert got == client.expected
        held = {id(p) for p in one.pending.values()}
        assert {id(p) for p in one.owner.values()} <= held
        assert set(one.pending) <= {c.incoming.id for c in live} - answered
        if not live and now > 12:
            break
    stayed = {c.incoming.id for c in everybody if c.leaves == 10**6}
    assert stayed <= answered
    assert left_nothing(one)
