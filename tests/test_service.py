"""The service round by round: order, cancellation, isolation, bounds, and nothing left behind.

Texts are spelt with letters that are one piece each, so expected answers are written by hand.
"""

import json
import logging
import time

import pytest
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


class Normalised:
    """`TOKENIZER` with a normalisation, of control characters alone."""

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text):
        return TOKENIZER.encode("".join(c for c in text if c >= " "))


NORMALISED = Normalised()


def test_every_letter_is_one_piece():
    assert TOKENIZER.size == 12
    assert len(set(IDS.values())) == len(LETTERS)
    assert TOKENIZER.decode([IDS["a"], IDS["b"]]) == "ab"


class Echo(TableModel):
    """Says the first letter of the source again and again, until `max_length`. A source that
    starts with `g` gives NaN, for its own row only."""

    card = '{"name": "echo"}'

    def __init__(self, attention=None):
        super().__init__({}, poison=IDS["g"], attention=attention)

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


def refusal(one: Service, asked: Incoming) -> dict:
    """The error that answers a request at once, of which nothing is left."""
    (reply,) = one.round([asked])
    assert reply is not None
    error(reply)
    assert left_nothing(one)
    return json.loads(reply.body)


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


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_an_error_of_the_engine_ends_the_requests_it_had_and_nothing_else(
    rounds, monkeypatch, caplog
):
    one = service(rows=2)
    live = [ask(1, ["a", "b", "c"], 9, beam_size=2), ask(2, "d", 9, max_time=3600), ask(3, "e", 9)]
    for _ in range(rounds):
        assert one.round(live) == [None] * 3

    def fail(*_):
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(one.engine, "fill", fail)
        replies = one.round([*live, Incoming("4", "card", "", None)])
    assert [error(reply) for reply in replies[:3]] == [(500, "DecodingFailed")] * 3
    assert replies[3].status == 200
    assert "secret" in caplog.text
    assert "secret" not in "".join(reply.body for reply in replies)
    assert left_nothing(one)
    assert one.gauges() == dict.fromkeys(one.gauges(), 0) | {"row_capacity": 2}
    got = answers(one, [ask(5, ["a", "b", "c"], 2, beam_size=2), ask(6, "d", 3)])
    assert (texts(got["5"]), texts(got["6"])) == (["aa", "bb", "cc"], ["ddd"])


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


# Paragraphs


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\nb", "aa\nbb"),
        ("\n\na\r\n \t\n\nb\n\n", "\n\naa\r\n\n\nbb\n\n"),
        ("a\u2028b\x0bc", "aa\u2028bb\x0bcc"),
        (" ab ", "aa"),
    ],
)
def test_line_breaks_and_blank_lines_of_a_text_are_kept(text, answer):
    one = service()
    reply = answers(one, [ask(1, [text, "c"])])["1"]
    assert texts(reply) == [answer, "cc"]
    assert left_nothing(one)


def test_a_text_that_is_not_split_is_one_sentence():
    one = service()
    got = answers(one, [ask(1, "a\nb", 3, split=False), ask(2, "a\nb", 3)])
    assert texts(got["1"]) == ["aaa"]
    assert texts(got["2"]) == ["aaa\nbbb"]
    tokens = [json.loads(got[key].body)["usage"]["target_tokens"] for key in "12"]
    assert tokens == [3, 6]


def test_a_sentence_of_control_characters_becomes_empty():
    """A tokenizer that normalises drops them; a text of nothing else is refused."""
    one = service(source=NORMALISED)
    got = answers(one, [ask(1, "\x01\na\n\x02\x03"), ask(2, "\x01\n\x02"), ask(3, "\x01")])
    assert texts(got["1"]) == ["\naa\n"]
    assert error(got["2"]) == error(got["3"]) == (400, "EmptyText")
    assert left_nothing(one)


