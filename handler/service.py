"""The service itself, one round at a time, knowing nothing of TorchServe.

TorchServe calls again and again with every request that is live; each call is one `round` here:
new requests are admitted, vanished ones cancelled, a few steps decoded, finished ones answered.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from handler.decoding import Engine, Event, Result
from handler.decoding.options import DecodingOptions
from handler.request import JSON, TEXT, Refusal, TranslationRequest, parse, place
from handler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """The section `handler` of model-config.yaml.

    rows: hypotheses decoded together; the memory of decoding grows with it.
    steps_per_call: decoding steps between two looks at new requests. A call costs about 2 ms of
        frontend time whatever it does, so 8 steps bring that to 0.25 ms a token, and a newcomer
        waits for 8 steps at most.
    max_texts: texts in one request.
    max_response_bytes: stays below TorchServe's max_response_size (6,553,500), beyond which the
        frontend kills the worker.
    threads: of torch on a CPU; null for one for each CPU this process may use.
    require_gpu: refuse to start on a CPU, where falling back would go unnoticed.
    """

    rows: int = field(default=64, metadata={"minimum": 1, "maximum": 65536})
    steps_per_call: int = field(default=8, metadata={"minimum": 1, "maximum": 1024})
    max_texts: int = field(default=1024, metadata={"minimum": 1})
    max_response_bytes: int = field(default=6_000_000, metadata={"minimum": 1000})
    threads: int | None = field(default=None, metadata={"minimum": 1})
    require_gpu: bool = False


@dataclass(frozen=True)
class Incoming:
    """One live request of a round. `body` is None once TorchServe has stopped repeating it."""

    id: str
    path: str
    content_type: str | None
    body: object


@dataclass(frozen=True)
class Reply:
    status: int
    content_type: str
    body: str


@dataclass
class Pending:
    """A request between its admission and its answer."""

    request: TranslationRequest
    sentences: list[int | None] = field(default_factory=list)  # engine's ids; None for blank
    source_tokens: int = 0
    ended: dict[int, Event] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.ended) == sum(s is not None for s in self.sentences)


class Service:
    """Translates for many clients at once.

    Args:
        name, version: of the model, told in every answer.
    """

    def __init__(
        self,
        engine: Engine,
        source: Tokenizer,
        target: Tokenizer,
        name: str,
        version: str,
        options: ServiceOptions = ServiceOptions(),
    ) -> None:
        self.engine = engine
        self.source = source
        self.target = target
        self.model = {"name": name, "version": version}
        self.options = options
        self.pending: dict[str, Pending] = {}
        self.owner: dict[int, Pending] = {}  # request of each sentence

    def round(self, live: list[Incoming]) -> list[Reply | None]:
        """One reply for each live request; None where it is not finished.

        Never raises: an exception would reset every other client's request.
        """
        ids = {one.id for one in live}
        for gone in [key for key in self.pending if key not in ids]:
            self.forget(self.pending.pop(gone))
        replies: dict[str, Reply] = {}
        for one in live:
            if one.id not in self.pending:
                reply = self.begin(one)
                if reply is not None:
                    replies[one.id] = reply
        for step in range(self.options.steps_per_call):
            # One step at least: clients that are answered at once must not hold up the others.
            if self.engine.idle or (step and replies):
                break
            for event in self.engine.advance():
                pending = self.owner.pop(event.sentence)
                pending.ended[event.sentence] = event
            replies |= {key: self.answer(p) for key, p in self.pending.items() if p.complete}
        for key in replies:
            self.pending.pop(key, None)
        return [replies.get(one.id) for one in live]

    def begin(self, one: Incoming) -> Reply | None:
        """Admit a new request; a reply at once where it needs no decoding."""
        try:
            if one.path:
                return self.describe(one.path)
            request = parse(one.content_type, one.body, self.options.max_texts)
            self.pending[one.id] = self.admitted(request)
        except Refusal as refusal:
            return Reply(refusal.status, JSON, refusal.body())
        except Exception:
            logger.exception("a request could not be admitted")
            return internal_error()
        return None

    def describe(self, path: str) -> Reply:
        if path == "card":
            return Reply(200, JSON, self.engine.model.card)
        raise Refusal(404, "NotFound", f"path: got {path!r}; allowed: 'card', or none to translate")

    def admitted(self, request: TranslationRequest) -> Pending:
        """All sentences of a request in the engine's queue; none of them where one is refused."""
        sources = [self.tokens(i, request) for i in range(len(request.texts))]
        pending = Pending(request)
        for tokens in sources:
            try:
                sentence = self.engine.admit(tokens, request.options) if tokens else None
            except ValueError as error:  # of the options, so of the first sentence or of none
                raise Refusal(400, "InvalidOption", str(error)) from None
            pending.sentences.append(sentence)
            pending.source_tokens += len(tokens)
            if sentence is not None:
                self.owner[sentence] = pending
        return pending

    def tokens(self, i: int, request: TranslationRequest) -> list[int]:
        """Ids of text `i` with EOS; none for a blank line of plain text."""
        text = request.texts[i]
        if not text.strip():
            return []
        where = place(request.texts, i)
        tokens = self.source.encode(text)
        if not tokens:
            raise Refusal(
                400, "EmptyText", f"{where}: nothing is left of it once control characters are "
                "dropped; allowed: text with at least one visible character",
            )
        limit = self.engine.model.max_source_length
        if len(tokens) + 1 > limit:
            raise Refusal(
                413, "TextTooLong", f"{where}: got {len(text)} characters, {len(tokens)} tokens; "
                f"allowed: at most {limit - 1} tokens; send shorter sentences, one text each",
            )
        return [*tokens, self.engine.model.eos_id]

    def answer(self, pending: Pending) -> Reply:
        """The reply to a request whose sentences have all ended."""
        try:
            for event in pending.ended.values():
                if event.error is not None:
                    raise Refusal(500, "DecodingFailed", event.error)
            reply = self.translations(pending)
        except Refusal as refusal:
            return Reply(refusal.status, JSON, refusal.body())
        except Exception:
            logger.exception("a reply could not be built")
            return internal_error()
        size, most = len(reply.body.encode()), self.options.max_response_bytes
        if size > most:
            message = f"the answer has {size} bytes; allowed: {most}; send fewer texts"
            return Reply(413, JSON, Refusal(413, "AnswerTooLong", message).body())
        return reply

    def translations(self, pending: Pending) -> Reply:
        answers: list[list[dict[str, Any]]] = []
        target_tokens = 0
        for sentence in pending.sentences:
            if sentence is None:
                answers.append([{"text": "", "finish_reason": "eos"}])
                continue
            results = pending.ended[sentence].results
            target_tokens += sum(len(r.tokens) for r in results)
            answers.append([self.told(one, pending.request.options) for one in results])
        if pending.request.content_type == TEXT:
            lines = (one[0]["text"].replace("\n", " ") + "\n" for one in answers)
            return Reply(200, f"{TEXT}; charset=utf-8", "".join(lines))
        usage = {"source_tokens": pending.source_tokens, "target_tokens": target_tokens}
        body = {"translations": answers, "model": self.model, "usage": usage}
        return Reply(200, JSON, json.dumps(body, ensure_ascii=False))

    def told(self, result: Result, options: DecodingOptions) -> dict[str, Any]:
        """One hypothesis as its client asked to see it."""
        told: dict[str, Any] = {"text": self.target.decode(result.tokens)}
        if options.return_scores:
            told["score"] = round(result.score, 4)
        if options.return_tokens:
            told["tokens"] = self.target.pieces(result.tokens)
        return {**told, "finish_reason": result.finish_reason}

    def forget(self, pending: Pending) -> None:
        """A client is gone: free what it held."""
        for sentence in pending.sentences:
            if sentence is not None and self.owner.pop(sentence, None) is not None:
                self.engine.cancel(sentence)

    def warm_up(self) -> None:
        """Decode a little, so that the first client does not pay for lazy initialisation."""
        for length in (1, min(32, self.engine.model.max_source_length)):
            self.engine.admit([self.engine.model.eos_id] * length, DecodingOptions(max_length=4))
        while not self.engine.idle:
            self.engine.advance()


def internal_error() -> Reply:
    message = "the service failed on this request; its log says why"
    return Reply(500, JSON, Refusal(500, "InternalError", message).body())
