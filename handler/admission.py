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
from handler.clauses import Reader
from handler.decoding import Engine, Event
from handler.decoding.turns import Caller
from handler.extras import MissingPackage
from handler.pieces import Work
from handler.request import Refusal, RequestOptions, TranslationRequest, place
from handler.sentences import Segment, Splitter, source_language, unwrapped
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
        self.splitter = Splitter(source_language(engine.model.card))
        self.reader = Reader(narrator.source, engine.model.max_source_length - 1)
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
            if request.options.join_lines:
                text = yield from unwrapped(text)
            for segment in self.segments(text, request.options):
                if segment is not None:
                    texts[-1].append(segment)
                yield
        self.reserve(pending, sum(map(len, texts)))
        for i, whole in enumerate(texts):
            segments: list[Segment] = []
            sources: list[list[int]] = []
            for sentence in whole:
                if not sentence.text.strip():
                    segments.append(sentence)
                    continue
                count = len(segments)
                for segment, ids in self.read(sentence, request.options):
                    segments.append(segment)
                    where = place(request.texts, i)
                    sources.append(self.tokens(ids, segment.text, where, request.options))
                    yield
                self.reserve(pending, len(segments) - count - 1)
            if sources and not any(sources):
                raise Refusal(
                    400, "EmptyText",
                    f"{place(request.texts, i)}: nothing is left of it once control characters "
                    "are dropped; allowed: text with at least one visible character",
                )
            pending.parts.append(Part(segments, [], sources, cut=len(segments) > len(whole)))
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

    def segments(self, text: str, options: RequestOptions) -> Iterator[Segment | None]:
        """The sentences of a text; see `Splitter.segments`.

        Raises:
            Refusal: it is to be split, and what splits is missing.
        """
        if not options.split:
            yield Segment(text, "")
            return
        try:
            yield from self.splitter.segments(text)
        except MissingPackage as error:
            raise Refusal(
                400, "InvalidOption",
                f"split: got true for a text of several sentences, which {error}; allowed on this "
                "server: false, or one sentence a line",
            ) from None

    def read(
        self, sentence: Segment, options: RequestOptions
    ) -> Iterator[tuple[Segment, list[int]]]:
        """A sentence with its tokens; in pieces where it is too long and may be cut."""
        if options.split:
            yield from self.reader.read(sentence)
        else:
            yield sentence, self.reader.source.encode(sentence.text)

    def reserve(self, pending: Pending, more: int) -> None:
        """Have so many sentences more count as waiting.

        Raises:
            Refusal: they are too many for one request, for its client, or for the service.
        """
        if not more:
            return
        count = pending.reserved + more
        if count > self.options.max_sentences:
            raise Refusal(
                413, "TooManySentences",
                f"text: got {count} sentences; allowed: at most {self.options.max_sentences} in a "
                "request; send them in several",
            )
        name, most = pending.client.name, pending.client.terms.most_waiting
        waiting = self.engine.waiting_of(name) + self.reserved_of[name] - pending.reserved
        if most is not None and waiting + count > most:
            raise Refusal(
                429, "TooManyWaiting",
                f"text: got {count} sentences, and {waiting} of this token wait already; allowed "
                f"with this token: {most} together; send fewer, or try again later",
            )
        if self.waiting_count + more > self.options.max_waiting:
            raise Refusal(
                503, "Overloaded",
                f"{self.waiting_count - pending.reserved} sentences wait already; try again later",
            )
        pending.reserved = count
        self.reserved_of[name] += more

    def release(self, pending: Pending, count: int | None = None) -> None:
        """Take back what was reserved, all or some of it."""
        count = pending.reserved if count is None else count
        pending.reserved -= count
        name = pending.client.name
        self.reserved_of[name] -= count
        if not self.reserved_of[name]:
            del self.reserved_of[name]

    def tokens(
        self, ids: list[int], text: str, where: str, options: RequestOptions
    ) -> list[int]:
        """Ids of a sentence, with EOS; none where nothing is left of it."""
        limit = self.reader.limit
        if len(ids) > limit:
            advice = "" if options.split else ", or with split true a text that can be cut"
            raise Refusal(
                413, "TextTooLong",
                f"{where}: got a sentence of {len(text)} characters, {len(ids)} tokens; "
                f"allowed: at most {limit} tokens; send shorter sentences{advice}",
            )
        return [*ids, self.engine.model.eos_id] if ids else []

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
