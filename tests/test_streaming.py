"""Streams: what is sent is a beginning of the answer, is never taken back, and the end is told."""

import json
from dataclasses import dataclass, field

import pytest
import torch
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
    service,
    texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import TableMemory, TableModel

from handler.doors import Door
from handler.request import JSON, TEXT
from handler.service import EVENTS, Incoming, Reply, Service
from handler.tokenizer import Tokenizer
from training.normalization import AS_IT_STANDS
from training.recipe import TokenizerOptions
from training.tokenizer import learn

OPEN = ": open\n\n"
BYTES = Tokenizer(
    learn(TokenizerOptions(), 268, ["the cat sat"] * 3, "source_vocabulary", AS_IT_STANDS)
)


class Babbler:
    """Babbles pieces of any kind, bytes of whole and of broken characters among them: a table of
    what follows what, and what each source likes."""

    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3
    max_source_length, max_target_length = 200, 24
    has_attention = True
    card = "{}"

    def __init__(self, seed: int) -> None:
        self.source_vocabulary = self.target_vocabulary = size = BYTES.size
        draw = torch.Generator().manual_seed(seed)
        self.table = 3 * torch.randn(size, size, generator=draw)
        self.liking = 2 * torch.randn(97, size, generator=draw)
        self.table[:, self.eos_id] += 4
        pieces = BYTES.pieces(range(size))
        byte = {int(p[3:-1], 16): i for i, p in enumerate(pieces) if p.startswith("<0x")}
        continuing = [byte[b] for b in range(0x80, 0xC0)]
        for lead in range(0xC2, 0xF5):
            self.table[byte[lead], continuing] += 6
        for one in continuing:
            self.table[one, continuing] += 2
        self.rows_computed = 0

    def encode(self, source, lengths):
        return TableMemory([source.unsqueeze(2).float()], [source.sum(1, keepdim=True).float()])

    def start(self, memory):
        return [memory.initial[0]]

    def step(self, previous, state, memory):
        self.rows_computed += previous.numel()
        liked = self.liking[(state[0][:, 0] % 97).long()].view(*previous.shape, -1)
        weights = torch.ones(*previous.shape, memory.attended[0].size(1))
        return self.table[previous] + liked, state, weights


class Reciter(Babbler):
    """Says `tokens`, and ends."""

    def __init__(self, tokens):
        super().__init__(0)
        self.tokens = torch.tensor([*tokens, self.eos_id])

    def start(self, memory):
        return [torch.zeros_like(memory.initial[0])]

    def step(self, previous, state, memory):
        place = state[0][:, 0].long().clamp(max=len(self.tokens) - 1)  # [rows]
        logits = torch.full((*previous.shape, self.target_vocabulary), -30.0)
        logits.flatten(0, 1)[torch.arange(len(place)), self.tokens[place]] = 0.0
        return logits, [state[0] + 1], torch.ones(*previous.shape, memory.attended[0].size(1))


def told(reply: Reply) -> list[tuple[str | None, dict]]:
    """Name and data of each event; comments are skipped, as the standard asks."""
    assert (reply.status, reply.content_type) == (200, EVENTS)
    assert reply.body.endswith("\n\n")
    events = []
    for block in reply.body.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        *name, data = block.split("\n")
        assert all(line.startswith("event: ") for line in name)
        assert len(name) <= 1
        events.append((name[0][7:] if name else None, json.loads(data.removeprefix("data: "))))
    return events


def transcript(one: Service, asked: Incoming, others=(), rounds=1000) -> list[Reply]:
    """All replies to one request, in the company of others that never end."""
    replies = []
    for _ in range(rounds):
        reply = one.round([asked, *others])[0]
        if reply is not None:
            replies.append(reply)
            if reply.kind != "more":
                return replies
    raise AssertionError(f"no end of {asked}")


