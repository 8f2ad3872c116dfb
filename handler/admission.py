"""A request's way into the engine: read, split, tokenized, checked, and let in, a piece at a time.

Nothing of a request is in the engine before all of it has been checked. From the moment that it is
known how many its sentences are, they count as waiting.
"""

import dataclasses
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from handler import costs
from handler.answer import Answer, Narrator, Part, Stream, prefixed, savings, too_long_answer
from handler.authorization import ANYBODY, Client
from handler.clauses import Reader
from handler.decoding import Engine
from handler.decoding.turns import Caller
from handler.doors import spelt
from handler.extras import MissingPackage
from handler.pieces import Work
from handler.request import Refusal, RequestOptions, TranslationRequest, place
from handler.sentences import Segment, Splitter, line_breaks, source_language, unwrapped
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer

WINDOW = 4096  # characters that are tokenized in one piece
WITHIN = 64  # tokens by which two pieces of a sentence may differ from the whole, at their border


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
    held: bytes that it may take, see costs.py.
    admitted: whether all sentences have been let in. left: texts that are not whole.
    whole: texts that are, but have not been told.
    """

    id: str
    client: Client
    request: TranslationRequest
    arrived: float
    prefix: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    stream: Stream | None = None
    answer: Answer | None = None
    reserved: int = 0
    held: int = 0
    admitted: bool = False
    left: int = 0
    whole: deque[int] = field(default_factory=deque)
    sentences: list[int] = field(default_factory=list)  # the engine's, of all parts


class Admission:
    """Lets requests in, and minds how many sentences wait, and how much memory requests may take.

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
        self.held = 0
        pieces = narrator.target.pieces(range(engine.model.target_vocabulary))
        self.longest_piece = max(len(spelt(one)) for one in pieces)  # bytes

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
        self.hold(pending, costs.of_texts(request.texts))
        texts: list[list[Segment]] = []
        count = 0
        for text in request.texts:
            texts.append([])
            if request.options.join_lines:
                text = yield from unwrapped(text)
            for segment in self.segments(text, request.options):
                if segment is not None:
                    texts[-1].append(segment)
                    count += 1
                    if count > self.options.max_sentences:
                        raise self.too_many_sentences(f"more than {self.options.max_sentences}")
                yield
        self.reserve(pending, count)
        for i, whole in enumerate(texts):
            segments: list[Segment] = []
            sources: list[Sequence[int]] = []
            for sentence in whole:
                if not sentence.text.strip():
                    segments.append(sentence)
                    continue
                before = len(segments)
                for segment, ids in self.read(sentence, request.options):
                    segments.append(segment)
                    where = place(request.texts, i)
                    read = self.tokens(segment.text, ids, where, request.options)
                    sources.append((yield from read))
                    yield
                self.reserve(pending, len(segments) - before - 1)
            if sources and not any(sources):
                raise Refusal(
                    400, "EmptyText",
                    f"{place(request.texts, i)}: nothing is left of it once control characters "
                    "are dropped; allowed: text with at least one visible character",
                )
            pending.parts.append(Part(segments, [], sources, cut=len(segments) > len(whole)))
        pending.prefix = self.prefix(request.options)
        yield from self.afford(pending)
        pending.request = dataclasses.replace(request, texts=[])  # which are held as segments
        if request.options.stream:
            pending.stream = Stream(self.narrator, pending.parts)

    def afford(self, pending: Pending) -> Work[None]:
        """Find out what a request may cost, by the longest translations that its options allow."""
        options = pending.request.options
        most, piece = self.options.max_response_bytes, self.longest_piece
        held = whole = largest = least = 0
        for part in pending.parts:
            told = costs.told_of_text(part.segments, options)
            for ids in part.sources:
                if not ids:
                    continue
                try:
                    target = self.engine.check(ids, options, len(pending.prefix))
                except ValueError as error:
                    raise Refusal(400, "InvalidOption", str(error)) from None
                held += costs.of_sentence(len(ids), target, options)
                told += costs.told_of_sentence(len(ids), target, piece, options)
                least += costs.least_told(len(ids), options)
                yield
            whole, largest = whole + told, max(largest, told)
        if least > most:
            raise too_long_answer(f"would have {least} bytes or more", most, options)
        # A text is in pieces, and together, while it is written.
        held += costs.of_texts(pending.request.texts) + min(whole, most) + min(largest, most)
        self.hold(pending, held)
        answer = Answer(pending.request.door, options, len(pending.parts), most)
        answer.source_tokens = sum(len(ids) for part in pending.parts for ids in part.sources)
        answer.cut_texts = [i for i, part in enumerate(pending.parts) if part.cut]
        pending.answer, pending.left = answer, len(pending.parts)

    def enter(self, pending: Pending) -> Iterator[tuple[int, int, int]]:
        """Let the sentences in, one after the other; of each its text, its place there, its id."""
        options, client = pending.request.options, pending.client
        caller = Caller(client.name, client.terms.share)
        deadline = None if options.max_time is None else pending.arrived + options.max_time
        for index, part in enumerate(pending.parts):
            for at, (ids, begun) in enumerate(prefixed(part.sources, pending.prefix)):
                if not ids:
                    part.sentences.append(None)
                    continue
                behind, bulk = len(pending.sentences), options.priority == "bulk"
                one = self.engine.admit(ids, options, begun, deadline, behind, caller, bulk)
                self.release(pending, 1)
                part.sentences.append(one)
                pending.sentences.append(one)
                yield index, at, one
        pending.admitted = True

    def segments(self, text: str, options: RequestOptions) -> Iterator[Segment | None]:
        """The sentences of a text, of its white space no more than a translation keeps; None where
        others may have their turn.

        Raises:
            Refusal: it is to be split, and what splits is missing.
        """
        if not options.split:
            yield Segment(text, "")
            return
        try:
            for one in self.splitter.segments(text):
                yield None if one is None else Segment(one.text, line_breaks(one.gap) or one.gap)
        except MissingPackage as error:
            raise Refusal(
                400, "InvalidOption",
                f"split: got true for a text of several sentences, which {error}; allowed on this "
                "server: false, or one sentence a line",
            ) from None

    def read(
        self, sentence: Segment, options: RequestOptions
    ) -> Iterator[tuple[Segment, list[int] | None]]:
        """A sentence, in pieces where it is too long and may be cut; with tokens that are known."""
        if options.split:
            yield from self.reader.read(sentence)
        else:
            yield sentence, None

    def reserve(self, pending: Pending, more: int) -> None:
        """Have so many sentences more count as waiting.

        Raises:
            Refusal: they are too many for one request, for its client, or for the service.
        """
        if not more:
            return
        count = pending.reserved + more
        if count > self.options.max_sentences:
            raise self.too_many_sentences(str(count))
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

    def hold(self, pending: Pending, count: int) -> None:
        """Have a request take so much memory at most.

        Raises:
            Refusal: it is too much for one request, or for the service.
        """
        most = self.options.request_memory
        if count > most // 4:
            raise Refusal(
                413, "TooExpensive",
                f"the request could take {count / 1e6:.1f} MB of memory; allowed: {most / 4e6:.1f} "
                f"MB; {savings(pending.request.options)}",
            )
        held = self.held - pending.held + count
        if held > most:
            raise Refusal(
                503, "Overloaded",
                f"requests that are being served could take {self.held / 1e6:.1f} MB of memory "
                "already; try again later",
            )
        self.held, pending.held = held, count

    def forget(self, pending: Pending) -> None:
        """Take back all that a request holds."""
        self.release(pending)
        self.held -= pending.held
        pending.held = 0

    def too_many_sentences(self, got: str) -> Refusal:
        return Refusal(
            413, "TooManySentences",
            f"text: got {got} sentences; allowed: at most {self.options.max_sentences} in a "
            "request; send them in several",
        )

    def tokens(
        self, text: str, known: list[int] | None, where: str, options: RequestOptions
    ) -> Work[Sequence[int]]:
        """Ids of a sentence, with EOS; none where nothing is left of it.

        Args:
            known: the ids without EOS, if it has been tokenized.
        """
        ids = known if known is not None else (yield from self.tokenized(text, where, options))
        if len(ids) > self.reader.limit:
            raise self.too_long(text, where, str(len(ids)), options)
        return array("i", [*ids, self.engine.model.eos_id] if ids else [])

    def tokenized(self, text: str, where: str, options: RequestOptions) -> Work[list[int]]:
        """Ids of a sentence; of a long one only if it can be short enough."""
        least = 0
        for begin in range(0, len(text) if len(text) > WINDOW else 0, WINDOW):
            least += len(self.narrator.source.encode(text[begin : begin + WINDOW])) - WITHIN
            yield
            if least > self.reader.limit:
                raise self.too_long(text, where, f"more than {least}", options)
        return self.narrator.source.encode(text)

    def too_long(self, text: str, where: str, tokens: str, options: RequestOptions) -> Refusal:
        advice = "" if options.split else ", or with split true a text that can be cut"
        return Refusal(
            413, "TextTooLong",
            f"{where}: got a sentence of {len(text)} characters, {tokens} tokens; allowed: at most "
            f"{self.reader.limit} tokens; send shorter sentences{advice}",
        )

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
