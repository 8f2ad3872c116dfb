"""The service itself, one round at a time, knowing nothing of TorchServe.

TorchServe calls again and again with every request that is live; each call is one `round` here:
new requests are admitted, vanished ones cancelled, a few steps decoded, finished ones answered and
streams continued.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from handler.answer import Narrator, Part, Stream, event, prefixed
from handler.decoding import Engine, Event
from handler.decoding.engine import STEPS, failed
from handler.decoding.options import DecodingOptions
from handler.doors import Door, Native
from handler.metrics import STEP_BUCKETS, WAIT_BUCKETS, Metrics
from handler.request import (
    JSON,
    Refusal,
    RequestOptions,
    TranslationRequest,
    door_of,
    parse,
    place,
)
from handler.schema import schema
from handler.sentences import Segment, split
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Incoming:
    """One live request of a round; of one that is pending the id is enough."""

    id: str
    path: str = ""
    content_type: str | None = None
    body: object = None
    explain: bool = False
    refusal: Refusal | None = None  # of a client that may not ask


@dataclass(frozen=True)
class Reply:
    """`kind`: a whole response; or a part of a stream, after which there is more or not."""

    status: int
    content_type: str
    body: str
    kind: Literal["whole", "more", "last"] = "whole"
    failed: bool = False
    retry_after: int | None = None  # seconds


@dataclass
class Pending:
    """A request between its admission and its answer."""

    request: TranslationRequest
    arrived: float
    parts: list[Part]
    stream: Stream | None
    sentences: list[int]  # the engine's, of all parts
    ended: dict[int, Event] = field(default_factory=dict)
    waits: bool = True  # for its first token

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.sentences)


class Service:
    """Translates for many clients at once.

    Args:
        name, version: of the model, told in every answer.
        clock: seconds; the engine's.
    """

    def __init__(
        self,
        engine: Engine,
        source: Tokenizer,
        target: Tokenizer,
        name: str,
        version: str,
        options: ServiceOptions = ServiceOptions(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.source = source
        self.target = target
        self.narrator = Narrator(source, target, {"name": name, "version": version})
        self.options = options
        self.clock = clock
        self.metrics = Metrics()
        self.pending: dict[str, Pending] = {}
        self.owner: dict[int, Pending] = {}  # request of each sentence

    def round(self, live: list[Incoming]) -> list[Reply | None]:
        """One reply for each live request; None where there is nothing to tell yet.

        Never raises: an exception would reset every other client's request.
        """
        started = self.clock()
        ids = {one.id for one in live}
        for gone in [key for key in self.pending if key not in ids]:
            self.forget(self.pending.pop(gone))
            self.metrics.count("cancellations_total")
        replies: dict[str, Reply] = {}
        for one in live:
            if one.id not in self.pending:
                reply = self.begin(one, started)
                if reply is not None:
                    replies[one.id] = reply
        until = started + self.options.round_ms / 1000
        while not self.engine.idle:
            self.step(until)
            if self.clock() >= until:
                break
        for key, pending in self.pending.items():
            reply = self.told(pending)
            if reply is not None:
                replies[key] = reply
        for key, reply in replies.items():
            if reply.kind != "more":
                self.settle(self.pending.pop(key, None), reply)
        return [replies.get(one.id) for one in live]

    def step(self, until: float) -> None:
        """A few tokens of every live sentence, while there is time."""
        before, made = self.clock(), self.engine.steps
        try:
            events = self.engine.advance(STEPS, until)
        except Exception as error:  # the engine minds its model's errors; this is one of its own
            logger.exception("decoding failed")
            self.engine.clear()
            events = [failed(sentence, error) for sentence in self.owner]
        now = self.clock()
        made = max(1, self.engine.steps - made)
        self.metrics.observe("step_seconds", (now - before) / made, STEP_BUCKETS, made)
        for one in events:
            pending = self.owner.pop(one.sentence)
            pending.ended[one.sentence] = one
        for pending in self.pending.values():
            if pending.waits and self.has_begun(pending):
                pending.waits = False
                self.metrics.observe("first_token_seconds", now - pending.arrived, WAIT_BUCKETS)

    def has_begun(self, pending: Pending) -> bool:
        """Whether there is a token for the first of its sentences, which is the first to begin."""
        first = pending.sentences[:1]
        return not first or first[0] in pending.ended or self.engine.begun(first[0])

    def begin(self, one: Incoming, now: float) -> Reply | None:
        """Admit a new request; a reply at once where it needs no decoding."""
        door = None
        try:
            if one.refusal is not None:
                raise one.refusal
            if one.path:
                return self.describe(one.path)
            if one.explain:
                door = door_of(one.body)()
                raise Refusal(404, "NotFound", "explanations are not offered; ask for predictions")
            request = parse(one.content_type, one.body, self.options.max_texts)
            door = request.door
            self.pending[one.id] = self.admitted(request, now)
        except Refusal as refusal:
            self.metrics.count("refusals_total", reason=refusal.kind)
            return refused(refusal, door or refusal.door)
        except Exception:
            logger.exception("a request could not be admitted")
            return refused(internal_error(), door or Native())
        return None

    def describe(self, path: str) -> Reply:
        if path == "card":
            return Reply(200, JSON, self.engine.model.card)
        if path == "schema":
            return Reply(200, JSON, json.dumps(schema(RequestOptions, self.options.max_texts)))
        raise Refusal(
            404, "NotFound", f"path: got {path!r}; allowed: 'card', 'schema', or none to translate"
        )

    def admitted(self, request: TranslationRequest, now: float) -> Pending:
        """All sentences of a request in the engine's queue; none of them where one is refused."""
        texts = [split(t) if request.options.split else [Segment(t, "")] for t in request.texts]
        count = sum(len(one) for one in texts)
        if count > self.options.max_sentences:
            raise Refusal(
                413, "TooManySentences",
                f"text: got {count} sentences; allowed: at most {self.options.max_sentences} in a "
                "request; send them in several",
            )
        if self.engine.waiting_count + count > self.options.max_waiting:
            raise Refusal(
                503, "Overloaded",
                f"{self.engine.waiting_count} sentences wait already; try again later",
            )
        sources = [self.tokens(i, segments, request) for i, segments in enumerate(texts)]
        prefix = self.prefix(request.options)
        deadline = None if request.options.max_time is None else now + request.options.max_time
        try:  # all before any is admitted
            for ids in filter(None, itertools.chain(*sources)):
                self.engine.check(ids, request.options, len(prefix))
        except ValueError as error:
            raise Refusal(400, "InvalidOption", str(error)) from None
        behind = itertools.count()
        parts = [
            Part(
                segments,
                [
                    self.engine.admit(ids, request.options, begun, deadline, next(behind))
                    if ids
                    else None
                    for ids, begun in prefixed(of_text, prefix)
                ],
                of_text,
            )
            for segments, of_text in zip(texts, sources)
        ]
        sentences = [one for part in parts for one in part.sentences if one is not None]
        stream = Stream(self.narrator, parts) if request.options.stream else None
        pending = Pending(request, now, parts, stream, sentences)
        self.owner |= dict.fromkeys(sentences, pending)
        self.metrics.count(
            "tokens_total", sum(map(len, itertools.chain(*sources))), side="source"
        )
        return pending

    def tokens(
        self, i: int, segments: list[Segment], request: TranslationRequest
    ) -> list[list[int]]:
        """Ids, with EOS, of each segment of text `i` that has words; none for one of which nothing
        is left. A blank line of plain text has none at all."""
        where = place(request.texts, i)
        limit = self.engine.model.max_source_length
        found: list[list[int]] = []
        for segment in segments:
            if not segment.text.strip():
                continue
            tokens = self.source.encode(segment.text)
            if len(tokens) + 1 > limit:
                raise Refusal(
                    413, "TextTooLong",
                    f"{where}: got a sentence of {len(segment.text)} characters, {len(tokens)} "
                    f"tokens; allowed: at most {limit - 1} tokens; send shorter sentences",
                )
            found.append([*tokens, self.engine.model.eos_id] if tokens else [])
        if found and not any(found):
            raise Refusal(
                400, "EmptyText", f"{where}: nothing is left of it once control characters are "
                "dropped; allowed: text with at least one visible character",
            )
        return found

    def prefix(self, options: RequestOptions) -> list[int]:
        """Target ids of the prefix."""
        try:
            tokens = self.target.encode(options.prefix or "")
        except ValueError as error:
            raise Refusal(400, "InvalidOption", f"prefix: {error}") from None
        if Tokenizer.UNK in tokens:
            raise Refusal(
                400, "InvalidOption",
                f"prefix: got {options.prefix!r:.60}; allowed: characters that the model can write",
            )
        return tokens

    def told(self, pending: Pending) -> Reply | None:
        """What a request's client is told in this round."""
        try:
            if pending.complete:
                return self.last(pending)
            return self.more(pending) if pending.stream is not None else None
        except Exception:
            logger.exception("a reply could not be built")
            return self.failed(pending, internal_error())

    def last(self, pending: Pending) -> Reply:
        """The answer to a request whose sentences have all ended."""
        request, stream = pending.request, pending.stream
        try:
            answer = self.narrator.answer(request, pending.parts, pending.ended)
            if stream is None:
                body, content_type = request.door.leave(answer), request.door.content_type
            else:
                news = stream.news(pending.ended, self.engine.committed)
                body, content_type = "".join(news) + event(answer, "answer"), EVENTS
            size, most = len(body.encode()), self.options.max_response_bytes
            if size > most:
                message = f"the answer has {size} bytes; allowed: {most}; send fewer texts"
                raise Refusal(413, "AnswerTooLong", message)
        except Refusal as refusal:
            return self.failed(pending, refusal)
        kind: Literal["whole", "last"] = "last" if stream and stream.opened else "whole"
        return Reply(200, content_type, body, kind)

    def more(self, pending: Pending) -> Reply | None:
        """What was decided for a stream since the last round.

        The first part goes out at once, with nothing in it: TorchServe notices that a client has
        left only once its stream is open.
        """
        stream = pending.stream
        assert stream is not None
        body = "".join(stream.news(pending.ended, self.engine.committed))
        if not body and stream.opened:
            return None
        stream.opened = True
        return Reply(200, EVENTS, body or ": open\n\n", "more")

    def failed(self, pending: Pending, refusal: Refusal) -> Reply:
        """An error; within a stream that is open, whose status has been sent, it is an event."""
        self.forget(pending)
        if pending.stream is not None and pending.stream.opened:
            return Reply(200, EVENTS, event(refusal.told(), "error"), "last", failed=True)
        return refused(refusal, pending.request.door)

    def settle(self, pending: Pending | None, reply: Reply) -> None:
        """Count a request that has been answered."""
        if pending is None:
            return
        written = sum(len(r.tokens) for e in pending.ended.values() for r in e.results)
        self.metrics.count("tokens_total", written, side="target")
        self.metrics.count("requests_total", outcome="failed" if reply.failed else "ok")
        seconds = self.clock() - pending.arrived
        self.metrics.observe("request_seconds", seconds, WAIT_BUCKETS)

    def forget(self, pending: Pending) -> None:
        """A client is gone, or has its answer: free what is still held for it."""
        for sentence in pending.sentences:
            if self.owner.pop(sentence, None) is not None:
                self.engine.cancel(sentence)

    def gauges(self) -> dict[str, float]:
        """How full the service is; may be read by another thread."""
        pending = list(self.pending.values())
        return {
            "rows_in_use": self.engine.rows_in_use,
            "row_capacity": self.engine.capacity,
            "live_requests": sum(not one.waits for one in pending),
            "pending_requests": sum(one.waits for one in pending),
            "waiting_sentences": self.engine.waiting_count,
        }

    def warm_up(self) -> None:
        """Decode a little, so that the first client does not pay for lazy initialisation."""
        for length in (1, min(32, self.engine.model.max_source_length)):
            self.engine.admit([self.engine.model.eos_id] * length, DecodingOptions(max_length=4))
        while not self.engine.idle:
            self.engine.advance()


def refused(refusal: Refusal, door: Door) -> Reply:
    """Errors are JSON at every door."""
    retry_after = 1 if refusal.status == 503 else None
    body = door.refuse(refusal.told())
    return Reply(refusal.status, JSON, body, failed=True, retry_after=retry_after)


def internal_error() -> Refusal:
    return Refusal(500, "InternalError", "the service failed on this request; its log says why")
