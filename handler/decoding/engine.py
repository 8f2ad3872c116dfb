"""Continuous batching of a recurrent decoder.

A hypothesis of a recurrent model is one row of state of a fixed size. The engine keeps the rows of
all live sentences dense and advances them together; a sentence that ends frees its rows at once,
and the next one waiting takes them. No row is computed after its sentence has ended, and none
depends on its neighbours: every operation on rows is row by row.
"""

import itertools
import logging
from collections import deque
from typing import Any

import torch

from handler.decoding.lane import Lane
from handler.decoding.model import SequenceModel, SourceLengthError, encode_batch
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Event, Sentence

logger = logging.getLogger(__name__)


class Engine:
    """Decodes sentences that come and go.

    Sentences with equally many hypotheses advance together, in a lane. Every sentence begins in
    the lane of width 1, as all hypotheses of a beam are the same before its first step; a beam
    then moves to the lane of its width.

    Args:
        model: see `SequenceModel`.
        rows: most hypotheses that are live at once; further sentences wait in order of arrival, a
            wide beam until all its rows are free. Memory is bounded by rows * (state + longest
            source * attention memory).
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
        self.lanes: dict[int, Lane] = {}  # by width
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
            ValueError: options that this engine or model cannot fulfil.
        """
        limit, longest = self.model.max_source_length, self.model.max_target_length
        if not 1 <= len(source) <= limit:
            raise SourceLengthError(
                f"{len(source)} tokens; the model reads from 1 to {limit}, its end mark included"
            )
        if options.beam_size > self.capacity:
            raise ValueError(
                f"beam_size: got {options.beam_size}; allowed here: at most {self.capacity}"
            )
        if options.min_length > longest:
            raise ValueError(
                f"min_length: got {options.min_length}; allowed by this model: at most {longest}"
            )
        asked = options.max_length if options.max_length is not None else 3 * len(source) + 10
        most = min(max(asked, options.min_length), longest)
        sentence = Sentence(next(self.ids), source, options, most)
        self.waiting.append(sentence)
        return sentence.id

    @torch.inference_mode()
    def cancel(self, sentence: int) -> None:
        """Forget a sentence and free its rows; unknown and finished ones are ignored."""
        for lane in self.lanes.values():
            for i, one in enumerate(lane.sentences):
                if one.id == sentence:
                    lane.remove(i)
                    return
        self.waiting = deque(one for one in self.waiting if one.id != sentence)

    @property
    def rows_in_use(self) -> int:
        """Rows that live sentences hold, those a beam is about to need included."""
        return sum(s.options.beam_size for lane in self.lanes.values() for s in lane.sentences)

    @property
    def idle(self) -> bool:
        return not self.waiting and not any(lane.sentences for lane in self.lanes.values())

    @torch.inference_mode()
    def advance(self, steps: int = 1) -> list[Event]:
        """Fill free rows from the queue and decode up to `steps` tokens of every live sentence.

        A failure of the model (out of memory, say) ends the sentences it was working on, each
        with its error, and leaves the engine usable.
        """
        events: list[Event] = []
        for _ in range(steps):
            events += self.fill()
            # Widest first, so that a beam that leaves the lane of width 1 goes one step, not two.
            for width in sorted(self.lanes, reverse=True):
                lane = self.lanes[width]
                if not lane.sentences:
                    del self.lanes[width]
                    continue
                try:
                    self.step(lane, events)
                except RuntimeError as error:
                    logger.exception("a decoding step failed")
                    events += [failed(one, error) for one in lane.sentences]
                    del self.lanes[width]
            if self.idle:
                break
        return events

    def fill(self) -> list[Event]:
        """Encode waiting sentences into free rows, first come, first served."""
        free = self.capacity - self.rows_in_use
        new: list[Sentence] = []
        while self.waiting and self.waiting[0].options.beam_size <= free:
            new.append(self.waiting.popleft())
            free -= new[-1].options.beam_size
        if not new:
            return []
        try:
            memory, state = encode_batch(self.model, [one.source for one in new], self.device)
            first = [t.unsqueeze(1) for t in state]  # [N, 1, ...]
            self.lanes.setdefault(1, Lane(1)).add(new, first, memory.attended)
        except RuntimeError as error:
            logger.exception("encoding failed")
            return [failed(one, error) for one in new]
        self.memory = memory._replace(attended=[], initial=[])
        return []

    def step(self, lane: Lane, events: list[Event]) -> None:
        """One token for every row of a lane.

        What ends is told in `events` as it leaves the lane, so that a failure on the way loses
        nothing: a sentence is either there or still in the lane.
        """
        first = len(events)
        parents = lane.step(self.model, self.memory, self.never)
        for i in reversed(range(len(lane.sentences))):  # removing one moves the last
            one = lane.sentences[i]
            if one.ended:
                events.insert(first, one.event())
            elif len(one.live) != lane.width:
                self.widen(lane, i, parents[i])
            else:
                continue
            lane.remove(i)
            parents[i] = parents[-1]
            parents.pop()
        lane.reorder(parents)

    def widen(self, lane: Lane, i: int, parents: list[int]) -> None:
        """Copy sentence `i` into the lane of as many hypotheses as it has now."""
        one = lane.sentences[i]
        width = len(one.live)
        state = [t[i : i + 1, parents] for t in lane.state.live()]  # [1, width, ...]
        attended = [t[i : i + 1, : len(one.source)] for t in lane.attended.live()]
        self.lanes.setdefault(width, Lane(width)).add([one], state, attended)


def failed(sentence: Sentence, error: Exception) -> Event:
    return Event(sentence.id, [], f"decoding failed: {type(error).__name__}")
