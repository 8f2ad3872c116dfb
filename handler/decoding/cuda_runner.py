"""A runner whose plain sentences go through recorded steps, and Python a block of steps ahead.

Greedy search and beams of the widths that are recorded go through `StaticLane`; all else (sampling,
constraints that need all logits, attention that is read, other widths) goes through `Lane`, kernel
by kernel, as on a CPU.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handler.decoding.columns import Fact
from handler.decoding.graphs import CudaGraphs, Recorder
from handler.decoding.kinds import Kind
from handler.decoding.lane import Lane
from handler.decoding.model import encode_batch
from handler.decoding.runner import Runner
from handler.decoding.scheduler import Report
from handler.decoding.sentence import Event, Sentence
from handler.decoding.static_lane import Sizes, StaticLane, whole_tiles

logger = logging.getLogger(__name__)

BLOCKS_AHEAD = 1  # that are enqueued before the one before them is read
BLOCK_STEPS = 4
TILE = 64  # rows; below that a product takes as long as its weights take to be read
FEWEST_ROWS = 64
MOST_ROWS = 1024  # that `rows: auto` chooses; on an H100 more made no more tokens a second
SPARE = 0.8  # of the memory that is free, which may be planned with


@dataclass(frozen=True)
class CudaOptions:
    """widths: beam sizes whose steps are recorded, each with memory for all rows.
    tiles: rows that are computed at once where more would make a row depend on how many are beside
    it; False allows that.
    """

    widths: tuple[int, ...] = (1, 5)
    tiles: bool = True


class CudaRunner(Runner):
    """See `Runner`.

    Args:
        rows: most hypotheses at once, over all lanes.
        recorder: of steps.

    Raises:
        ValueError: the device has too little memory for so many rows.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        clock: Callable[[], float],
        rows: int,
        options: CudaOptions = CudaOptions(),
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(model, device, clock)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.invariant = True  # until a lane shows otherwise
        widths = [width for width in sorted(set(options.widths)) if width <= rows]
        with torch.inference_mode():
            memory, state = encode_batch(model, [[model.eos_id]], device)
            self.memory = memory._replace(attended=[], initial=[])
            check_memory(model, device, rows, widths)
            recorder = recorder or CudaGraphs(device)
            self.static = {
                width: StaticLane(
                    model, self.vocabulary,
                    Kind(width, plain=True),
                    Sizes(rows // width, model.max_source_length, model.max_target_length),
                    self.memory, (state, memory.attended), recorder, TILE,
                )
                for width in widths
            }  # fmt: skip
            for lane in self.static.values():
                self.settle_tiles(lane, options.tiles)
            started = time.perf_counter()
            count = sum(lane.record() for lane in self.static.values())
        pools = torch.cuda.memory_reserved(device) / 1e6 if device.type == "cuda" else 0.0
        logger.info(
            "%d steps recorded in %.1f s for beams of %s; %.0f MB of the device are taken",
            count, time.perf_counter() - started, widths, pools,
        )  # fmt: skip

    def settle_tiles(self, lane: StaticLane, tiles: bool) -> None:
        """Compute in tiles if a row's logits would otherwise depend on how many rows there are."""
        if lane.is_invariant():
            return
        if tiles:
            lane.use_tiles(True)
            if lane.is_invariant():
                logger.info("beams of %d: %d rows at once", lane.kind.width, TILE)
                return
            lane.use_tiles(False)
        self.invariant = False
        logger.warning(
            "beams of %d: a sentence may depend on those beside it in its last bits",
            lane.kind.width,
        )

    def kind_of(self, sentence: Sentence) -> Kind:
        kind = Kind.of(sentence)
        attends = sentence.options.reads_attention
        recorded = kind.plain and not attends and kind.width in self.static
        return kind if recorded else kind._replace(plain=False)

    def lane_for(self, kind: Kind) -> Any:
        return self.static[kind.width] if kind.plain else super().lane_for(kind)

    def clear(self) -> None:
        super().clear()
        for lane in self.static.values():
            lane.reset()

    def forget(self, lane: Lane | StaticLane) -> None:
        super().forget(lane)
        if isinstance(lane, StaticLane):
            lane.reset()

    def read(self, sources: list[Sequence[int]]) -> tuple[Any, list[Tensor]]:
        """On a stream of its own: packing waits for lengths on the host, and would wait for all
        steps that are enqueued."""
        if self.side is None:
            return super().read(sources)
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            memory, state = super().read(sources)
        main.wait_stream(self.side)
        for table in [*state, *memory.attended]:
            table.record_stream(main)
        return memory, state

    def run(self, steps: int, until: float = math.inf) -> Report:
        """Enqueue a block of steps for every sentence in rows, and report what the block before
        led to. A block is short: `until` is the caller's to look at."""
        fresh, self.fresh = self.fresh, []
        events: list[Event] = []
        self.rest()
        steps = min(steps, BLOCK_STEPS)
        for lane in list(self.lanes.values()):
            if isinstance(lane, StaticLane):
                events += self.go(lane, lane.ahead, steps, BLOCKS_AHEAD)
        others = [lane for lane in self.lanes.values() if not isinstance(lane, StaticLane)]
        for lane in others:
            for _ in range(steps):
                if lane.kind in self.lanes and lane.place:
                    events += self.step(lane)
        began: list[int] = []
        for one in fresh:
            if one in self.lane_of:
                (began if self.has_begun(one) else self.fresh).append(one)
        return Report(steps, began, events)

    def has_begun(self, sentence: int) -> bool:
        lane: Any = self.lane_of[sentence]
        if not isinstance(lane, StaticLane):
            return True
        return lane.known is not None and sentence in lane.known.place

    def largest_memory(self, rows: int) -> int:
        static = static_bytes(self.model, self.device, rows, [*self.static])
        return super().largest_memory(rows) + static


@torch.inference_mode()
def static_bytes(
    model: Any, device: torch.device, rows: int, widths: Sequence[int]
) -> int:
    """Bytes of the static lanes, beside the weights, with the temporaries of their largest step:

    - of each place the state, the longest source, and the board (`static_search.Board`);
    - of each row in a step logits in two formats, and its state twice more.
    """
    memory, state = encode_batch(model, [[model.eos_id]], device)
    of_state = sum(t.nbytes for t in state)
    attended = sum(t.nbytes for t in memory.attended) * model.max_source_length
    room = model.max_target_length + 1
    total = 0
    for width in widths:
        tables = 2 if width > 1 else 1  # of tokens
        board = 8 * (len(Fact) + 3 + width * (tables * room + 6))
        place = width * of_state + attended + board
        step = width * (model.target_vocabulary * (4 + state[0].element_size()) + 2 * of_state)
        places, _ = whole_tiles(rows // width, width, TILE)
        total += places * (place + step)
    return total


def check_memory(model: Any, device: torch.device, rows: int, widths: list[int]) -> None:
    """Refuse rows for which a device has too little memory."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    needed = static_bytes(model, device, rows, widths)
    if needed > free:
        raise ValueError(
            f"handler.rows: got {rows}, which take {needed / 1e6:,.0f} MB for beams of {widths}; "
            f"allowed: what fits into the {free / 1e6:,.0f} MB that the device has free; lower "
            "handler.rows or name fewer handler.beams"
        )


def rows_for(model: Any, device: torch.device, widths: Sequence[int]) -> int:
    """Rows for a device whose number nobody has named: `FEWEST_ROWS` on a CPU, on a GPU up to
    `MOST_ROWS`, a power of two, for which it has memory to spare."""
    if device.type != "cuda":
        return FEWEST_ROWS
    free, _ = torch.cuda.mem_get_info(device)
    rows = MOST_ROWS
    while rows > FEWEST_ROWS and static_bytes(model, device, rows, widths) > SPARE * free:
        rows //= 2
    return rows