def gathered(replies: list[Reply]) -> tuple[dict[int, str], str | None, dict]:
    """What was streamed of each text, then name and data of the last event, which is no text."""
    events = [each for reply in replies for each in told(reply)]
    *news, (name, last) = events
    assert {one for one, _ in news} <= {None}
    assert name is not None
    said: dict[int, str] = {}
    for _, data in news:
        assert list(data) == ["index", "text"]
        assert data["text"]
        said[data["index"]] = said.get(data["index"], "") + data["text"]
    return said, name, last


words = st.text(st.sampled_from("abcst ."), min_size=1, max_size=6).filter(str.strip)
lines = words | st.sampled_from(["", "A b. C d.", "é 😀"])
paragraphs = st.lists(lines, min_size=1, max_size=4).map("\n".join).filter(str.strip)
decoding = st.fixed_dictionaries(
    {"max_length": st.integers(8, 24)},
    optional={
        "beam_size": st.integers(1, 4),
        "length_penalty": st.sampled_from([0.0, 0.6, 1.0]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "coverage_penalty": st.just(0.3),
        "min_length": st.integers(0, 8),
        "prefix": st.sampled_from(["the", "é", "ca"]),
        "split": st.booleans(),
        "return_tokens": st.booleans(),
        "return_scores": st.booleans(),
        "return_alignments": st.booleans(),
    },
)


@settings(max_examples=120)
@given(
    st.lists(paragraphs, min_size=1, max_size=3), decoding, st.integers(0, 5), st.integers(4, 9),
    st.integers(0, 30), st.booleans(),
)
def test_what_is_streamed_is_the_answer(given, options, seed, rows, round_ms, all_of_beam):
    options["n_best"] = options.get("beam_size", 1) if all_of_beam else 1
    model = Babbler(seed)
    one = service(
        rows, model, Clock(model), source=BYTES, target=BYTES, round_ms=float(round_ms)
    )
    body = {"text": given, **options}
    whole = answers(one, [Incoming("whole", "", JSON, body)])["whole"]
    assert whole.status == 200, whole.body
    replies = transcript(one, Incoming("stream", "", JSON, body | {"stream": True}))
    said, name, answer = gathered(replies)
    assert name == "answer"
    assert answer == json.loads(whole.body)
    assert [said.get(i, "") for i in range(len(given))] == [
        hypotheses[0]["text"] for hypotheses in answer["translations"]
    ]
    assert [reply.kind for reply in replies[:-1]] == ["more"] * (len(replies) - 1)
    assert replies[-1].kind == ("last" if replies[:-1] else "whole")
    assert left_nothing(one)


def test_each_token_is_sent_in_the_round_in_which_it_is_decided():
    one = service()
    replies = transcript(one, ask(1, ["a", "b"], 3, stream=True))
    assert [told(reply) for reply in replies[:2]] == [
        [(None, {"index": 0, "text": "a"}), (None, {"index": 1, "text": "b"})]
    ] * 2
    *news, (name, answer) = told(replies[2])
    assert [data["text"] for _, data in news] == ["a", "b"]
    assert (name, answer["translations"][1]) == (
        "answer", [{"text": "bbb", "finish_reason": "length"}]
    )
    assert [reply.kind for reply in replies] == ["more", "more", "last"]


def test_a_beam_sends_what_all_its_hypotheses_share():
    a, b, c, d = (IDS[letter] for letter in "abcd")
    end, begin = TableModel.eos_id, TableModel.bos_id
    table = {begin: {a: 1}, a: {b: 0.6, c: 0.4}, b: {d: 1}, c: {d: 1}, d: {end: 1}}
    one = service(model=TableModel(table))
    live = [ask(1, "a", 9, beam_size=2, n_best=2, stream=True)]
    bodies = [one.round(live)[0] for _ in range(4)]
    assert bodies[0].body == OPEN  # "a", and something unlikely
    assert told(bodies[1]) == [(None, {"index": 0, "text": "a"})]  # "ab", "ac"
    assert bodies[2] is None  # "abd", "acd"
    (_, news), (_, answer) = told(bodies[3])
    assert news == {"index": 0, "text": "bd"}
    assert [one["text"] for one in answer["translations"][0]] == ["abd", "acd"]


def test_a_beam_sends_nothing_that_a_finished_hypothesis_has_not():
    a, b, c, d = (IDS[letter] for letter in "abcd")
    end, begin = TableModel.eos_id, TableModel.bos_id
    table = {
        begin: {a: 0.55, b: 0.45}, a: {end: 1}, b: {c: 0.5, d: 0.5}, c: {end: 1}, d: {end: 1}
    }
    one = service(model=TableModel(table))
    replies = transcript(one, ask(1, "a", 9, beam_size=2, n_best=2, stream=True))
    said, _, answer = gathered(replies)  # "a" has ended when both that live begin with "b"
    assert said == {0: "a"}
    assert answer["translations"][0][0]["text"] == "a"
    assert [told(reply) for reply in replies[:-1]] == [[]]


@pytest.mark.parametrize("text", ["é😀x", "가나", "a\u0301", "\U0010ffff\x80"])
def test_a_character_is_sent_when_all_its_bytes_are_there(text):
    model = Reciter(BYTES.encode(text))
    one = service(rows=1, model=model, source=BYTES, target=BYTES)
    replies = transcript(one, ask(1, "a", 24, stream=True))
    said, _, answer = gathered(replies)
    assert said == {0: text}
    news = [data["text"] for reply in replies for name, data in told(reply) if not name]
    assert news == list(text)
    assert answer["usage"]["target_tokens"] == len(BYTES.encode(text)) > len(text)


def test_a_broken_character_at_the_end_is_sent_at_the_end():
    tokens = BYTES.encode("a😀")[:-1]
    one = service(rows=1, model=Reciter(tokens), source=BYTES, target=BYTES)
    said, _, answer = gathered(transcript(one, ask(1, "a", 24, stream=True)))
    assert said == {0: BYTES.decode(tokens)} == {0: answer["translations"][0][0]["text"]}
    assert "\ufffd" in said[0]


def test_sentences_of_a_paragraph_are_sent_in_their_order():
    """"b" is long ready when "a" ends, and its line break goes out with it."""
    one = service(rows=2)
    others = [ask("other", "f", 19)]
    replies = transcript(one, ask(1, "\na\n\nb\n", 3, stream=True), others)
    said, _, answer = gathered(replies)
    assert said == {0: "\naaa\n\nbbb\n"} == {0: answer["translations"][0][0]["text"]}


def test_a_stream_opens_at_once_even_where_nothing_is_decided():
    one = service(rows=1)
    long, stream = ask("long", "a", 5), ask("stream", "b", 2, stream=True)
    assert one.round([long]) == [None]
    none, reply = one.round([long, stream])
    assert none is None
    assert reply == Reply(200, EVENTS, OPEN, "more")
    for _ in range(2):
        assert one.round([long, stream]) == [None, None]
    assert texts(one.round([long, stream])[0]) == ["aaaaa"]
    said, name, _ = gathered(transcript(one, stream))
    assert (said, name) == ({0: "bb"}, "answer")


def test_a_stream_that_ends_in_its_first_round_is_one_whole_reply():
    """TorchServe would wait for ever for more of a stream whose first part is its last."""
    one = service(round_ms=1e3)
    (reply,) = one.round([ask(1, ["a", "b"], 3, stream=True)])
    assert reply.kind == "whole"
    said, name, _ = gathered([reply])
    assert (said, name) == ({0: "aaa", 1: "bbb"}, "answer")
    assert left_nothing(one)


def test_an_error_before_a_stream_opens_has_its_status():
    one = service()
    assert error(one.round([ask(1, "gab", stream=True)])[0]) == (500, "DecodingFailed")
    assert error(one.round([ask(2, "abcdefab", stream=True)])[0]) == (413, "TextTooLong")
    assert error(one.round([ask(3, "a", beam_size=9, stream=True)])[0]) == (400, "InvalidOption")
    assert left_nothing(one)


def test_an_error_within_a_stream_is_its_last_event():
    one = service(max_response_bytes=1000)
    for asked, expected in (
        (ask(1, ["a"] * 5 + ["gab"], 3, stream=True), (500, "DecodingFailed")),
        (ask(2, ["a"] * 30, 3, stream=True), (413, "AnswerTooLong")),
    ):
        replies = transcript(one, asked)
        said, name, last = gathered(replies)
        assert name == "error"
        assert list(last) == ["code", "type", "message"]
        assert (last["code"], last["type"]) == expected
        assert said[0].startswith("a")
        assert replies[-1].kind == "last"
        assert left_nothing(one)


def test_an_error_of_the_engine_is_the_last_event_of_its_streams(monkeypatch, caplog):
    one = service()
    live = [ask(1, "a", 9, stream=True), ask(2, "b", 9, stream=True)]
    assert [reply.kind for reply in one.round(live)] == ["more", "more"]

    def fail(*_):
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(one.engine, "advance", fail)
        replies = one.round(live)
    for reply in replies:
        assert reply.kind == "last"
        assert gathered([reply])[1] == "error"
        assert "secret" not in reply.body
    assert "secret" in caplog.text
    assert left_nothing(one)


@pytest.mark.parametrize("opened", [True, False])
def test_a_failing_tokenizer_ends_its_stream_alone(opened, caplog):
    class Failing:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def decode(self, ids):
            if TOKENIZER.decode(ids) == ("ee" if opened else "e"):
                raise KeyError("secret")
            return TOKENIZER.decode(ids)

    one = service(target=Failing())
    bad, good = ask("bad", "e", 9, stream=True), ask("good", "a", 9, stream=True)
    first = one.round([bad, good])
    assert first[0].kind == ("more" if opened else "whole")
    last = one.round([bad, good])[0] if opened else first[0]
    kind = gathered([last])[2]["type"] if opened else error(last)[1]
    assert kind == "InternalError"
    assert "secret" in caplog.text
    assert "secret" not in last.body
    assert one.engine.rows_in_use == 1
    said, _, _ = gathered(transcript(one, good))
    assert "aaaaaaaaa".endswith(said[0])
    assert left_nothing(one)


@pytest.mark.parametrize("opened", [0, 1, 5])
def test_streams_that_vanish_free_their_rows_at_once(opened):
    one = service(rows=2)
    gone = [ask(i, ["a", "b", "c"], 19, stream=True) for i in range(3)]
    stays = ask("stays", "d", 2)
    for _ in range(opened):
        one.round(gone)
    before = one.engine.model.rows_computed
    assert one.round([stays]) == [None]
    assert one.engine.model.rows_computed == before + 1
    assert one.engine.rows_in_use == 1
    assert list(one.pending) == ["stays"]
    assert texts(one.round([stays])[0]) == ["dd"]
    assert left_nothing(one)


# Everything at once


@dataclass
class Client:
    """A request that arrives at one round and may leave at another. `expected`: texts, or status
    and type of an error."""

    incoming: Incoming
    expected: object
    arrives: int
    leaves: int
    said: dict[int, str] = field(default_factory=dict)

    def hears(self, reply: Reply) -> bool:
        """Whether its answer is complete, which it then checks."""
        if reply.content_type == EVENTS:
            for name, data in told(reply):
                if name is None:
                    self.said[data["index"]] = self.said.get(data["index"], "") + data["text"]
                elif name == "answer":
                    found = [one[0]["text"] for one in data["translations"]]
                    assert [self.said.get(i, "") for i in range(len(found))] == found
                    self.accepts(found, data["translations"])
                else:
                    assert (data["code"], data["type"]) == self.expected
            return reply.kind != "more"
        if reply.status != 200:
            body = json.loads(reply.body)
            assert (body["code"], body["type"]) == self.expected
        elif reply.content_type == JSON:
            body = json.loads(reply.body)
            if "outputs" in body:
                assert body["id"] == self.incoming.id
                assert body["outputs"][0]["data"] == self.expected
            else:
                found = body.get("translations") or body["predictions"]
                self.accepts([one[0]["text"] for one in found], found)
        else:
            assert reply.body == "".join(f"{one}\n" for one in self.expected)
        return True

    def accepts(self, found: list[str], translations: list) -> None:
        if any(one[0]["finish_reason"] == "time" for one in translations):
            for got, whole in zip(found, self.expected):  # the beginning of each of its lines
                for line, full in zip(got.split("\n"), whole.split("\n")):
                    assert full.startswith(line)
        else:
            assert found == self.expected


def spoken(lines: list[str], length: int, prefix: str = "") -> str:
    """What Echo answers to a paragraph of letters."""
    led = 1 + len(prefix) if prefix else 0  # a space is a piece
    first, *rest = lines
    return "\n".join([prefix + first * (length - led), *(line * length for line in rest)])


@st.composite
def client(draw, number: int) -> Client:
    arrives = draw(st.integers(0, 12))
    leaves = arrives + draw(st.just(10**6) | st.integers(1, 6))
    letters = st.sampled_from(LETTERS[:-1])
    given = draw(st.lists(st.lists(letters, min_size=1, max_size=3), min_size=1, max_size=4))
    length, name = draw(st.integers(1, 19)), str(number)
    door = draw(st.sampled_from(["native", "stream", "v1", "v2", "text", "bad"]))
    if door == "bad":
        one, expected = draw(st.sampled_from(BAD))
        return Client(Incoming(name, *list(vars(one).values())[1:]), expected, arrives, leaves)
    if door == "text":
        lines = [line for lines in given for line in lines][:8]
        body = "".join(f"{line}\n" for line in lines)
        return Client(Incoming(name, "", TEXT, body), [a * 19 for a in lines], arrives, leaves)
    beam = draw(st.integers(1, 6))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "beam_size": st.just(beam),
                "prefix": st.sampled_from(["b", "cd"]),
                "max_time": st.sampled_from([0.003, 3600]),
                "length_penalty": st.sampled_from([0.0, 1.0]),
                "return_scores": st.booleans(),
                "return_tokens": st.booleans(),
            },
        )
    )
    if beam > 1 and "beam_size" in options:
        options["n_best"] = draw(st.integers(1, beam))
    options["max_length"] = length
    texts = ["\n".join(lines) for lines in given]
    expected: object = [spoken(one, length, options.get("prefix", "")) for one in given]
    if len(options.get("prefix", "")) + 1 > length and "prefix" in options:
        expected = (400, "InvalidOption")
    if door in ("native", "stream"):
        body = {"text": texts, **options, "stream": door == "stream"}
    elif door == "v1":
        body = {"instances": texts, "parameters": options}
    else:
        options.pop("max_time", None)  # its tensors are compared whole
        options["n_best"] = 1
        tensor = {"name": "x", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
        body = {"id": name, "inputs": [tensor], "parameters": options}
    return Client(Incoming(name, "", JSON, body), expected, arrives, leaves)


@st.composite
def clients(draw) -> list[Client]:
    return [draw(client(i)) for i in range(draw(st.integers(0, 10)))]


@settings(max_examples=150)
@given(clients(), st.integers(6, 9), st.integers(1, 40))
def test_nothing_is_left_whoever_comes_and_goes(everybody, rows, round_ms):
    model = Echo()
    one = service(
        rows, model, Clock(model), max_texts=8, max_waiting=10**6, round_ms=float(round_ms)
    )
    answered: set[str] = set()
    for now in range(2000):
        live = [
            c for c in everybody if c.arrives <= now < c.leaves and c.incoming.id not in answered
        ]
        for each, reply in zip(live, one.round([c.incoming for c in live])):
            if reply is not None and each.hears(reply):
                answered.add(each.incoming.id)
        held = {id(p) for p in one.pending.values()}
        assert {id(p) for p, *_ in one.owner.values()} <= held
        assert set(one.pending) <= {c.incoming.id for c in live} - answered
        assert one.engine.rows_in_use <= rows
        if not live and now > 12:
            break
    assert {c.incoming.id for c in everybody if c.leaves >= 10**6} <= answered
    assert left_nothing(one)


def test_no_other_door_streams():
    assert [one.__name__ for one in Door.__subclasses__() if one.streams] == ["Native"]
