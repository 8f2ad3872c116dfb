"""From what the engine decoded to what a client is told: whole answers, and streams of text.

What is told of a text is written as soon as its sentences have ended, a piece at a time, and takes
the place of what was decoded. So an answer is never held twice, and its size is known as it grows.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.decoding import Alignment, Engine, Event, Result
from handler.decoding.sentence import Reason
from handler.doors import Door, Fields, Told, spelt
from handler.pieces import Work, at_once
from handler.request import Refusal, RequestOptions
from handler.sentences import Joining, Segment
from handler.tokenizer import Tokenizer

GRAVEST_LAST = ("eos", "length", "time")
AT_ONCE = 16  # sentences that a stream is told of in one event; they may have ended together
Note = Callable[[int], None]  # of so many bytes that have been written


@dataclass(frozen=True, slots=True)
class Kept:
    """What is told of a `Result`, in as little memory as it needs."""

    tokens: Sequence[int]
    finish_reason: Reason
    score: float | None
    alignment: Alignment | None


NOTHING = Kept(array("i"), "eos", 0.0, Alignment(1, b""))  # of a sentence of no tokens


@dataclass(eq=False)
class Part:
    """One text of a request: its segments, and the engine's sentence for each that has words; None
    for one of which nothing is left once control characters are dropped.

    cut: a sentence was too long for the model, and is several segments.
    results: of each sentence that has ended, best first.
    left: sentences that have not ended, those that have not been let in among them.
    """

    segments: list[Segment]
    sentences: list[int | None]
    sources: Sequence[Sequence[int]]
    cut: bool = False
    results: list[list[Kept] | None] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        self.results = [None if ids else [NOTHING] for ids in self.sources]
        self.left = self.results.count(None)

    def end(self, place: int, results: list[Result]) -> None:
        """Keep the results of a sentence."""
        self.left -= 1
        self.results[place] = [
            Kept(array("i", one.tokens), one.finish_reason, one.score, one.alignment)
            for one in results
        ]

    def clear(self) -> None:
        """Of what has been told nothing is held."""
        self.segments, self.sentences, self.sources, self.results = [], [], [], []


def prefixed(
    sources: Sequence[Sequence[int]], prefix: list[int]
) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Each sentence of a text with what its translation begins with: the first that has words with
    `prefix`, the others with nothing."""
    first = next((i for i, ids in enumerate(sources) if ids), None)
    for i, ids in enumerate(sources):
        yield ids, prefix if i == first else []


