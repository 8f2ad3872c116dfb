"""Continuous batching of a recurrent decoder.

A hypothesis of a recurrent model is one row of state of a fixed size. The engine keeps the rows of
all live sentences in one dense table and advances them together; a sentence that ends frees its
row at once, and the next one waiting takes it. No row is computed after its sentence has ended,
and none depends on its neighbours: every operation on rows is row by row.
"""

import itertools
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from handler.decoding.model import SequenceModel, SourceLengthError, encode_batch
from handler.decoding.options import DecodingOptions
from handler.decoding.rows import Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One finished hypothesis: target ids without BOS and EOS, and why it ended."""

    tokens: list[int]
    finish_reason: Literal["eos", "length"]


@dataclass(frozen=True)
class Event:
    """A sentence ended: with hypotheses, best first, or with an error that is its alone."""

    sentence: int
    results: list[Result]
    error: str | None = None


@dataclass
class Sentence:
    """One admitted sentence."""

    id: int
    source: list[int]
    max_length: int
    tokens: list[int]


class Engine:
    """Decodes sentences that come and go.

    Args:
        model: see `SequenceModel`.
        rows: most hypotheses that are live at once; further sentences wait in order of arrival.
            Memory is bounded by rows * (state + longest source * attention memory).
        device: where the model is.

    Not thread-safe: one thread calls it.
    """

    def __init__(
        self, model: SequenceModel, rows: int, device: torch.device = torch.device("cpu")
    ) -> None:
        self.model = model
        self.capacity = rows
        self.device = device
        self.ids = itertools.count()
        self.waiting: deque[Sentence] = deque()
        self.live: list[Sentence] = []  # sentence of each row
        self.state = Rows()
        self.attended = Rows(padded=True)
        self.memory: Any = None  # of the model's own type; holds no tensors between steps
        self.never = torch.tensor([model.pad_id, model.unk_id, model.bos_id], device=device)

    def admit(self, source: list[int], options: DecodingOptions) -> int:
        """Queue a sentence.

        Args:
            source: ids of the source tokens, EOS included.

        Returns:
            The sentence's id, named by the event that ends it.

        Raises:
            SourceLengthError: a source that is empty or longer than the model reads.
        """
        limit = self.model.max_source_length
        if not 1 <= len(source) <= limit:
            raise SourceLengthError(
                f"{len(source)} tokens; the model reads from 1 to {limit}, its end mark included"
            )
        longest = self.model.max_target_length
        asked = options.max_length if options.max_length is not None else 3 * len(source) + 10
        sentence = Sentence(next(self.ids), source, min(asked, longest), [])
        self.waiting.append(sentence)
        return sentence.id

    def cancel(self, sentence: int) -> None:
        """Forget a sentence and free its row; unknown and finished ones are ignored."""
        for row, one in enumerate(self.live):
            if one.id == sentence:
                self.free(row)
                return
        self.waiting = deque(one for one in self.waiting if one.id != sentence)

    @property
    def rows_in_use(self) -> int:
        return len(self.live)

    @property
    def idle(self) -> bool:
        return not self.live and not self.waiting

    @torch.inference_mode()
    def advance(self, steps: int = 1) -> list[Event]:
        """Fill free rows from the queue and decode up to `steps` tokens of every live sentence.

        A failure of the model (out of memory, say) ends the sentences it was working on, each
        with its error, and leaves the engine usable.
        """
        events: list[Event] = []
        for _ in range(steps):
            events += self.fill()
            if not self.live:
                break
            try:
                events += self.step()
            except RuntimeError as error:
                logger.exception("a decoding step failed")
                events += [failed(one, error) for one in self.live]
                while self.live:
                    self.free(0)
        return events

    def fill(self) -> list[Event]:
        """Encode waiting sentences into free rows, first come, first served."""
        free = min(self.capacity - len(self.live), len(self.waiting))
        if not free:
            return []
        new = [self.waiting.popleft() for _ in range(free)]
        try:
            memory, state = encode_batch(self.model, [one.source for one in new], self.device)
            self.attended.append(len(new), memory.attended)
            self.state.append(len(new), state)
        except RuntimeError as error:
            logger.exception("encoding failed")
            for table in (self.attended, self.state):
                table.cut(len(self.live))
            return [failed(one, error) for one in new]
        self.memory = memory._replace(attended=[], initial=[])
        self.live += new
        return []

    def step(self) -> list[Event]:
        """One token for every row."""
        longest = max(len(one.source) for one in self.live)
        last = [one.tokens[-1] if one.tokens else self.model.bos_id for one in self.live]
        previous = torch.tensor(last, device=self.device).unsqueeze(1)  # [N, 1]
        memory = self.memory._replace(attended=self.attended.live(longest))
        logits, state = self.model.step(previous, self.state.live(), memory)
        self.state.replace(state)
        best, tokens = self.greedy(logits.squeeze(1))
        events = []
        for row in reversed(range(len(self.live))):  # from the end: freeing a row moves the last
            one, token = self.live[row], tokens[row]
            if not best[row]:
                events.append(Event(one.id, [], "the model gave no finite probability"))
            elif token == self.model.eos_id:
                events.append(Event(one.id, [Result(one.tokens, "eos")]))
            else:
                one.tokens.append(token)
                if len(one.tokens) < one.max_length:
                    continue
                events.append(Event(one.id, [Result(one.tokens, "length")]))
            self.free(row)
        return events[::-1]

    def greedy(self, logits: Tensor) -> tuple[list[bool], list[int]]:
        """logits [N, V] -> whether each row's best is finite, and its token."""
        logits.index_fill_(1, self.never, float("-inf"))
        values, tokens = logits.max(1)  # NaN, where there is one, is the maximum
        return torch.isfinite(values).tolist(), tokens.tolist()

    @torch.inference_mode()
    def free(self, row: int) -> None:
        """Take one sentence out of the table; the last row moves into its place."""
        self.state.remove(row)
        self.attended.remove(row)
        last = self.live.pop()
        if row < len(self.live):
            self.live[row] = last


def failed(sentence: Sentence, error: Exception) -> Event:
    return Event(sentence.id, [], f"decoding failed: {type(error).__name__}")