def test_what_is_told_of_a_paragraph_is_told_of_all_its_sentences():
    one = service(rows=8, model=Echo(attention={}))
    told = {"return_scores": True, "return_tokens": True, "return_alignments": True}
    asked = [
        ask(key, text, 2, beam_size=2, n_best=2, **told)
        for key, text in (("both", "a\nb"), ("a", "a"), ("b", "b"))
    ]
    both, a, b = (json.loads(one.body) for one in answers(one, asked).values())
    assert both["usage"] == {
        side: a["usage"][side] + b["usage"][side] for side in ("source_tokens", "target_tokens")
    }
    for rank in range(2):
        whole, first, second = (each["translations"][0][rank] for each in (both, a, b))
        assert whole["text"] == f"{first['text']}\n{second['text']}"
        assert whole["score"] == pytest.approx(first["score"] + second["score"], abs=2e-4)
        assert whole["tokens"] == first["tokens"] + second["tokens"]
        assert whole["alignment"] == first["alignment"] + second["alignment"]
        assert [len(part["weights"]) for part in whole["alignment"]] == [2, 2]
        assert whole["alignment"][0]["source"] == ["▁", "a", "</s>"]


def test_a_sentence_with_fewer_hypotheses_lends_its_last_to_the_paragraph():
    model = Echo()
    one = service(rows=2, model=model, clock=Clock(model))
    beam = {"beam_size": 2, "n_best": 2}
    (alone,) = json.loads(answers(one, [ask(1, "a", 3, **beam)])["1"].body)["translations"]
    # Time is over when "a" has ended, after 1 + 2 + 2 rows, and "b" has not begun.
    (found,) = json.loads(
        answers(one, [ask(1, "a\nb", 3, max_time=0.0045, **beam)])["1"].body
    )["translations"]
    assert [each["text"] for each in found] == [f"{each['text']}\n" for each in alone]
    assert [each["finish_reason"] for each in found] == ["time", "time"]


def test_the_gravest_reason_is_told_of_a_paragraph():
    model = Echo()
    one = service(rows=1, model=model, clock=Clock(model))
    asked = ask(1, "a\nb", 5, max_time=0.0075)  # after 7 steps of one row
    (((told,),)) = json.loads(answers(one, [asked])["1"].body)["translations"]
    assert told == {"text": "aaaaa\nbbb", "finish_reason": "time"}


# Time


def test_when_time_is_over_what_there_is_is_answered():
    model = Echo()
    one = service(rows=2, model=model, clock=Clock(model))
    live = [
        ask("short", "a", 19, max_time=0.0055),  # six steps of two rows, or less
        ask("waits", "b", 19, max_time=0.0055),
        ask("free", "c", 6),
        ask("hour", "d", 3, max_time=3600),
    ]
    got = answers(one, live)
    told = {
        key: json.loads(reply.body)["translations"][0][0] for key, reply in got.items()
    }
    assert told["short"] == {"text": "aaa", "finish_reason": "time"}
    assert told["waits"] == {"text": "bbb", "finish_reason": "time"}
    assert told["free"] == {"text": "cccccc", "finish_reason": "length"}
    assert told["hour"] == {"text": "ddd", "finish_reason": "length"}
    assert left_nothing(one)


@pytest.mark.parametrize("form", ["power", "gnmt"])
@pytest.mark.parametrize("options", [
    {}, {"beam_size": 2, "n_best": 2}, {"return_scores": True, "return_alignments": True},
    {"coverage_penalty": 1.0},
])
def test_time_may_be_over_before_the_first_token(options, form):
    one = service(rows=2, model=Echo(attention={}))
    live = [
        ask("late", ["a", "b", "c"], length_penalty=1.0, length_penalty_form=form,
            max_time=1e-9, **options),
        ask("other", "d", 3),
    ]
    got = answers(one, live)
    told = json.loads(got["late"].body)["translations"]
    assert [(each[0]["text"], each[0]["finish_reason"]) for each in told] == [("", "time")] * 3
    assert texts(got["other"]) == ["ddd"]
    assert left_nothing(one)


# Prefixes


def test_a_prefix_begins_the_first_sentence_of_each_text():
    one = service()
    reply = answers(one, [ask(1, ["a\nb", "c"], 4, prefix="ef")])["1"]  # and its space
    assert texts(reply) == ["efa\nbbbb", "efc"]