@dataclass(frozen=True)
class Narrator:
    """Tells decoded tokens as text, in the shape that the options of a request ask for; piece by
    piece, as a text may have thousands of sentences, and an alignment thousands of rows.

    Args:
        model: name and version, told in every answer.
    """

    source: Tokenizer
    target: Tokenizer
    model: dict[str, str]

    def translations(
        self, part: Part, ended: dict[int, Event], options: RequestOptions
    ) -> list[dict[str, Any]]:
        """What is told of one text, see `translated`, as values."""
        for place, sentence in enumerate(part.sentences):
            if sentence is not None:
                part.end(place, ended[sentence].results)
        found = at_once(self.translated(part, options))
        return [{name: json.loads(value) for name, value in one.items()} for one in found]

    def translated(
        self, part: Part, options: RequestOptions, note: Note = lambda _: None
    ) -> Work[list[Fields]]:
        """The n best of one text: of its sentences the best together, then the second best, ..."""
        found = [results for results in part.results if results is not None]
        count = max(map(len, found), default=1)
        best = []
        for rank in range(count):
            chosen = [results[min(rank, len(results) - 1)] for results in found]
            best.append((yield from self.told(part, chosen, options, note)))
        return best

    def told(
        self, part: Part, results: list[Kept], options: RequestOptions, note: Note
    ) -> Work[Fields]:
        """One translation of a text, from one result for each of its sentences."""
        told: Fields = {"text": (yield from written(self.text(part, results), note))}
        if options.return_scores:
            told["score"] = spelt(round(sum((one.score or 0.0 for one in results), 0.0), 4))
        if options.return_tokens:
            told["tokens"] = yield from written(self.tokens(results), note)
        if options.return_alignments:
            told["alignment"] = yield from written(self.aligned(part, results), note)
        reasons = {one.finish_reason for one in results} or {"eos"}
        told["finish_reason"] = spelt(max(reasons, key=GRAVEST_LAST.index))
        note(2 * sum(map(len, told)))  # names, and what is between them
        return told

    # Each of these is JSON, in pieces.

    def text(self, part: Part, results: list[Kept]) -> Iterator[str]:
        joining, remaining = Joining(), iter(results)
        yield '"'
        for segment in part.segments:
            translation = self.target.decode(next(remaining).tokens) if segment.text else ""
            yield json.dumps(joining.add(segment, translation), ensure_ascii=False)[1:-1]
        yield '"'

    def tokens(self, results: list[Kept]) -> Iterator[str]:
        return listed(self.spelt_pieces(self.target, one.tokens)[1:-1] for one in results)

    def aligned(self, part: Part, results: list[Kept]) -> Iterator[str]:
        """Pieces of both sides, and the share of attention that each of the target's pays to each
        of the source's."""
        yield "["
        for place, (source, one) in enumerate(zip(part.sources, results)):
            between = ", " if place else ""
            yield f'{between}{{"source": {self.spelt_pieces(self.source, source)}, "target": '
            yield f'{self.spelt_pieces(self.target, one.tokens)}, "weights": '
            rows = one.alignment or ()
            yield from listed(json.dumps([round(share, 4) for share in row]) for row in rows)
            yield "}"
        yield "]"

    def spelt_pieces(self, side: Tokenizer, tokens: Sequence[int]) -> str:
        return json.dumps(side.pieces(tokens), ensure_ascii=False)


def listed(values: Iterator[str]) -> Iterator[str]:
    """A list of JSON, of values in JSON; empty ones are left out."""
    between = ""
    yield "["
    for value in values:
        if value:
            yield between + value
            between = ", "
    yield "]"


def written(pieces: Iterator[str], note: Note) -> Work[bytes]:
    """`pieces` together, in UTF-8."""
    found = []
    for piece in pieces:
        found.append(piece.encode())
        note(len(found[-1]))
        yield
    return b"".join(found)


class Answer:
    """The answer to a request of so many texts while it is put together.

    size: bytes that have been written. target_tokens: of all sentences that have ended.
    cut_texts: those of which a sentence was too long for the model, and was cut.
    """

    def __init__(self, door: Door, options: RequestOptions, texts: int, most: int) -> None:
        self.door = door
        self.options = options
        self.most = most
        self.texts: list[Told | None] = [None] * texts
        self.size = 0
        self.source_tokens = self.target_tokens = 0
        self.cut_texts: list[int] = []

    def note(self, count: int) -> None:
        """So many bytes more have been written.

        Raises:
            Refusal: 413, the answer is too long.
        """
        self.size += count
        if self.size > self.most:
            raise too_long_answer(f"has more than {self.most} bytes", self.most, self.options)

    def tell(self, narrator: Narrator, index: int, part: Part) -> Work[None]:
        """Write what is told of a text whose sentences have ended, and forget these."""
        before = self.size
        translations = yield from narrator.translated(part, self.options, self.note)
        told = self.door.told(translations)
        self.size = before
        self.note(told.size)
        self.texts[index] = told
        part.clear()

    def body(self, model: dict[str, str]) -> bytes:
        """All of it, once all texts are told."""
        told = [one for one in self.texts if one is not None]
        usage: dict[str, Any] = {
            "source_tokens": self.source_tokens, "target_tokens": self.target_tokens
        }
        if self.cut_texts:
            usage["cut_texts"] = self.cut_texts
        self.size, pieces = 0, []
        for piece in self.door.leave(told, model, usage):
            self.note(len(piece))
            pieces.append(piece)
        self.texts = []
        return b"".join(pieces)


