"""Large requests come in piece by piece: nobody waits for the whole of one, nothing of one that is
refused or left is ever decoded, and what is on its way counts as waiting."""

import json
from collections import Counter

import pytest
from echo_service import (
    TOKENIZER,
    Clock,
    Echo,
    answers,
    ask,
    error,
    left_nothing,
    service,
    texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streaming import gathered

from handler.authorization import Client, Terms
from handler.request import JSON
from handler.service import EVENTS, Incoming, Service

MANY = 300
ENCODING = 0.0005  # seconds that the tokenizer takes for a sentence
ROUND = 20.0  # ms, of which a quarter is for admissions that need several turns


class Slow(Clock):
    """Time passes in tokenizing too."""

    encoded = 0

    def __call__(self):
        return super().__call__() + self.encoded * ENCODING


class Counting:
    """`TOKENIZER`, which takes its time. fatal: a text that it fails at."""

    def __init__(self, clock, fatal=None):
        self.clock, self.fatal = clock, fatal

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text):
        self.clock.encoded += 1
        if text == self.fatal:
            raise KeyError("secret")
        return TOKENIZER.encode(text)


def slow(rows=4, round_ms=ROUND, fatal=None, **options) -> Service:
    model = Echo()
    clock = Slow(model)
    return service(
        rows, model, clock, source=Counting(clock, fatal), round_ms=round_ms, **options
    )


def stream(number, length=19, **options) -> Incoming:
    return ask(number, "a", length, stream=True, **options)


def of(one: Incoming, client: str, **terms) -> Incoming:
    return Incoming(one.id, "", JSON, one.body, client=Client(client, Terms(**terms)))


@pytest.mark.parametrize("shape", ["texts", "sentences"])
def test_others_hardly_notice_that_a_large_request_arrives(shape):
    one = slow(max_response_bytes=10**6)
    spoken = ["b"] * MANY if shape == "texts" else "b\n" * MANY
    large, number, now, gaps = ask("large", spoken, 2), 0, one.clock(), []
    reply, rounds = None, 0
    while reply is None:
        reply, news = one.round([large, stream(number)])
        now, before = one.clock(), now
        gaps.append(now - before)
        assert news is not None  # something of it in every round
        if news.kind != "more":
            number += 1
        rounds += 1
    assert reply.status == 200
    assert max(gaps) < 1.5 * ROUND / 1000
    assert rounds > MANY * ENCODING / (ROUND / 1000) * 3


def test_a_small_request_does_not_wait_for_a_large_one_that_is_arriving():
    one = slow(rows=8)
    large = [ask(f"large {i}", ["b"] * MANY, 2) for i in range(3)]
    assert one.round(large) == [None] * 3
    *none, reply = one.round([*large, ask("small", "c", 1)])
    assert none == [None] * 3
    assert texts(reply) == ["c"]
    assert len(answers(one, large, rounds=10**4)) == 3
    assert left_nothing(one)


def test_large_requests_take_turns():
    one = slow(rows=64)
    live = [ask(i, ["b"] * MANY, 1) for i in range(4)]
    ended = []
    for number in range(10**4):
        replies = one.round(live)
        ended += [number] * sum(reply is not None for reply in replies)
        live = [each for each, reply in zip(live, replies) if reply is None]
        if not live:
            break
    assert ended[-1] - ended[0] < number / 4
    assert left_nothing(one)


def test_alone_a_large_request_has_all_the_time():
    """Its own sentences are decoded as soon as they are in."""
    one = slow(rows=64)
    assert len(answers(one, [ask(1, ["b"] * MANY, 1)])) == 1
    assert one.clock() < 1.3 * (MANY * ENCODING + MANY / 1000)


def admitted(one: Service, monkeypatch) -> list[int]:
    """Sentences that are let in from now on."""
    found: list[int] = []
    real = one.engine.admit

    def admit(*arguments):
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(one.engine, "admit", admit)
    return found


