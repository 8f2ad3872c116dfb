"""Carries out what a scheduler plans: encodes sentences, gives them rows, makes steps.

It holds lanes, memories and the model, and knows no policy. A tensor operation that raises fails
the sentences that it was working on, which are then forgotten, and no others: see failures.py. What
happened is returned, each sentence's end once.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handler.decoding import native
from handler.decoding.columns import LEAST_ROOM
from handler.decoding.failures import guarded
from handler.decoding.kinds import Kind, Vocabulary
from handler.decoding.lane import Lane
from handler.decoding.model import encode_batch
from handler.decoding.native_lane import NativeLane, Network
from handler.decoding.rows import sent
from handler.decoding.scheduler import ENCODED_AHEAD, Plan, Report
from handler.decoding.sentence import Event, Sentence


@dataclass(frozen=True, eq=False)
class Encoded:
    """Sentences that were encoded together: state [N, ...], attended memory [N, S, ...]."""

    sentences: list[Sentence]
    state: list[Tensor]
    attended: list[Tensor]


class Runner:
    """Torch's operators, for every model and every option.

    Args:
        model: see `SequenceModel`.
        clock: seconds, for `run`.
    """

    def __init__(self, model: Any, device: torch.device, clock: Callable[[], float]) -> None:
        self.model = model
        self.device = device
        self.clock = clock
        self.vocabulary = Vocabulary.of(model, device)
        # Whether searches of models that choose tokens themselves are native.
        self.native = native.searches() and self.vocabulary.fused
        self.network = Network.of(model) if self.native else None
        self.lanes: dict[Kind, Lane] = {}
        self.lane_of: dict[int, Lane] = {}  # by id, of sentences in rows
        self.encoded: dict[int, tuple[Encoded, int]] = {}  # batch and place, of those in none
        self.fresh: list[int] = []  # ids that have rows and no token yet
        # See `Engine.invariant`.
        self.invariant: bool | None = getattr(model, "invariant", None)
        self.memory: Any = None  # an empty one of the model's own type

    def apply(self, plan: Plan) -> Report:
        """Do what is planned; see `Plan`."""
        events: list[Event] = []
        for sentence in plan.drop:
            self.encoded.pop(sentence, None)
        for lane, ids in self.by_lane(plan.drop):
            self.leave(lane, ids)
        for lane, ids in self.by_lane(plan.expire):
            read, errors = guarded(ids, lane.answers, ids, True)
            events += read or errors
            self.leave(lane, ids)
        if plan.encode:
            events += self.encode(plan.encode)
        if plan.enter:
            events += self.enter([one for one in plan.enter if one in self.encoded])
        return Report(events=events)

    def by_lane(self, ids: Iterable[int]) -> list[tuple[Lane, list[int]]]:
        """The ids that have rows, by their lane."""
        found: dict[Lane, list[int]] = {}
        for one in ids:
            if one in self.lane_of:
                found.setdefault(self.lane_of[one], []).append(one)
        return list(found.items())

    def leave(self, lane: Any, ids: list[int]) -> None:
        lane.remove(ids)
        for one in ids:
            del self.lane_of[one]

    def forget(self, lane: Any) -> None:
        """Of a lane that has failed."""
        for one in lane.place:
            del self.lane_of[one]
        del self.lanes[lane.kind]

    def clear(self) -> None:
        """Begin anew, whatever state this is in."""
        self.lanes, self.lane_of, self.encoded, self.fresh = {}, {}, {}, []

    def rest(self) -> None:
        """Give back the memory of lanes that are empty."""
        self.lanes = {kind: lane for kind, lane in self.lanes.items() if lane.place}

    def encode(self, sentences: list[Sentence]) -> list[Event]:
        """Read sources together."""
        ids = [one.id for one in sentences]
        sources = [one.source for one in sentences]
        made, errors = guarded(ids, self.read, sources)
        if made is not None:
            memory, state = made
            if self.memory is None:
                self.memory = memory._replace(attended=[], initial=[])
            batch = Encoded(sentences, state, memory.attended)
            self.encoded |= {one: (batch, place) for place, one in enumerate(ids)}
        return errors

    def read(self, sources: list[Sequence[int]]) -> tuple[Any, list[Tensor]]:
        """See `encode_batch`."""
        return encode_batch(self.model, sources, self.device)

    def enter(self, ids: list[int]) -> list[Event]:
        """Give rows to sentences that are encoded."""
        events: list[Event] = []
        groups: dict[tuple[int, Kind], list[tuple[Encoded, int]]] = {}
        for one in ids:
            batch, place = self.encoded.pop(one)
            kind = self.kind_of(batch.sentences[place])
            groups.setdefault((id(batch), kind), []).append((batch, place))
        for (_, kind), members in groups.items():
            batch, places = members[0][0], [place for _, place in members]
            sentences = [batch.sentences[place] for place in places]
            lane = self.lane_for(kind)
            new = [one.id for one in sentences]
            _, errors = guarded(new, take_in, lane, batch, places, sentences)
            events += errors
            if not errors:
                self.lanes[kind] = lane
                self.lane_of |= dict.fromkeys(new, lane)
                self.fresh += new
        return events

    def run(self, steps: int, until: float = math.inf) -> Report:
        """Up to `steps` tokens of every sentence in rows: fewer where one ends, or where the clock
        comes to `until`."""
        began, self.fresh = self.fresh, []
        events: list[Event] = []
        made = 0
        self.rest()
        while made < steps and self.lane_of and not events:
            lanes = list(self.lanes.values())
            most = self.at_once(steps - made, until) if len(lanes) == 1 else 1
            before = lanes[0].clock
            for lane in lanes:
                events += self.step(lane, most, until)
            made += max(1, lanes[0].clock - before)
            if self.clock() >= until:
                break
        return Report(made, [one for one in began if one in self.lane_of], events)

    def at_once(self, steps: int, until: float) -> int:
        """Steps that a lane, where it is the only one, may make without the clock being read here;
        it can read that itself which counts seconds as the system does."""
        return steps if until == math.inf or self.clock is time.monotonic else 1

    def step(self, lane: Lane, steps: int = 1, until: float = math.inf) -> list[Event]:
        """One token of every sentence of a lane, or a few; what ended with the last."""
        return self.go(lane, lane.go_on, steps, until)

    def go(self, lane: Any, work: Callable[..., list[int]], *arguments: float) -> list[Event]:
        """Let a lane work; the events of those that have ended, whose ids `work` returns."""
        ids, errors = guarded(lane.place, work, *arguments)
        if ids is None:
            self.forget(lane)
            return errors
        if not ids:
            return []
        read, errors = guarded(ids, lane.answers, ids)
        self.leave(lane, ids)
        return read or errors

    def committed(self, sentence: int) -> list[int]:
        """See `Engine.committed`."""
        return self.lane_of[sentence].committed(sentence)

    def kind_of(self, sentence: Sentence) -> Kind:
        """The kind of lane that a sentence belongs in."""
        kind = Kind.of(sentence)
        if not self.vocabulary.fused:
            return kind._replace(plain=False)
        attends = self.native and kind.plain and sentence.options.reads_attention
        return kind._replace(attends=attends)

    def lane_for(self, kind: Kind) -> Any:
        if kind in self.lanes:
            return self.lanes[kind]
        if self.native and kind.plain and not kind.attends:
            return NativeLane(self.model, self.vocabulary, kind, self.memory, self.network)
        return Lane(self.model, self.vocabulary, kind, self.memory)

    @torch.inference_mode()
    def largest_memory(self, rows: int) -> int:
        """Bytes that `rows` rows take at most, beside the weights: of each

        - state, as it is, reordered, new, and copied where sentences join: 4 times;
        - logits, and the larger copies that drawing makes of them;
        - tokens of the live hypothesis and of a finished one, for up to twice the longest target,
          each written, copied and made longer;
        - the tokens of both as Python's numbers, when it ends;
        - where a model has attention, what each target token may pay, in half precision, written
          and made longer, for those who ask;
        - attended memory: tables at most 4 times as large as need be, and who is encoded ahead.
        """
        model = self.model
        memory, state = encode_batch(model, [[model.eos_id]], self.device)
        attended = sum(t.nbytes for t in memory.attended)  # of one source token
        source, target = model.max_source_length, 2 * max(model.max_target_length, LEAST_ROOM)
        row = 4 * sum(t.nbytes for t in state)
        row += model.target_vocabulary * (2 * state[0].element_size() + 4 * 8)
        row += 2 * 3 * 8 * target + 40 * target
        if model.has_attention:
            row += 2 * 2 * target * source
        sentences = 4 * rows + max(ENCODED_AHEAD, rows)
        buffers = int(getattr(model, "most_bytes", 0))
        return rows * row + sentences * source * attended + buffers


def take_in(lane: Lane, batch: Encoded, places: list[int], sentences: list[Sentence]) -> None:
    """Put some of a batch into a lane."""
    if len(places) == len(batch.sentences):
        lane.add(sentences, batch.state, batch.attended)
    else:
        at = sent(places, batch.state[0].device)
        state, attended = (
            [t.index_select(0, at) for t in tables] for tables in (batch.state, batch.attended)
        )
        lane.add(sentences, state, attended)