def savings(options: RequestOptions) -> str:
    """What a client may do so that its request is smaller."""
    lower = ["max_length", *(["n_best"] if options.n_best > 1 else [])]
    told = [name for name in ("return_alignments", "return_tokens") if getattr(options, name)]
    without = f", ask for no {' or '.join(told)}" if told else ""
    return f"send fewer texts, lower {' or '.join(lower)}{without}"


def too_long_answer(found: str, most: int, options: RequestOptions) -> Refusal:
    message = f"the answer {found}; allowed: {most}; {savings(options)}"
    return Refusal(413, "AnswerTooLong", message)


class Growing:
    """How much of a text a stream has been sent: all of the segments before `at`, and a beginning
    of that one."""

    def __init__(self) -> None:
        self.joining = Joining()
        self.at = 0  # segment
        self.place = 0  # sentence; segments without text have none
        self.read = 0  # tokens of the sentence
        self.sent = ""  # of the segment

    def next(self) -> None:
        self.at, self.place, self.read, self.sent = self.at + 1, self.place + 1, 0, ""


class Stream:
    """What a streaming client has been sent: of each text a beginning, never taken back.

    awake: texts of which there may be news.
    """

    def __init__(self, narrator: Narrator, parts: list[Part]) -> None:
        self.target = narrator.target
        self.parts = parts
        self.texts: dict[int, Growing] = {}  # that have begun and are not whole
        self.whole = [False] * len(parts)
        self.awake: dict[int, None] = {}
        self.opened = False
        self.unsent: list[str] = []  # events

    def wake(self, index: int) -> None:
        if not self.whole[index]:
            self.awake[index] = None

    def later(self, index: int) -> None:
        """The next time, all others that are awake come before this text."""
        if index in self.awake:
            self.awake[index] = self.awake.pop(index)

    def news(self, index: int, engine: Engine) -> str:
        """A server-sent event with text that has been decided since the last call, if there is any;
        there may be more.

        Args:
            engine: knows the tokens that are decided of a sentence that has not ended; asked of
                the first such sentence of each text.
        """
        text, part = self.texts.setdefault(index, Growing()), self.parts[index]
        fresh: list[str] = []
        for _ in range(AT_ONCE):
            if text.at == len(part.segments):
                self.whole[index] = True
                del self.texts[index]
                self.awake.pop(index, None)
                break
            segment = part.segments[text.at]
            if not segment.text:
                fresh.append(text.joining.add(segment, ""))
                text.at += 1
                continue
            results = part.results[text.place] if text.place < len(part.results) else None
            if results is None:
                fresh.append(self.growth(index, text, engine))
                break
            said = text.joining.add(segment, self.target.decode(results[0].tokens))
            fresh.append(said.removeprefix(text.sent) if said.startswith(text.sent) else "")
            text.next()
        said = "".join(fresh)
        return event(json.dumps({"index": index, "text": said}, ensure_ascii=False)) if said else ""

    def growth(self, index: int, text: Growing, engine: Engine) -> str:
        """What is new of a sentence that has not ended. One that has not begun wakes its text when
        it does."""
        sentences = self.parts[index].sentences
        sentence = sentences[text.place] if text.place < len(sentences) else None
        if sentence is None or not engine.begun(sentence):
            self.awake.pop(index, None)
            return ""
        tokens = engine.committed(sentence)
        if len(tokens) <= text.read:
            return ""
        text.read = len(tokens)
        said = text.joining.told(self.target.decode(tokens[: self.target.settled(tokens)]))
        if not said.startswith(text.sent):
            return ""
        fresh, text.sent = said.removeprefix(text.sent), said
        return fresh


def event(data: str, name: str | None = None) -> str:
    """One server-sent event; JSON has no line break that is not escaped."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n"
