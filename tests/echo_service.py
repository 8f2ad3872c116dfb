"""A service over a model that says the first letter of its source again and again.

Texts are spelt with letters that are one piece each, so expected answers are written by hand.
"""

import json

from table_model import TableModel

from handler.decoding import Engine
from handler.request import JSON, TEXT
from handler.service import Incoming, Reply, Service
from handler.service_options import ServiceOptions
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
    rows=4, model=None, clock=None, source=TOKENIZER, target=TOKENIZER, **options
) -> Service:
    """Rounds of one step, unless `round_ms` is given. Without a clock time passes in decoding
    alone, so that each request is let in within one round, and answered within one."""
    model = model or Echo()
    clock = clock or Clock(model)
    engine = Engine(model, rows, clock=clock)
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
    held = (one.known, one.pending, one.owner, one.unbegun, one.streams, one.ready, one.replies)
    at_work = one.arrivals or one.answers or one.admission.reserved_of or one.admission.held
    counted = one.engine.scheduler.waiting_of or one.counted() != {
        **dict.fromkeys(one.counted(), 0), "row_capacity": one.engine.capacity,
    }
    return one.engine.idle and not any(held) and not at_work and not counted


class Clock:
    """Time that passes in decoding, a millisecond a row, and hardly elsewhere: a nanosecond
    whenever somebody looks."""

    def __init__(self, model):
        self.model, self.looks = model, 0

    def __call__(self):
        self.looks += 1
        return self.model.rows_computed / 1000 + self.looks * 1e-9


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