@pytest.mark.parametrize(
    ("last", "options", "expected"),
    [
        ("abcdefab", {}, (413, "TextTooLong")),
        ("b\x01b\x02", {}, (400, "InvalidOption")),
        ("b", {"prefix": "abcdefab", "max_length": 8}, (400, "InvalidOption")),
        ("e", {}, (500, "InternalError")),
    ],
)
def test_a_request_whose_last_sentence_is_refused_was_never_let_in(
    last, options, expected, monkeypatch, caplog
):
    one = slow(fatal="e")
    if last.startswith("b\x01"):
        last, real = "b", one.engine.check
        checked = iter(range(10**6))

        def check(*given):
            if next(checked) == MANY:
                raise ValueError("beam_size: got 1; allowed here: none")
            return real(*given)

        monkeypatch.setattr(one.engine, "check", check)
    found = admitted(one, monkeypatch)
    bad = ask("bad", [*["b"] * MANY, last], **options)
    got, rounds = None, 0
    while got is None:
        (got,) = one.round([bad])
        rounds += 1
        assert one.engine.waiting_count == 0
    assert error(got) == expected
    assert rounds > 2
    assert found == []
    assert left_nothing(one)


@pytest.mark.parametrize("rounds", range(1, 26, 3))
@pytest.mark.parametrize("streams", [False, True])
def test_of_a_client_that_leaves_while_it_arrives_nothing_is_left(rounds, streams):
    one = slow()
    long, large = stream("long"), ask("large", ["b"] * MANY, 9, stream=streams)
    one.round([long])
    for _ in range(rounds):
        one.round([stream("other"), large])
    assert "large" in one.known
    one.round([stream("other")])
    assert "large" not in one.known
    assert not one.admission.reserved_of
    one.round([])
    assert left_nothing(one)


def test_what_arrives_counts_as_waiting():
    one = slow(max_waiting=2 * MANY - 1)
    live = [ask("first", ["b"] * MANY, 2)]
    while not one.admission.reserved_of:
        one.round(live)
    none, reply = one.round([*live, ask("second", ["b"] * MANY, 2)])
    assert (none, error(reply)) == (None, (503, "Overloaded"))
    live.append(ask("third", ["b"] * (MANY - 1), 2))
    while "third" not in one.pending:
        assert one.round(live)[1] is None
        assert one.gauges()["waiting_sentences"] <= 2 * MANY - 1
    got = answers(one, live, rounds=10**4)
    assert [reply.status for reply in got.values()] == [200, 200]
    assert left_nothing(one)


def test_a_stream_of_many_texts_is_the_same_however_it_comes_in():
    given = ["a", "b\nc\n\nd", "e"] * 20
    quick = service(rows=2, round_ms=1e6)
    (whole,) = quick.round([ask(1, given, 3)])
    one = slow(rows=2)
    asked, replies = ask("s", given, 3, stream=True), []
    while not replies or replies[-1].kind == "more":
        (reply,) = one.round([asked])
        replies += [reply] if reply is not None else []
    assert all(reply.content_type == EVENTS for reply in replies)
    assert len(replies) > 10
    said, name, answer = gathered(replies)
    assert (name, answer) == ("answer", json.loads(whole.body))
    assert [said[i] for i in range(len(given))] == texts(whole)
    assert left_nothing(one)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12), st.integers(1, 60), st.integers(1, 40), st.booleans(),
            st.sampled_from(["", "long", "fatal"]), st.sampled_from(["interactive", "bulk"]),
            st.sampled_from(["", "x", "y"]),
        ),
        max_size=6,
    ),
    st.integers(1, 5), st.sampled_from([0.0, 2.0, 20.0]),
)
def test_whoever_comes_and_leaves_all_are_answered_and_nothing_is_left(everybody, rows, round_ms):
    one = slow(rows, round_ms, fatal="e")
    live = {}
    for i, (arrives, count, stays, streams, kind, priority, name) in enumerate(everybody):
        spoken = ["b"] * count + {"": [], "long": ["abcdefab"], "fatal": ["e"]}[kind]
        asked = ask(i, spoken, 1 + i, stream=streams, priority=priority)
        leaves = arrives + stays if stays < 20 else 10**6
        live[i] = (of(asked, name), arrives, leaves, {"": 200, "long": 413, "fatal": 500}[kind])
    for now in range(5000):
        here = [(i, one_) for i, (one_, a, z, _) in live.items() if a <= now < z]
        for (i, _), reply in zip(here, one.round([each for _, each in here])):
            if reply is not None and reply.kind != "more":
                assert reply.status == live.pop(i)[3]
        assert set(one.pending) <= set(one.known) == {str(i) for i, _ in here if i in live}
        assert sum(p.reserved for p in one.pending.values()) <= one.admission.reserved_of.total()
        live = {i: each for i, each in live.items() if each[2] > now}
        if not live:
            break
    one.round([])
    assert not live
    assert left_nothing(one)


