"""From what the engine decoded to what a client is told: whole answers, and streams of text."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from handler.decoding import Event, Result
from handler.decoding.sentence import NO_TOKEN
from handler.pieces import Work, at_once
from handler.request import Refusal, RequestOptions, TranslationRequest
from handler.sentences import Segment, join
from handler.tokenizer import Tokenizer

GRAVEST_LAST = ("eos", "length", "time")
Committed = Callable[[int], list[int]]


@dataclass(frozen=True)
class Part:
    """One text of a request: its segments, and the engine's sentence for each that has words; None
    for one of which nothing is left once control characters are dropped.

    cut: a sentence was too long for the model, and is several segments.
    """

    segments: list[Segment]
    sentences: list[int | None]
    sources: list[list[int]]
    cut: bool = False


def prefixed(
    sources: list[list[int]], prefix: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Each sentence of a text with what its translation begins with: the first that has words with
    `prefix`, the others with nothing."""
    first = next((i for i, ids in enumerate(sources) if ids), None)
    for i, ids in enumerate(sources):
        yield ids, prefix if i == first else []


@dataclass(frozen=True)
class Narrator:
    """Tells decoded tokens as text, in the shape that the options of a request ask for; piece by
    piece, as an answer may have thousands of sentences.

    Args:
        model: name and version, told in every answer.
    """

    source: Tokenizer
    target: Tokenizer
    model: dict[str, str]

    def answer(
        self, request: TranslationRequest, parts: list[Part], ended: dict[int, Event]
    ) -> Work[dict[str, Any]]:
        """The whole answer, once all sentences have ended.

        Raises:
            Refusal: 500, a sentence that could not be decoded; 400, options under which it cannot.
        """
        failed = next((e.error for e in ended.values() if e.error is not None), None)
        if failed == NO_TOKEN:
            raise Refusal(400, "InvalidOption", failed)
        if failed is not None:
            raise Refusal(500, "DecodingFailed", failed)
        translations = []
        for one in parts:
            translations.append((yield from self.translated(one, ended, request.options)))
        usage: dict[str, Any] = {
            "source_tokens": sum(len(s) for one in parts for s in one.sources),
            "target_tokens": sum(len(r.tokens) for e in ended.values() for r in e.results),
        }
        cut = [i for i, part in enumerate(parts) if part.cut]
        if cut:
            usage["cut_texts"] = cut
        return {"translations": translations, "model": self.model, "usage": usage}

    def translations(
        self, part: Part, ended: dict[int, Event], options: RequestOptions
    ) -> list[dict[str, Any]]:
        """See `translated`."""
        return at_once(self.translated(part, ended, options))

    def translated(
        self, part: Part, ended: dict[int, Event], options: RequestOptions
    ) -> Work[list[dict[str, Any]]]:
        """The n best of one text: of its sentences the best together, then the second best, ..."""
        found = [
            ended[one].results if one is not None else [Result([], "eos", 0.0, 0.0, [])]
            for one in part.sentences
        ]
        count = max((len(results) for results in found), default=1)
        best = []
        for rank in range(count):
            chosen = [results[min(rank, len(results) - 1)] for results in found]
            best.append((yield from self.told(part, chosen, options)))
        return best

    def told(
        self, part: Part, results: list[Result], options: RequestOptions
    ) -> Work[dict[str, Any]]:
        """One translation of a text, from one result for each of its sentences."""
        texts = []
        for one in results:
            texts.append(self.target.decode(one.tokens))
            yield
        told: dict[str, Any] = {"text": join(part.segments, texts)}
        if options.return_scores:
            told["score"] = round(sum((one.score or 0.0 for one in results), 0.0), 4)
        if options.return_tokens:
            told["tokens"] = []
            for one in results:
                told["tokens"] += self.target.pieces(one.tokens)
                yield
        if options.return_alignments:
            told["alignment"] = []
            for source, one in zip(part.sources, results):
                told["alignment"].append(self.aligned(source, one))
                yield
        reasons = {one.finish_reason for one in results} or {"eos"}
        told["finish_reason"] = max(reasons, key=GRAVEST_LAST.index)
        return told

    def aligned(self, source: list[int], result: Result) -> dict[str, Any]:
        """Pieces of both sides, and the share of attention that each of the target's pays to each
        of the source's."""
        return {
            "source": self.source.pieces(source),
            "target": self.target.pieces(result.tokens),
            "weights": [[round(w, 4) for w in row] for row in result.alignment or []],
        }


class Stream:
    """What a streaming client has been sent: of each text a beginning, never taken back."""

    def __init__(self, narrator: Narrator, parts: list[Part]) -> None:
        self.target = narrator.target
        self.parts = parts
        self.spoken = [[i for i, one in enumerate(p.segments) if one.text] for p in parts]
        self.whole: list[list[str]] = [[] for _ in parts]  # of sentences that ended, in order
        self.growing = [""] * len(parts)  # of the first that has not
        self.read = [0] * len(parts)  # tokens of it
        self.unfinished = dict.fromkeys(range(len(parts)))  # texts of which more may come
        self.sent = [""] * len(parts)
        self.opened = False

    def news(self, ended: dict[int, Event], committed: Committed) -> Iterator[str]:
        """Server-sent events with the text that has been decided since the last call.

        Args:
            committed: tells the tokens that are decided of a sentence that has not ended; asked of
                the first such sentence of each text.
        """
        for index in list(self.unfinished):
            if not self.grow(index, ended, committed):
                continue
            text, sent = self.decided(index), self.sent[index]
            if len(text) > len(sent) and text.startswith(sent):
                self.sent[index] = text
                yield event({"index": index, "text": text[len(sent) :]})

    def grow(self, index: int, ended: dict[int, Event], committed: Committed) -> bool:
        """Whether there is more of a text than at the last call."""
        whole, sentences = self.whole[index], self.parts[index].sentences
        before = len(whole), self.growing[index]
        while len(whole) < len(sentences):
            sentence = sentences[len(whole)]
            if sentence is not None and sentence not in ended:
                tokens = committed(sentence)
                if len(tokens) > self.read[index]:  # or they are those of the last call
                    settled = tokens[: self.target.settled(tokens)]
                    self.read[index], self.growing[index] = len(tokens), self.target.decode(settled)
                break
            results = ended[sentence].results if sentence is not None else []
            whole.append(self.target.decode(results[0].tokens) if results else "")
            self.read[index], self.growing[index] = 0, ""
        if len(whole) == len(self.spoken[index]):
            del self.unfinished[index]
        return (len(whole), self.growing[index]) != before

    def decided(self, index: int) -> str:
        """The text of the sentences up to the first that has not ended, and what that one has."""
        segments, whole, spoken = self.parts[index].segments, self.whole[index], self.spoken[index]
        if len(whole) == len(spoken):
            return join(segments, whole)
        last = spoken[len(whole)]
        until = [*segments[:last], Segment(segments[last].text, "")]
        return join(until, [*whole, self.growing[index]])


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event; JSON has no line break that is not escaped."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
