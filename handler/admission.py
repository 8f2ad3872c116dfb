"""A request's way into the engine: read, split, tokenized, checked, and let in, a piece at a time.

Nothing of a request is in the engine before all of it has been checked. From the moment that it is
known how many its sentences are, they count as waiting.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from handler.answer import Narrator, Part, Stream, prefixed
from handler.authorization import ANYBODY, Client
from handler.decoding import Engine, Event
from handler.decoding.turns import Caller
from handler.pieces import Work
from handler.request import Refusal, RequestOptions, TranslationRequest, place
from handler.sentences import Segment, segments_of
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer


@dataclass(frozen=True)
class Incoming:
    """One live request of a round; of one that is known the id is enough."""

    id: str
    path: str = ""
    content_type: str | None = None
    body: object = None
    explain: bool = False
    refusal: Refusal | None = None  # of a client that may not ask
    client: Client = ANYBODY


@dataclass(eq=False)
class Pending:
    """A request between its arrival and its answer.

    parts: its texts, each with the engine's sentences as far as they have been let in.
    reserved: sentences that are to be let in; they count as waiting.
    admitted: whether all have been.
    """

    id: str
    client: Client
    request: TranslationRequest
    arrived: float
    prefix: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    stream: Stream | None = None
    reserved: int = 0
    admitted: bool = False
    sentences: list[int] = field(default_factory=list)  # the engine's, of all parts
    ended: dict[int, Event] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.admitted and len(self.ended) == len(self.sentences)


class Admission:
    """Lets requests in, and minds how many sentences wait.

    Args:
        narrator: knows the tokenizers.
    """

    def __init__(self, engine: Engine, narrator: Narrator, options: ServiceOptions) -> None:
        self.engine = engine
        self.narrator = narrator
        self.options = options
        self.reserved_of: Counter[str] = Counter()  # by client; see `Pending`

    @property
    def waiting_count(self) -> int:
        """Sentences that are not in rows yet, those on their way into the engine among them."""
        return self.engine.waiting_count + self.reserved_of.total()

    def check(self, pending: Pending) -> Work[None]:
        """Everything that a request may be refused for.

        Raises:
            Refusal: nothing of it is kept then.
        """
        request = pending.request
        texts: list[list[Segment]] = []
        for text in request.texts:
            texts.append([])
            for segment in segments_of(text) if request.options.split else [Segment(text, "")]:
                texts[-1].append(segment)
                yield
        self.reserve(pending, sum(map(len, texts)))
        for i, segments in enumerate(texts):
            sources: list[list[int]] = []
            for segment in segments:
                if segment.text.strip():
                    sources.append(self.tokens(segment.text, place(request.texts, i)))
                    yield
            if sources and not any(sources):
                raise Refusal(
                    400, "EmptyText",
                    f"{place(request.texts, i)}: nothing is left of it once control characters "
                    "are dropped; allowed: text with at least one visible character",
                )
            pending.parts.append(Part(segments, [], sources))
        pending.prefix = self.prefix(request.options)
        try:
            for ids in itertools.chain.from_iterable(part.sources for part in pending.parts):
                if ids:
                    self.engine.check(ids, request.options, len(pending.prefix))
                    yield
        except ValueError as error:
            raise Refusal(400, "InvalidOption", str(error)) from None
        if request.options.stream:
            pending.stream = Stream(self.narrator, pending.parts)

    def enter(self, pending: Pending) -> Iterator[int]:
        """Let the sentences in, one after the other; each one's id."""
        options, client = pending.request.options, pending.client
        caller = Caller(client.name, client.terms.share)
        deadline = None if options.max_time is None else pending.arrived + options.max_time
        for part in pending.parts:
            for ids, begun in prefixed(part.sources, pending.prefix):
                if not ids:
                    part.sentences.append(None)
                    continue
                behind, bulk = len(pending.sentences), options.priority == "bulk"
                one = self.engine.admit(ids, options, begun, deadline, behind, caller, bulk)
                self.release(pending, 1)
                part.sentences.append(one)
                pending.sentences.append(one)
                yield one
        pending.admitted = True

    def reserve(self, pending: Pending, count: int) -> None:
        """Have so many sentences count as waiting.

        Raises:
            Refusal: they are too many for one request, for its client, or for the service.
        """
        if count > self.options.max_sentences:
            raise Refusal(
                413, "TooManySentences",
                f"text: got {count} sentences; allowed: at most {self.options.max_sentences} in a "
                "request; send them in several",
            )
        name, most = pending.client.name, pending.client.terms.most_waiting
        waiting = self.engine.waiting_of(name) + self.reserved_of[name]
        if most is not None and waiting + count > most:
            raise Refusal(
                429, "TooManyWaiting",
                f"text: got {count} sentences, and {waiting} of this token wait already; allowed "
                f"with this token: {most} together; send fewer, or try again later",
            )
        if self.waiting_count + count > self.options.max_waiting:
            raise Refusal(
                503, "Overloaded",
                f"{self.waiting_count} sentences wait already; try again later",
            )
        pending.reserved = count
        self.reserved_of[name] += count

    def release(self, pending: Pending, count: int | None = None) -> None:
        """Take back what was reserved, all or some of it."""
        count = pending.reserved if count is None else count
        pending.reserved -= count
        name = pending.client.name
        self.reserved_of[name] -= count
        if not self.reserved_of[name]:
            del self.reserved_of[name]

    def tokens(self, text: str, where: str) -> list[int]:
        """Ids of a sentence, with EOS; none where nothing is left of it."""
        tokens, limit = self.narrator.source.encode(text), self.engine.model.max_source_length
        if len(tokens) + 1 > limit:
            raise Refusal(
                413, "TextTooLong",
                f"{where}: got a sentence of {len(text)} characters, {len(tokens)} tokens; "
                f"allowed: at most {limit - 1} tokens; send shorter sentences",
            )
        return [*tokens, self.engine.model.eos_id] if tokens else []

    def prefix(self, options: RequestOptions) -> list[int]:
        """Target ids of the prefix."""
        try:
            tokens = self.narrator.target.encode(options.prefix or "")
        except ValueError as error:
            raise Refusal(400, "InvalidOption", f"prefix: {error}") from None
        if Tokenizer.UNK in tokens:
            raise Refusal(
                400, "InvalidOption",
                f"prefix: got {options.prefix!r:.60}; allowed: characters that the model can write",
            )
        return tokens
