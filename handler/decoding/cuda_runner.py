"""A runner whose plain sentences go through recorded steps, and Python a block of steps ahead.

Greedy search and beams of the widths that are recorded go through `StaticLane`; all else (sampling,
constraints that need all logits, attention that is read, other widths) goes through `Lane`, kernel
by kernel, as on a CPU.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from handler.decoding.graphs import CudaGraphs, Recorder
from handler.decoding.lane import Kind, Lane
from handler.decoding.model import encode_batch
from handler.decoding.runner import Runner, guarded
from handler.decoding.scheduler import Report
from handler.decoding.sentence import Event, Sentence
from handler.decoding.static_lane import Sizes, StaticLane

logger = logging.getLogger(__name__)

AHEAD = 1  # blocks that are enqueued before the one before them is read
BLOCK = 4  # steps
WIDTHS = (1, 5)  # that are recorded


class CudaRunner(Runner):
    """See `Runner`.

    Args:
        rows: most hypotheses at once, over all lanes.
        widths: of the beams that are recorded; each takes memory for all rows.
        recorder: of steps.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        clock: Callable[[], float],
        rows: int,
        widths: Iterable[int] = WIDTHS,
        recorder: Recorder | None = None,
        tile: int = 0,
    ) -> None:
        super().__init__(model, device, clock)
        self.rows = rows
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.inference_mode():
            memory, state = encode_batch(model, [[model.eos_id]], device)
            self.memory = memory._replace(attended=[], initial=[])
            recorder = recorder or CudaGraphs(device)
            self.static = {
                width: StaticLane(
                    model, self.vocabulary, Kind(width, False, True, False),
                    Sizes(rows // width, model.max_source_length, model.max_target_length),
                    self.memory, (state, memory.attended), recorder, tile,
                )
                for width in sorted(set(widths)) if width <= rows
            }  # fmt: skip
            started = time.perf_counter()
            count = sum(lane.record() for lane in self.static.values())
            logger.info("%d steps recorded in %.1f s", count, time.perf_counter() - started)

    def kind_of(self, sentence: Sentence) -> Kind:
        plain = Kind.of(sentence, self.vocabulary._replace(fused=True))
        fixed = plain.fused and not plain.attends and plain.width in self.static
        return plain if fixed else plain._replace(fused=False)

    def lane_for(self, kind: Kind) -> Any:
        return self.static[kind.width] if kind.fused else super().lane_for(kind)

    def forget(self, lane: Lane | StaticLane) -> None:
        super().forget(lane)
        if isinstance(lane, StaticLane):
            lane.reset()

    def encode(self, sentences: list[Sentence]) -> list[Event]:
        """On a stream of its own: packing waits for lengths on the host, and would wait for all
        steps that are enqueued."""
        if self.side is None:
            return super().encode(sentences)
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            errors = super().encode(sentences)
        main.wait_stream(self.side)
        for one in sentences:
            if one.id in self.encoded:
                batch, _ = self.encoded[one.id]
                for table in [*batch.state, *batch.attended]:
                    table.record_stream(main)
                break
        return errors

    def run(self, steps: int, until: float = math.inf) -> Report:
        """A block of steps of every sentence in rows; what was told of the block before."""
        fresh, self.fresh = self.fresh, []
        events: list[Event] = []
        self.rest()
        steps = min(steps, BLOCK)
        for lane in list(self.lanes.values()):
            if isinstance(lane, StaticLane):
                events += self.fly(lane, steps)
        others = [lane for lane in self.lanes.values() if not isinstance(lane, StaticLane)]
        for lane in others:
            for _ in range(steps):
                if lane.kind in self.lanes and lane.place:
                    events += self.step(lane)
        began = [one for one in fresh if one in self.lane_of and self.has_begun(one)]
        self.fresh += [one for one in fresh if one in self.lane_of and one not in began]
        return Report(steps, began, events)

    def has_begun(self, sentence: int) -> bool:
        lane: Any = self.lane_of[sentence]
        if not isinstance(lane, StaticLane):
            return True
        return lane.known is not None and sentence in lane.known.place

    def fly(self, lane: StaticLane, steps: int) -> list[Event]:
        """Enqueue a block, and read the one before."""
        done, errors = guarded(lane.place, lane.ahead, steps, AHEAD)
        if done is None:
            self.forget(lane)
            return errors
        if not done:
            return []
        read, errors = guarded(done, lane.answers, done)
        self.leave(lane, done)
        return read or errors


