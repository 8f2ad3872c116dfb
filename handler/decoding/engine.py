"""Continuous batching of a recurrent decoder.

A hypothesis of a recurrent model is one row of state of a fixed size. The engine keeps the rows of
all live sentences dense and advances them together; a sentence that ends frees its rows at once,
and the next one waiting takes them. No row depends on its neighbours: every operation on rows is
row by row. On a CPU none is computed after its sentence has ended.
"""

import heapq
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handler.decoding.lane import Encoded, Lane, Move, Vocabulary
from handler.decoding.model import SequenceModel, SourceLengthError, encode_batch
from handler.decoding.options import DecodingOptions
from handler.decoding.sentence import Event, Sentence

logger = logging.getLogger(__name__)

ENCODED_AHEAD = 16  # sentences; see `Engine.fill`
STEPS = 16  # that callers ask for at once, between two looks of theirs at what has ended
TURN = 4  # beside others, a client with much to translate gets a quarter of the turns


class Engine:
    """Decodes sentences that come and go.

    Sentences with equally many hypotheses advance together, in a lane. Every sentence begins in
    the lane of width 1, as all hypotheses of a beam are the same before its first step; a beam
    then moves to the lane of its width.

    Args:
        model: see `SequenceModel`.
        rows: most hypotheses that are live at once; further sentences wait, a wide beam until all
            its rows are free. See `largest_memory`.
        device: where the model is.
        clock: seconds, for deadlines.

    Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        model: SequenceModel,
        rows: int,
        device: torch.device = torch.device("cpu"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.capacity = rows
        self.device = device
        self.clock = clock
        self.ids = itertools.count()
        self.sentences: dict[int, Sentence] = {}  # live and waiting
        self.waiting: list[tuple[int, int]] = []  # heap of (turn, id); cancelled ones are skipped
        self.steps = 0  # that have been made
        self.begun_count = 0  # sentences that have left the queue
        self.rows_in_use = 0  # of live sentences; those that a beam is about to need included
        self.live_count = 0
        self.next_deadline = math.inf
        self.fused = bool(getattr(model, "fused", False))
        self.lanes: dict[tuple[int, bool], Lane] = {}  # by width, and whether fused
        self.encoded: Encoded | None = None
        self.memory: Any = None  # of the model's own type; holds no tensors between steps
        self.vocabulary = Vocabulary.of(model, device)

    def admit(
        self,
        source: list[int],
        options: DecodingOptions,
        prefix: Sequence[int] = (),
        deadline: float | None = None,
        behind: int = 0,
    ) -> int:
        """Queue a sentence.

        Args:
            source: ids of the source tokens, EOS included.
            prefix: ids that the translation begins with.
            deadline: on the engine's clock; what there is then is answered.
            behind: how many sentences of the same client are before this one. A client's k-th
                sentence counts as coming when `TURN` * k sentences have begun, and then it is
                first come, first served (up to `ENCODED_AHEAD` sentences go before). So no client
                waits for the whole of another's, and none is overtaken for ever.

        Returns:
            The sentence's id, named by the event that ends it.

        Raises:
            SourceLengthError: a source that is empty or longer than the model reads.
            ValueError: options that this engine or model cannot fulfil.
        """
        most = self.check(source, options, len(prefix))
        sentence = Sentence(next(self.ids), source, options, most, list(prefix), deadline)
        self.sentences[sentence.id] = sentence
        heapq.heappush(self.waiting, (self.begun_count + TURN * behind, sentence.id))
        if deadline is not None:
            self.next_deadline = min(self.next_deadline, deadline)
        return sentence.id

    def check(self, source: list[int], options: DecodingOptions, prefix: int = 0) -> int:
        """The most target tokens that a sentence will have; see `admit` for what is raised."""
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
        for name in ("coverage_penalty", "return_alignments"):
            if getattr(options, name) and not self.model.has_attention:
                raise ValueError(
                    f"{name}: got {getattr(options, name)}; allowed by this model, which has no "
                    "attention: only the default"
                )
        asked = options.max_length
        if asked is None:
            asked = max(3 * len(source) + 10, options.min_length, prefix)
        most = min(asked, longest)
        if prefix > most:
            raise ValueError(f"prefix: got {prefix} tokens; allowed: at most max_length, {most}")
        return most

    def cancel(self, sentence: int) -> None:
        """Forget a sentence and free its rows; unknown and finished ones are ignored."""
        if self.sentences.pop(sentence, None) is not None:
            self.leave(sentence)

    @torch.inference_mode()
    def leave(self, sentence: int) -> None:
        """Take a live sentence out of its lane; one that waits is in none."""
        for lane in self.lanes.values():
            for i, one in enumerate(lane.sentences):
                if one.id == sentence:
                    lane.remove(i)
                    self.release(one)
                    return

    def clear(self) -> None:
        """Forget every sentence."""
        self.sentences.clear()
        self.waiting.clear()
        self.lanes.clear()
        self.encoded = None
        self.rows_in_use = self.live_count = 0

    def release(self, sentence: Sentence) -> None:
        self.rows_in_use -= sentence.options.beam_size
        self.live_count -= 1

    @property
    def waiting_count(self) -> int:
        return len(self.sentences) - self.live_count

    @property
    def idle(self) -> bool:
        return not self.sentences

    def begun(self, sentence: int) -> bool:
        """Whether a sentence that has not ended has a token."""
        return bool(self.sentences[sentence].live[0].tokens)

    def committed(self, sentence: int) -> list[int]:
        """What has been decided of one that has not ended; see `Sentence.committed`."""
        return self.sentences[sentence].committed()

    @torch.inference_mode()
    def advance(self, steps: int = 1, until: float = math.inf) -> list[Event]:
        """Fill free rows from the queue and decode up to `steps` tokens of every live sentence;
        fewer, but one, where the clock comes to `until` before.

        A failure of the model (out of memory, say) ends the sentences it was working on, each
        with its error, and leaves the engine usable.
        """
        events: list[Event] = []
        last = self.steps + steps
        while self.steps < last and not self.idle:
            events += self.expire()
            events += self.fill()
            moves: list[Move] = []
            self.lanes = {key: lane for key, lane in self.lanes.items() if lane.sentences}
            most, made = self.most_together(last - self.steps), 0
            in_time = self.in_time(until)
            for key, lane in list(self.lanes.items()):
                try:
                    made = self.step(lane, events, moves, made or most, in_time)
                    in_time = always  # all lanes go equally far
                except RuntimeError as error:
                    logger.exception("a decoding step failed")
                    for one in lane.sentences:
                        self.release(one)
                        events.append(failed(one.id, error))
                    del self.lanes[key]
            events += self.settle(moves)
            for event in events:
                self.sentences.pop(event.sentence, None)
            self.steps += max(made, 1)
            if self.clock() >= until:
                break
        return events

    def most_together(self, most: int) -> int:
        """The steps, up to `most`, that all lanes can make without being looked at in between;
        where each looks itself for what ends, several lanes go one by one."""
        if len(self.lanes) < 2:
            return most
        if not self.vocabulary.unseen:
            return 1
        return min(most, *(lane.steady() for lane in self.lanes.values()))

    def in_time(self, until: float) -> Callable[[], bool]:
        return lambda: self.clock() < min(until, self.next_deadline)

    def expire(self) -> list[Event]:
        """End the sentences whose time is over."""
        now = self.clock()
        if now < self.next_deadline:
            return []
        over, deadlines = [], [math.inf]
        for one in self.sentences.values():
            if one.deadline is not None and one.deadline <= now:
                over.append(one)
            elif one.deadline is not None:
                deadlines.append(one.deadline)
        self.next_deadline = min(deadlines)
        for one in over:
            self.leave(one.id)
            del self.sentences[one.id]
            one.end("time")
        return [one.event() for one in over]

    def fill(self) -> list[Event]:
        """Put waiting sentences into free rows, in their turn.

        Rows become free one by one, and encoding a single sentence takes nearly as long as
        encoding several; so the next `ENCODED_AHEAD` are encoded together.
        """
        events: list[Event] = []
        while self.encoded is not None or self.waiting:
            if self.encoded is None:
                events += self.encode()
                continue
            new = self.encoded.next(self.sentences, self.capacity - self.rows_in_use)
            for lane, places in self.by_lane(self.encoded, new).items():
                sentences = [self.encoded.sentences[i] for i in places]
                try:
                    lane.add(
                        sentences,
                        [t[places] for t in self.encoded.state],
                        [t[places] for t in self.encoded.attended],
                    )
                except RuntimeError as error:
                    logger.exception("no room for a sentence")
                    events += [failed(one.id, error) for one in sentences]
                else:
                    self.rows_in_use += sum(one.options.beam_size for one in sentences)
                    self.live_count += len(sentences)
            if not self.encoded.done:
                break
            self.encoded = None
            if self.rows_in_use == self.capacity:
                break
        return events

    def by_lane(self, encoded: Encoded, places: list[int]) -> dict[Lane, list[int]]:
        """The lanes that these of the encoded sentences begin in."""
        lanes: dict[Lane, list[int]] = {}
        for i in places:
            lanes.setdefault(self.lane(1, encoded.sentences[i]), []).append(i)
        return lanes

    def lane(self, width: int, sentence: Sentence) -> Lane:
        fused = self.fused and sentence.plain
        if (width, fused) not in self.lanes:
            self.lanes[width, fused] = Lane(self.model, self.vocabulary, width, fused)
        return self.lanes[width, fused]

    def encode(self) -> list[Event]:
        """Encode the sentences whose turn is next."""
        new: list[Sentence] = []
        most = max(ENCODED_AHEAD, self.capacity - self.rows_in_use)
        while self.waiting and len(new) < most:
            _, first = heapq.heappop(self.waiting)
            if first in self.sentences:
                new.append(self.sentences[first])
        self.begun_count += len(new)
        if not new:
            return []
        try:
            memory, state = encode_batch(self.model, [one.source for one in new], self.device)
        except RuntimeError as error:
            logger.exception("encoding failed")
            return [failed(one.id, error) for one in new]
        self.memory = memory._replace(attended=[], initial=[])
        self.encoded = Encoded(new, [t.unsqueeze(1) for t in state], memory.attended)
        return []

    def step(
        self,
        lane: Lane,
        events: list[Event],
        moves: list[Move],
        most: int,
        in_time: Callable[[], bool],
    ) -> int:
        """One token for every row of a lane; up to `most` where nothing ends and there is time.
        Returns how many.

        What ends is told in `events` as it leaves the lane, and what changes its width in `moves`,
        so that a failure on the way loses nothing.
        """
        first = len(events)
        parents, made = lane.step(self.memory, most, in_time)
        for i in reversed(range(len(lane.sentences))):  # removing one moves the last
            one = lane.sentences[i]
            if one.ended:
                events.insert(first, one.event())
                self.release(one)
            elif len(one.live) != lane.width:
                state = [t[i : i + 1, parents[i]] for t in lane.state.live()]  # [1, K, ...]
                attended = [t[i : i + 1, : len(one.source)] for t in lane.attended.live()]
                moves.append(Move(one, state, [t.clone() for t in attended]))
            else:
                continue
            lane.remove(i)
            parents[i] = parents[-1]
            parents.pop()
        lane.reorder(parents)
        return made

    def settle(self, moves: list[Move]) -> list[Event]:
        """Put sentences into the lane of as many hypotheses as they have now; after all lanes have
        gone a step, or those that move into a later one would go two."""
        events: list[Event] = []
        for move in reversed(moves):
            width = len(move.sentence.live)
            try:
                self.lane(width, move.sentence).add([move.sentence], move.state, move.attended)
            except RuntimeError as error:
                logger.exception("no room for a beam")
                self.release(move.sentence)
                events.append(failed(move.sentence.id, error))
        return events

    @torch.inference_mode()
    def largest_memory(self) -> int:
        """Bytes that decoding takes at most, beside the weights, with every row in use.

        rows * (4 * state + 2 * logits) + (4 * rows + ahead) * longest source * attended: state is
        read, written and reordered, tables are at most four times as large as they need be, logits
        are looked at in blocks, and some sentences are encoded ahead. Then the buffers of CUDA
        graphs.
        """
        one = [[self.model.eos_id]]
        memory, state = encode_batch(self.model, one, self.device)
        attended = sum(t.nbytes for t in memory.attended)  # of one source token
        row = 4 * sum(t.nbytes for t in state)
        row += 2 * self.model.target_vocabulary * state[0].element_size()
        sentences = 4 * self.capacity + max(ENCODED_AHEAD, self.capacity)
        buffers = int(getattr(self.model, "most_bytes", 0))
        return self.capacity * row + sentences * self.model.max_source_length * attended + buffers


def always() -> bool:
    return True


def failed(sentence: int, error: Exception) -> Event:
    return Event(sentence, [], f"decoding failed: {type(error).__name__}")