def test_a_prefix_begins_the_first_sentence_that_has_words():
    one = service(source=NORMALISED)
    assert texts(answers(one, [ask(1, "\x01\na", 3, prefix="b")])["1"]) == ["\nba"]


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("ax", "prefix: got 'ax'; allowed: characters that the model can write"),
        ("a\ud800", "prefix: character 1 is a lone surrogate, U+D800; allowed: Unicode text"),
        ("abcdefab", "prefix: got 9 tokens; allowed: at most max_length, 8"),
        ("a" * 4097, "allowed: a string of at most 4096 characters or null"),
        (5, "prefix: got 5; allowed: a string"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused_by_name_and_nothing_admitted(prefix, message):
    told = refusal(service(), ask(1, ["a\nb", "c"], 8, prefix=prefix))
    assert (told["code"], told["type"]) == (400, "InvalidOption")
    assert message in told["message"]


def test_options_that_the_model_has_no_attention_for_are_refused_by_name():
    """Of the kinds of models, `sutskever` has none."""
    for name, value in (("coverage_penalty", 0.5), ("return_alignments", True)):
        told = refusal(service(), ask(1, ["a", "b"], **{name: value}))
        assert told["message"].startswith(f"{name}: got {value}; allowed by this model")


def test_options_that_leave_no_token_are_the_mistake_of_their_request():
    """Eight tokens, none of them twice, cannot be nineteen."""
    for beam in (1, 2):
        one = service()
        asked = ask(1, "a", 19, min_length=19, no_repeat_ngram_size=1, beam_size=beam)
        reply = answers(one, [asked])["1"]
        assert error(reply)[0] == 400


# Too much


def test_more_sentences_than_allowed_are_refused():
    one = service(max_sentences=3)
    told = refusal(one, ask(1, ["a\nb", "c\nd"]))
    assert (told["code"], told["type"]) == (413, "TooManySentences")
    assert told["message"].startswith("text: got 4 sentences; allowed: at most 3 in a request")
    assert texts(answers(one, [ask(1, ["a\nb", "c"])])["1"]) == ["aa\nbb", "cc"]


def test_a_request_that_would_wait_too_long_is_told_to_come_again():
    one = service(rows=1, max_waiting=2)
    first = ask(1, ["a", "b"], 4)
    assert one.round([first]) == [None]  # "b" waits
    none, reply = one.round([first, ask(2, ["c", "d"])])
    assert none is None
    assert error(reply) == (503, "Overloaded")
    assert reply.retry_after == 1
    assert len(one.pending) == 1
    got = answers(one, [first, ask(3, "c")])
    assert {key: texts(each) for key, each in got.items()} == {"1": ["aaaa", "bbbb"], "3": ["cc"]}
    assert left_nothing(one)


@pytest.mark.parametrize("rows", [1, 4])
def test_many_texts_do_not_hold_up_a_small_request_that_comes_later(rows):
    one = service(rows=rows)
    crowd, length = ask("crowd", list("abcdef") * 40, 5), 5
    for _ in range(7):
        assert one.round([crowd]) == [None]
    small, rounds, reply = ask("small", "b", length), 0, None
    while reply is None:
        _, reply = one.round([crowd, small])
        rounds += 1
    assert texts(reply) == ["b" * length]
    assert rounds <= 240 * length / rows / 10  # a tenth of what the crowd needs
    assert texts(answers(one, [crowd], rounds=1500)["crowd"]) == [c * 5 for c in "abcdef" * 40]


def test_a_crowd_of_small_requests_does_not_starve_a_large_one():
    one = service(rows=2)
    large, number = ask("large", list("abc"), 3), 0
    assert one.round([large]) == [None]
    small = [ask(f"s{i}", "d", 3) for i in range(4)]
    for _ in range(100):
        reply, *others = one.round([large, *small])
        if reply is not None:
            break
        for i, each in enumerate(others):
            if each is not None:
                number += 1
                small[i] = ask(f"t{number}", "d", 3)
    assert texts(reply) == ["aaa", "bbb", "ccc"]
