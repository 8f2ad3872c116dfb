"""What the options of a request do to its answer, and what is too much."""

import json

import pytest
from echo_service import (
    NORMALISED,
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
    assert told["message"].startswith("text: got more than 3 sentences; allowed: at most 3 in a ")
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
