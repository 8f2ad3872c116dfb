"""The service itself, one round at a time, knowing nothing of TorchServe.

TorchServe calls again and again with every request that is live; each call is one `round` here:
vanished requests are cancelled, new ones let in, a few steps decoded, streams continued and
finished requests answered. What may take long, a large request or its answer, is done a piece at a
time, so that a round takes `round_ms` for decoding, and at most as long again for requests and for
answers; parsing a body is one piece, and so is sending an answer whose parts have been written.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from handler.admission import Admission, Pending
from handler.admission import Incoming as Incoming  # what `round` takes
from handler.answer import Narrator, event
from handler.decoding import Engine, Event
from handler.decoding.engine import STEPS
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import NO_TOKEN, failed
from handler.doors import Door
from handler.metrics import STEP_BUCKETS, WAIT_BUCKETS, Metrics
from handler.pieces import SLICE, Pieces, Work
from handler.request import JSON, Refusal, RequestOptions, door_of, parse
from handler.schema import schema
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"
LEFT = "ClientLeft"
PART = 0.25  # of a round at most, for admissions that need several turns; and so for answers
HALF = 0.5  # of a round at most, for those that need one; and so for what streams are told


@dataclass(frozen=True)
class Reply:
    """`kind`: a whole response; or a part of a stream, after which there is more or not."""

    status: int
    content_type: str
    body: str
    kind: Literal["whole", "more", "last"] = "whole"
    failed: bool = False
    retry_after: int | None = None  # seconds


class Service:
    """Translates for many clients at once.

    A request is known from its arrival to its end. First it is one of `arrivals`; it is pending
    when all of it has been checked; while any of its texts is whole and has not been told, it is
    one of `answers`; when all have been told, it is `ready`. `finish` and `forget` are its only
    ends: it was answered, or its client has left.

    Args:
        name, version: of the model, told in every answer.
        clock: seconds; the engine's.
        serving: how the model is served, told beside its card.
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
        serving: Mapping[str, object] | None = None,
    ) -> None:
        self.engine = engine
        self.serving = serving
        self.narrator = Narrator(source, target, {"name": name, "version": version})
        self.options = options
        self.clock = clock
        self.metrics = Metrics()
        self.admission = Admission(engine, self.narrator, options)
        self.arrivals, self.answers = Pieces(clock), Pieces(clock)
        self.known: dict[str, Incoming] = {}
        self.pending: dict[str, Pending] = {}
        # Of each sentence that has not ended: its request, its text, and its place in that.
        self.owner: dict[int, tuple[Pending, int, int]] = {}
        self.unbegun: dict[str, Pending] = {}  # requests without a first token
        self.streams: dict[str, Pending] = {}  # who waits longest first
        self.ready: dict[str, Pending] = {}  # that wait for their answer to be sent
        self.replies: dict[str, Reply] = {}  # of this round
        self.figures = self.counted()

    def round(self, live: list[Incoming]) -> list[Reply | None]:
        """One reply for each live request; None where there is nothing to tell yet.

        Never raises: an exception would reset every other client's request.
        """
        try:
            self.work(live)
            self.figures = self.counted()
        except Exception:  # all that is foreseen is handled where it concerns less
            logger.exception("a round failed")
            self.fail_all(live)
        replies, self.replies = self.replies, {}
        for key, reply in replies.items():
            if reply.kind == "more":
                stream = self.pending[key].stream
                assert stream is not None
                stream.opened = True
        return [replies.get(one.id) for one in live]

    def work(self, live: list[Incoming]) -> None:
        started = self.clock()
        for gone in self.known.keys() - {one.id for one in live}:
            self.forget(gone)
            self.metrics.count("cancellations_total")
        for one in live:
            if one.id not in self.known and one.id not in self.replies:
                self.begin(one, started)
        length = self.options.round_ms / 1000
        until = started + length
        # What is new and small is let in before the first step, and answered after the last.
        most, part = max(HALF * length, SLICE), max(PART * length, SLICE)
        self.arrivals.advance(started + most, started + part)
        while True:
            if not self.engine.idle:
                self.step(until)
            elif self.arrivals:
                self.arrivals.advance(until, self.clock())
            elif self.answers:
                self.answers.advance(until, until)
            else:
                break
            if self.clock() >= until:
                break
        now = self.clock()
        self.answers.advance(now + most, now + part)
        self.send()
        until = self.clock() + most
        for pending in list(self.streams.values()):
            self.streams[pending.id] = self.streams.pop(pending.id)
            self.continue_stream(pending, until)
            if self.clock() >= until:
                break

    def begin(self, one: Incoming, now: float) -> None:
        """Take note of a new request; what needs no decoding is answered at once."""
        self.known[one.id] = Incoming(one.id)
        try:
            if one.refusal is not None:
                raise one.refusal
            if one.path:
                self.finish(one.id, self.described(one.path))
            elif one.explain:
                message = "explanations are not offered; ask for predictions"
                raise Refusal(404, "NotFound", message).at(door_of(one.body)())
            else:
                self.arrivals.add(one.id, self.admitting(one, now))
        except Refusal as refusal:
            self.fail(one.id, refusal)
        except Exception:
            logger.exception("a request could not be read")
            self.fail(one.id, internal_error())

    def described(self, path: str) -> Reply:
        if path == "card":
            card = self.engine.model.card
            if self.serving is not None:
                serving = {**self.serving, "splitter": self.admission.splitter.name}
                card = json.dumps(json.loads(card) | {"serving": serving}, ensure_ascii=False)
            return Reply(200, JSON, card)
        if path == "schema":
            return Reply(200, JSON, json.dumps(schema(RequestOptions, self.options.max_texts)))
        raise Refusal(
            404, "NotFound", f"path: got {path!r}; allowed: 'card', 'schema', or none to translate"
        )

    def admitting(self, one: Incoming, now: float) -> Work[None]:
        """Bring a request into the engine: all of its sentences, or none where one is refused."""
        pending = None
        try:
            request = parse(one.content_type, one.body, self.options.max_texts)
            pending = Pending(one.id, one.client, request, now)
            yield
            yield from self.admission.check(pending)
            self.pending[one.id] = self.unbegun[one.id] = pending
            if pending.stream is not None:
                self.streams[one.id] = pending
            assert pending.answer is not None
            self.metrics.count("tokens_total", pending.answer.source_tokens, side="source")
            for index, text in enumerate(pending.parts):
                if not text.left:  # there is nothing to decode of it
                    self.note_whole(pending, index)
            for index, place, sentence in self.admission.enter(pending):
                self.owner[sentence] = pending, index, place
                yield
            self.note_complete(pending)
        except Refusal as refusal:
            self.fail(one.id, refusal.at(pending.request.door) if pending else refusal)
        except Exception:
            logger.exception("a request could not be admitted")
            error = internal_error()
            self.fail(one.id, error.at(pending.request.door) if pending else error)
        finally:
            if pending is not None:
                self.admission.release(pending)
                if not pending.admitted:
                    self.admission.forget(pending)

    def step(self, until: float) -> None:
        """A few tokens of every live sentence, while there is time."""
        before, made = self.clock(), self.engine.steps
        try:
            events = self.engine.advance(STEPS, until)
        except Exception as error:  # the engine minds its model's errors; this is one of its own
            logger.exception("decoding failed")
            events = self.stopped(error)
        now = self.clock()
        made = max(1, self.engine.steps - made)
        self.metrics.observe("step_seconds", (now - before) / made, STEP_BUCKETS, made)
        for sentence in self.engine.began:
            self.note_begun(sentence, now)
        for one in events:
            self.note_begun(one.sentence, now)
            self.note_ended(one)

    def stopped(self, error: Exception) -> list[Event]:
        """The end of all sentences, after a failure of the engine itself: what it had to tell is
        lost. A request that is on its way into the engine fails at once."""
        self.engine.clear()
        for pending in list(self.pending.values()):
            if not pending.admitted:
                told = f"decoding failed: {type(error).__name__}"
                self.fail(pending.id, Refusal(500, "DecodingFailed", told))
        return [failed(sentence, error) for sentence in self.owner]

    def note_begun(self, sentence: int, now: float) -> None:
        """There is a token for a sentence, or will never be; the first of a request is the first to
        begin."""
        pending, index, _ = self.owner.get(sentence, (None, 0, 0))
        if pending is None:
            return
        if sentence == pending.sentences[0]:
            self.note_first(pending, now)
        if pending.stream is not None:
            pending.stream.wake(index)

    def note_first(self, pending: Pending, now: float) -> None:
        if self.unbegun.pop(pending.id, None) is not None:
            self.metrics.observe("first_token_seconds", now - pending.arrived, WAIT_BUCKETS)

    def note_ended(self, one: Event) -> None:
        """Keep what a sentence has become; where it failed, its request has."""
        pending, index, place = self.owner.pop(one.sentence, (None, 0, 0))
        if pending is None or pending.answer is None:
            return
        if one.error is not None:
            none = one.error == NO_TOKEN
            status, kind = (400, "InvalidOption") if none else (500, "DecodingFailed")
            self.fail(pending.id, Refusal(status, kind, one.error))
            return
        part = pending.parts[index]
        part.end(place, one.results)
        pending.answer.target_tokens += sum(len(result.tokens) for result in one.results)
        if not part.left:
            self.note_whole(pending, index)
            self.note_complete(pending)

    def note_whole(self, pending: Pending, index: int) -> None:
        """A text can be told."""
        pending.left -= 1
        pending.whole.append(index)
        if pending.id not in self.answers:
            self.answers.add(pending.id, self.answering(pending))

    def note_complete(self, pending: Pending) -> None:
        """When all sentences of a request have ended, and all its texts are told, its answer is
        next."""
        if pending.admitted and not pending.left:
            self.note_first(pending, self.clock())  # one of no sentences has none to begin
            if not pending.whole:
                self.ready[pending.id] = pending

    def answering(self, pending: Pending) -> Work[None]:
        """Write what is told of texts whose sentences have all ended."""
        answer, stream = pending.answer, pending.stream
        assert answer is not None
        try:
            while pending.whole:
                index = pending.whole[0]
                while stream is not None and not stream.whole[index]:
                    stream.unsent.append(stream.news(index, self.engine))
                    yield
                yield from answer.tell(self.narrator, index, pending.parts[index])
                pending.whole.popleft()
            self.note_complete(pending)
        except Refusal as refusal:
            self.fail(pending.id, refusal)
        except Exception:
            logger.exception("an answer could not be built")
            self.fail(pending.id, internal_error())

    def send(self) -> None:
        """Answer requests that are ready; of long answers one in a round, as several at once would
        take several times the memory."""
        sent = 0
        for pending in list(self.ready.values()):
            assert pending.answer is not None
            size = pending.answer.size
            if sent and sent + size > self.options.max_response_bytes:
                break
            sent += size
            try:
                reply = self.last(pending)
            except Refusal as refusal:
                self.fail(pending.id, refusal)
            except Exception:
                logger.exception("an answer could not be sent")
                self.fail(pending.id, internal_error())
            else:
                self.finish(pending.id, reply)

    def last(self, pending: Pending) -> Reply:
        """The whole of an answer, or the end of a stream."""
        request, stream = pending.request, pending.stream
        assert pending.answer is not None
        body = pending.answer.body(self.narrator.model).decode()
        if stream is None:
            return Reply(200, request.door.content_type, body)
        news, stream.unsent = "".join(stream.unsent), []
        kind: Literal["whole", "last"] = "last" if stream.opened else "whole"
        return Reply(200, EVENTS, f"{news}{event(body, 'answer')}", kind)

    def continue_stream(self, pending: Pending, until: float) -> None:
        """Tell a stream what was decided since the last round; what there is no time for, in the
        next.

        The first part goes out at once, with nothing in it: TorchServe notices that a client has
        left only once its stream is open.
        """
        stream = pending.stream
        assert stream is not None
        try:
            for index in list(stream.awake):
                stream.unsent.append(stream.news(index, self.engine))
                stream.later(index)
                if self.clock() >= until:
                    break
        except Exception:
            logger.exception("a stream could not be continued")
            self.fail(pending.id, internal_error())
            return
        body, stream.unsent = "".join(stream.unsent), []
        if body or not stream.opened:
            self.replies[pending.id] = Reply(200, EVENTS, body or ": open\n\n", "more")

    def fail(self, key: str, refusal: Refusal) -> None:
        """End a request with an error."""
        if refusal.kind == LEFT:
            self.metrics.count("cancellations_total")
        elif key not in self.pending:
            self.metrics.count("refusals_total", reason=refusal.kind)
        self.finish(key, self.failure(key, refusal))

    def failure(self, key: str, refusal: Refusal) -> Reply:
        """An error; within a stream that is open, whose status has been sent, it is an event."""
        pending = self.pending.get(key)
        if pending is None:
            return refused(refusal, refusal.door)
        if pending.stream is not None and pending.stream.opened:
            told = event(json.dumps(refusal.told(), ensure_ascii=False), "error")
            return Reply(200, EVENTS, told, "last", failed=True)
        return refused(refusal, pending.request.door)

    def fail_all(self, live: list[Incoming]) -> None:
        """Begin anew: end all requests but those that have been answered in this round."""
        answered = {key for key, reply in self.replies.items() if reply.kind != "more"}
        lost = {one.id for one in live} - answered
        self.replies |= {key: self.failure(key, internal_error()) for key in lost}
        self.metrics.count("requests_total", len(lost), outcome="failed")
        for pending in self.pending.values():
            self.admission.forget(pending)
        for held in (
            self.known, self.pending, self.owner, self.unbegun, self.streams, self.ready
        ):
            held.clear()
        self.arrivals.clear()
        self.answers.clear()
        try:
            self.engine.clear()
        except Exception:  # what is left in it ends some time, and nobody is told
            logger.exception("the engine could not be cleared")
        self.figures = self.counted()

    def finish(self, key: str, reply: Reply) -> None:
        """Answer a request, and count it if it was admitted."""
        pending = self.pending.get(key)
        self.forget(key)
        self.replies[key] = reply
        if pending is not None:
            assert pending.answer is not None
            self.metrics.count("tokens_total", pending.answer.target_tokens, side="target")
            self.metrics.count("requests_total", outcome="failed" if reply.failed else "ok")
            seconds = self.clock() - pending.arrived
            self.metrics.observe("request_seconds", seconds, WAIT_BUCKETS)

    def forget(self, key: str) -> None:
        """A client is gone, or has its answer: free what is still held for it."""
        self.known.pop(key, None)
        self.arrivals.drop(key)
        self.answers.drop(key)
        pending = self.pending.pop(key, None)
        if pending is None:
            return
        self.unbegun.pop(key, None)
        self.streams.pop(key, None)
        self.ready.pop(key, None)
        self.admission.forget(pending)
        for sentence in pending.sentences:
            if self.owner.pop(sentence, None) is not None:
                self.engine.cancel(sentence)

    def leave(self, key: str) -> None:
        """A client has left, as the front says: its work ends now. TorchServe, which does not know,
        gets an answer that nobody reads."""
        if key in self.known:
            self.replies[key] = self.failure(key, departed())
            self.forget(key)
            self.metrics.count("cancellations_total")

    def gauges(self) -> dict[str, float]:
        """How full the service was after the last round; another thread may ask."""
        return self.figures

    def counted(self) -> dict[str, float]:
        live = len(self.pending) - len(self.unbegun)
        return {
            "rows_in_use": self.engine.rows_in_use,
            "row_capacity": self.engine.capacity,
            "live_requests": live,
            "pending_requests": len(self.known) - live,
            "waiting_sentences": self.admission.waiting_count,
        }

    def warm_up(self) -> None:
        """Decode a little, so that no client pays for lazy initialisation.

        Raises:
            RuntimeError: the model does not decode.
        """
        for length in (1, min(32, self.engine.model.max_source_length)):
            self.engine.admit([self.engine.model.eos_id] * length, DecodingOptions(max_length=4))
        while not self.engine.idle:
            for one in self.engine.advance():
                if one.error is not None:
                    raise RuntimeError(f"the model does not decode: {one.error}")
        gc.collect()
        gc.freeze()  # or each look at all that torch has made would stop everybody for 60 ms


def refused(refusal: Refusal, door: Door) -> Reply:
    """Errors are JSON at every door."""
    retry_after = 1 if refusal.status in (429, 503) else None
    body = door.refuse(refusal.told())
    return Reply(refusal.status, JSON, body, failed=True, retry_after=retry_after)


def departed() -> Refusal:
    return Refusal(408, LEFT, "the client has left")


def internal_error() -> Refusal:
    return Refusal(500, "InternalError", "the service failed on this request; its log says why")
