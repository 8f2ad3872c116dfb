"""A lane at fixed addresses, whose steps are recorded and made ahead of what is known of them.

Every sentence has a place, and state and tokens stay where they are: a step reads and writes the
same memory each time, asks nothing on the host, and can be replayed as a graph. Several steps are
enqueued before what the ones before chose is read. A sentence that ends keeps its state until the
host has read it; what is computed for it meanwhile is discarded.
"""

import heapq
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from handler.decoding.columns import (
    Columns,
    Fact,
    Finished,
    mapped,
    overwrite,
    score_type,
)
from handler.decoding.constraints import NEVER
from handler.decoding.graphs import Recorder, bucket
from handler.decoding.kinds import Kind, Vocabulary
from handler.decoding.reading import answers, committed
from handler.decoding.rows import sent
from handler.decoding.sentence import Event, Sentence, unbegun
from handler.decoding.static_search import Board

logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """sentences: places. source, target: the most tokens of one."""

    sentences: int
    source: int
    target: int


class Grid(NamedTuple):
    """Which sizes of a step are recorded, in order; the last of each is the largest."""

    sentences: list[int]
    sources: list[int]

    @classmethod
    def of(cls, sizes: Sizes, width: int) -> "Grid":
        """Below 64 rows a step takes as long as its weights take to be read, whatever the rows, so
        few sizes do; beyond, one for each power of two. Of sources three."""
        rows = [1, 16, *(2**power for power in range(6, 17))]
        sentences = {min(-(-one // width), sizes.sentences) for one in rows}
        sources = {min(one, sizes.source) for one in (32, 128, sizes.source)}
        return cls(sorted(sentences | {sizes.sentences}), sorted(sources))


class Block(NamedTuple):
    """What some steps led to: who was there, at which place, and what is on the host once `ready`
    has happened."""

    place: dict[int, int]
    board: Board
    ready: Any  # torch.cuda.Event; None where nothing has to be waited for


class StaticLane:
    """Places for sentences of K hypotheses each.

    Args:
        model: a `SequenceModel`.
        example: state [1, ...] and attended memory [1, S, ...] of some sentence, for their types.
        tile: rows that the model computes at once, once `use_tiles` was called; else all.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary, kind: Kind, sizes: Sizes, empty: Any,
        example: tuple[list[Tensor], list[Tensor]], recorder: Recorder, tile: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.vocabulary = vocabulary
        self.kind = kind
        places, self.at_once = whole_tiles(sizes.sentences, kind.width, tile)
        sizes = sizes._replace(sentences=places)
        self.sizes = sizes
        self.empty = empty
        self.recorder = recorder
        self.tiled = False
        self.grid = Grid.of(sizes, kind.width)
        self.device = vocabulary.never.device
        count, width = sizes.sentences, kind.width
        state, attended = example
        self.state = [t.new_zeros(count * width, *t.shape[1:]) for t in state]
        self.attended = [t.new_zeros(count, sizes.source, *t.shape[2:]) for t in attended]
        self.board = board_of(sizes, width, vocabulary.bos, score_type(state), self.device)
        rows = torch.arange(0, count * width, width, device=self.device)
        self.row_offsets = rows.unsqueeze(1)  # [N, 1], of each sentence
        self.replays: dict[tuple[int, int], Any] = {}
        self.spare: list[Board] = []  # on the host, for the blocks to come
        self.reset()

    def reset(self) -> None:
        """Forget every sentence."""
        self.unmarked = list(range(self.sizes.sentences))  # places, yet to be marked as over
        self.ended: set[int] = set()  # ids, of which is known that they have ended
        self.place: dict[int, int] = {}  # by id, who came first before
        self.sentences: dict[int, Sentence] = {}  # by id
        self.vacant = list(range(self.sizes.sentences))  # a heap: low places first
        self.blocks: deque[Block] = deque()  # not yet read
        self.known: Block | None = None  # that was read last

    # Sentences come and go

    def add(
        self, sentences: Sequence[Sentence], state: list[Tensor], attended: list[Tensor]
    ) -> None:
        """Take in sentences that begin: state [m, ...], attended memory [m, S, ...].

        On failure nothing is taken in: what was written, is at places that nobody has.
        """
        width, count = self.kind.width, self.sizes.sentences
        self.mark()
        places = heapq.nsmallest(len(sentences), self.vacant)
        at = sent(places, self.device)
        self.board.columns = overwrite(
            self.board.columns, places, at, sentences, 0, self.vocabulary.bos
        )
        self.board.made.index_fill_(0, at, 0)
        self.board.longest[at] = sent([one.max_length for one in sentences], self.device)
        for table, new in zip(self.state, state):
            wide = new.unsqueeze(1).expand(-1, width, *new.shape[1:])
            table.view(count, width, *table.shape[1:])[at] = wide
        for table, new in zip(self.attended, attended):
            table.index_fill_(0, at, 0)
            table[:, : new.size(1)].index_copy_(0, at, new)
        self.board.over.index_fill_(0, at, False)
        for place, one in zip(places, sentences):
            heapq.heappop(self.vacant)
            self.place[one.id] = place
            self.sentences[one.id] = one

    def remove(self, ids: Sequence[int]) -> None:
        """Sentences leave; their places are vacant. No tensor is touched, so it cannot fail."""
        for one in ids:
            place = self.place.pop(one)
            del self.sentences[one]
            heapq.heappush(self.vacant, place)
            if one not in self.ended:
                self.unmarked.append(place)
            self.ended.discard(one)

    def mark(self) -> None:
        """Mark the places of those who have left as over."""
        if self.unmarked:
            self.board.over.index_fill_(0, sent(self.unmarked, self.device), True)
            self.unmarked = []

    def close_up(self) -> None:
        """Move the last sentences to low vacant places, if that allows a smaller recorded step."""
        highest = max(self.place.values()) + 1
        count = bucket(len(self.place), self.grid.sentences)
        if bucket(highest, self.grid.sentences) <= 2 * count:
            return
        moved = sorted((one for one, place in self.place.items() if place >= count),
                       key=self.place.__getitem__)  # fmt: skip
        target = heapq.nsmallest(len(moved), self.vacant)
        origin = [self.place[one] for one in moved]
        at, to = sent(origin, self.device), sent(target, self.device)
        width, places = self.kind.width, self.sizes.sentences
        state = [t.view(places, width, *t.shape[1:]) for t in self.state]
        for table in [*self.board.tables(), *state, *self.attended]:
            table.index_copy_(0, to, table.index_select(0, at))
        self.board.over.index_fill_(0, at, True)
        for one, place in zip(moved, target):
            self.place[one] = place
        self.vacant = sorted({*self.vacant, *origin} - set(target))

    # Steps

    def record(self) -> int:
        """Record the steps of the whole grid; returns how many. Nobody may be there. A size that
        cannot be recorded is computed kernel by kernel."""
        for count in self.grid.sentences:
            for source in self.grid.sources:
                compute = partial(self.compute, count, source)
                try:
                    self.replays[count, source] = self.recorder.record(compute)
                except RuntimeError as error:
                    told = str(error).partition("\n")[0]
                    logger.warning("no graph for %d of %d tokens: %s", count, source, told)
                    self.replays[count, source] = compute
        return len(self.replays)

    def enqueue(self, steps: int) -> None:
        """Make steps, and have what they led to brought to the host."""
        self.mark()
        self.close_up()
        count = bucket(max(self.place.values()) + 1, self.grid.sentences)
        longest = max(len(one.source) for one in self.sentences.values())
        source = bucket(longest, self.grid.sources)
        replay = self.replays.get((count, source)) or partial(self.compute, count, source)
        for _ in range(steps):
            replay()
        board = self.spare.pop() if self.spare else self.host_board()
        for there, here in zip(board.tables(), self.board.tables()):
            there[:count].copy_(here[:count], non_blocking=True)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        self.blocks.append(Block(dict(self.place), board, ready))

    def ahead(self, steps: int, behind: int) -> list[int]:
        """Enqueue steps, and read what is more than `behind` blocks old; the ids of who ended."""
        self.enqueue(steps)
        ended: list[int] = []
        while len(self.blocks) > behind:
            ended += self.land()
        return ended

    def host_board(self) -> Board:
        pinned = self.device.type == "cuda"

        def twin(table: Tensor, _: Tensor) -> Tensor:
            return torch.empty(table.shape, dtype=table.dtype, pin_memory=pinned)

        board: Board = mapped(twin, self.board, self.board)
        return board

    def land(self) -> list[int]:
        """Wait for the oldest block, of which is known then; the ids of who ended with it."""
        block = self.blocks.popleft()
        if block.ready is not None:
            block.ready.synchronize()
        if self.known is not None:
            self.spare.append(self.known.board)
        self.known = block
        over = block.board.over.tolist()
        ended = [
            one for one, at in block.place.items()
            if one in self.place and one not in self.ended and over[at]
        ]  # fmt: skip
        self.ended.update(ended)
        return ended

    def compute(self, count: int, source: int) -> None:
        """A step of the first `count` places, of which sources have at most so many tokens."""
        board, width = self.board.part(count), self.kind.width
        rows = count * width
        state = [t[:rows] for t in self.state]
        before = state
        if width > 1:
            origin = (board.columns.parents + self.row_offsets[:count]).flatten()
            before = torch.ops.seq2serve.gather_rows(state, origin)
        logits, after = self.logits(board.columns.previous, before, count, source)
        choices = 2 if width == 1 else min(2 * width + 1, self.vocabulary.size)
        values, tokens, normaliser = torch.ops.seq2serve.choose(
            logits, self.vocabulary.never, choices, True
        )
        torch.ops.seq2serve.advance(
            values, tokens, normaliser, self.vocabulary.eos, board.tables()
        )
        torch._foreach_copy_(state, after)

    def logits(
        self, previous: Tensor, state: list[Tensor], count: int, source: int
    ) -> tuple[Tensor, list[Tensor]]:
        """What the model says to `count` sentences, [N*K, V], and their next state; in tiles of
        one size, if need be, so that no row depends on how many are beside it."""
        width, at_once = self.kind.width, self.at_once if self.tiled else count
        said, after = [], []
        for first in range(0, count, at_once):
            places = slice(first, first + at_once)
            rows = slice(places.start * width, places.stop * width)
            memory = self.empty._replace(attended=[t[places, :source] for t in self.attended])
            logits, new, _ = self.model.step(previous[places], [t[rows] for t in state], memory)
            if self.vocabulary.shortlisted:
                logits.masked_fill_(~self.model.allowed(memory).unsqueeze(1), NEVER)
            said.append(logits.flatten(0, 1))
            after.append(new)
        if len(said) == 1:
            return said[0], after[0]
        return torch.cat(said), [torch.cat(tables) for tables in zip(*after)]

    def use_tiles(self, use: bool) -> None:
        """From now on; nothing may be recorded yet."""
        self.tiled = use
        sizes = Grid.of(self.sizes, self.kind.width).sentences
        if use:
            sizes = sorted({rounded(size, self.at_once) for size in sizes})
        self.grid = self.grid._replace(sentences=sizes)

    @torch.inference_mode()
    def is_invariant(self) -> bool:
        """Whether the first place gets the same logits, to the bit, however many places are
        computed. Nobody may be there."""
        seed = torch.Generator().manual_seed(1)
        for table in [*self.state, *self.attended]:
            if table.is_floating_point():
                table.copy_(torch.randn(table.shape, generator=seed))
            else:
                table.fill_(True)
        width, expected = self.kind.width, None
        for count in self.grid.sentences:
            previous = self.board.columns.previous[:count]
            state = [t[: count * width] for t in self.state]
            logits, _ = self.logits(previous, state, count, self.grid.sources[0])
            expected = logits[:width].clone() if expected is None else expected
            if not torch.equal(expected, logits[:width]):
                return False
        return True

    # What is known

    def answers(self, ids: Sequence[int], late: bool = False) -> list[Event]:
        """What is known of sentences that have ended or whose time is over (`late`)."""
        known = self.known
        there = [one for one in ids if known is not None and one in known.place]
        events = [unbegun(self.sentences[one]) for one in ids if one not in there]
        if there and known is not None:
            places = [known.place[one] for one in there]
            made = known.board.made[places].tolist()
            sentences = [self.sentences[one] for one in there]
            eos = self.vocabulary.eos
            events += answers(known.board.columns, sentences, places, made, eos, late)
        return events

    def committed(self, sentence: int) -> list[int]:
        known = self.known
        if known is None or sentence not in known.place:
            return []
        place = known.place[sentence]
        return committed(known.board.columns, place, int(known.board.made[place]))


def whole_tiles(sentences: int, width: int, tile: int) -> tuple[int, int]:
    """Places for so many sentences, in tiles that all have one size; and the places of a tile."""
    at_once = min(max(tile // width, 1), sentences)
    return rounded(sentences, at_once), at_once


def rounded(size: int, by: int) -> int:
    """Up to a multiple."""
    return -(-size // by) * by


def board_of(
    sizes: Sizes, width: int, bos: int, dtype: torch.dtype, device: torch.device
) -> Board:
    """Places that nobody has."""
    n = sizes.sentences
    room = sizes.target + 1  # EOS is written too

    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    facts = torch.zeros((n, len(Fact)), dtype=torch.double, device=device)
    for one in (Fact.N_BEST, Fact.SCALE):  # one answer; no division by zero
        facts[:, int(one)] = 1.0
    never = torch.full((n, width), NEVER, dtype=torch.double, device=device)
    finished = None
    if width > 1:
        finished = Finished(
            never, never.to(dtype, copy=True), whole(n, width), whole(n, width, room),
            whole(n, width, 0),
        )  # fmt: skip
    columns = Columns(
        facts=facts, previous=whole(n, width) + bos, scores=never.to(dtype, copy=True),
        parents=torch.arange(width, device=device).repeat(n, 1), tokens=whole(n, width, room),
        asked=[], finished=finished, attention=None, draws=None,
    )  # fmt: skip
    return Board(columns, whole(n), whole(n) + 1, torch.ones(n, dtype=torch.bool, device=device))