# Priorities and clients


def begun(one: Service, live: list[Incoming], rounds: int) -> dict[str, int]:
    """Sentences of each request that have ended after some rounds."""
    for _ in range(rounds):
        one.round(live)
    left = Counter(pending.id for pending, *_ in one.owner.values())
    return {key: len(pending.sentences) - left[key] for key, pending in one.pending.items()}


def test_bulk_waits_for_the_others_but_never_starves():
    one = service(rows=1, max_waiting=10**6)
    bulk = ask("bulk", ["a"] * 100, 1, priority="bulk")
    one.round([bulk])
    ended = begun(one, [bulk, ask("other", ["b"] * 100, 1)], 54)
    assert ended["bulk"] + ended["other"] == 55
    assert 4 <= ended["bulk"] - 16 <= 8  # those that were encoded ahead, and every ninth


def test_every_door_takes_a_priority():
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    bodies = {
        "native": {"text": "a", "priority": "bulk"},
        "v1": {"instances": ["a"], "parameters": {"priority": "bulk"}},
        "v2": {"inputs": [tensor], "parameters": {"priority": "bulk"}},
    }
    one = service(rows=1)
    live = [Incoming(key, "", JSON, body) for key, body in bodies.items()]
    first = ask("first", "b", 19)
    one.round([first, *live])
    assert [each.request.options.priority for each in one.pending.values()] == [
        "interactive", "bulk", "bulk", "bulk"
    ]
    assert all(ticket.bulk for ticket in list(one.engine.scheduler.tickets.values())[1:])
    assert {reply.status for reply in answers(one, [first, *live]).values()} == {200}


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_clients_share_the_rows_however_many_requests_they_send(share):
    one = service(rows=1, max_waiting=10**6)
    many = [of(ask(f"many {i}", ["a"] * 50, 1), "many") for i in range(8)]
    few = of(ask("few", ["b"] * 200, 1), "few", share=share)
    one.round(many)
    ended = begun(one, [*many, few], 20)
    before = ended["few"]
    ended = begun(one, [*many, few], 80)
    assert ended["few"] - before == pytest.approx(80 * share / (1 + share), abs=3)


def test_a_client_has_a_limit_of_its_own():
    one = service(rows=1)
    first = of(ask("first", ["a", "b", "c"], 9), "x", most_waiting=3)
    second = of(ask("second", ["d", "e"], 9), "x", most_waiting=3)
    other = of(ask("other", ["d"] * 9, 1), "y")
    none, refused, too = one.round([first, second, other])
    assert none is None
    assert too is None
    assert error(refused) == (429, "TooManyWaiting")
    assert refused.retry_after == 1
    assert "text: got 2 sentences, and 3 of this token wait already; allowed with this token: 3" \
        in json.loads(refused.body)["message"]
    third = of(ask("third", "d", 1), "x", most_waiting=3)
    got = answers(one, [first, third, other])
    assert {key: reply.status for key, reply in got.items()} == {
        "first": 200, "third": 200, "other": 200
    }
    assert left_nothing(one)


def test_sentences_of_a_client_that_arrive_count_towards_its_limit():
    one = slow(rows=2)
    large = of(ask("large", ["b"] * MANY, 2), "x", most_waiting=MANY + 1)
    while not one.admission.reserved_of:
        one.round([large])
    _, small, other = one.round([
        large, of(ask("small", ["b"] * 2, 2), "x", most_waiting=MANY + 1),
        of(ask("other", ["b"] * 2, 2), "y", most_waiting=2),
    ])
    assert error(small) == (429, "TooManyWaiting")
    assert other is None or other.status == 200
    one.round([])
    assert left_nothing(one)
