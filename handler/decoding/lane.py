"""The live sentences that have equally many hypotheses and are searched alike: a lane.

One step of the model advances them all. Their rows are dense at every step; what is known of them
is columns. What steps chose is written down when somebody asks: mostly when a sentence ends.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handler.decoding.columns import (
    Columns,
    Fact,
    appended,
    compacted,
    equipped,
    fitted,
    new_columns,
    overwrite,
    score_type,
    stripped,
    wide_enough,
)
from handler.decoding.constraints import CONSTRAINTS, NEVER, PREFIX, Constraint
from handler.decoding.kinds import Kind, Vocabulary
from handler.decoding.reading import answers, committed
from handler.decoding.rows import Moves, Reserve, sent
from handler.decoding.sampling import draw
from handler.decoding.search import (
    Offer,
    Said,
    candidates,
    finishing,
    going_on,
    of_parents,
    paying,
    single,
    written,
)
from handler.decoding.selection import normalisers, top, without
from handler.decoding.sentence import Event, Sentence

PREFIX_PLACE = CONSTRAINTS.index(PREFIX)


class Lane:
    """N sentences of K hypotheses each.

    Args:
        model: a `SequenceModel`; a `FusedModel` where the lane is plain.
        empty: an empty memory of the model's own type.
    """

    columns: Columns
    attended: Reserve
    memory: Any
    active: list[tuple[Constraint, Tensor]]  # what any sentence asks for

    def __init__(self, model: Any, vocabulary: Vocabulary, kind: Kind, empty: Any) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.kind = kind
        self.empty = empty
        self.clock = 0  # steps that were made
        self.sentences: list[Sentence] = []  # by place
        self.place: dict[int, int] = {}  # by id, who came first before
        self.began: dict[int, int] = {}  # on the clock, by id
        self.vacant: list[int] = []  # places whose sentence has left
        self.due_at: dict[int, list[int]] = {}  # ids, by the clock at which they are long enough
        self.sources: Counter[int] = Counter()  # sentences by the length of their source
        self.asking = [0] * len(CONSTRAINTS)  # sentences that ask for each
        # Sentences of which log probabilities are needed; that read attention; that sample.
        self.scored = self.attending = self.sampling = 0
        # When, on the clock, a sentence comes to its minimum length.
        self.min_length_clocks: set[int] = set()
        self.too_short: Tensor | None = None  # see `short`
        self.all_present = True  # whether every sentence has all K hypotheses
        self.limited = False  # from the first hypothesis that finishes on
        self.state: list[Tensor] = []  # [N*K, ...]
        self.log: list[Said] = []  # of the last steps, not yet in `columns`
        self.stale = True  # whether `memory` is not that of the sentences

    def add(
        self, sentences: Sequence[Sentence], state: list[Tensor], attended: list[Tensor]
    ) -> None:
        """Take in sentences that begin: state [m, ...], attended memory [m, S, ...].

        On failure nothing is taken in.
        """
        width, count = self.kind.width, len(self.sentences)
        reused = min(len(sentences), len(self.vacant))
        behind = range(count, count + len(sentences) - reused)
        places = [*self.vacant[:reused], *behind]
        attends = any(one.options.reads_attention for one in sentences) or self.attending > 0
        samples = any(one.options.sampling for one in sentences) or self.sampling > 0
        wide = [t.unsqueeze(1).expand(-1, width, *t.shape[1:]) for t in state]  # [m, K, ...]
        if not count:
            columns = self.new(sentences, state, attends, samples)
            reserve = Reserve.like(attended)
            tables = [t.flatten(0, 1).contiguous() for t in wide]
        else:
            self.write()
            columns = equipped(self.columns, attends, samples)
            reserve, tables = self.attended, self.state
            if reused:
                some = places[:reused]
                at = some[0] if reused == 1 else sent(some, columns.facts.device)
                bos = self.vocabulary.bos
                columns = overwrite(columns, some, at, sentences[:reused], self.clock, bos)
                for table, new in zip(tables, wide):
                    table.view(count, width, *table.shape[1:])[at] = new[:reused]
            if behind:
                added = self.new(
                    sentences[reused:], state, columns.attention is not None,
                    columns.draws is not None,
                )  # fmt: skip
                columns = appended(columns, added)
                tables = [
                    torch.cat([table, rows[reused:].flatten(0, 1)])
                    for table, rows in zip(tables, wide)
                ]
        reserve = reserve.put(places, attended)
        self.columns, self.attended, self.state = columns, reserve, tables
        self.all_present = width == 1
        self.seat(sentences, places)
        for one in sentences:
            self.due_at.setdefault(self.clock + one.max_length, []).append(one.id)
            if one.options.min_length:
                self.min_length_clocks.add(self.clock + one.options.min_length)

    def seat(self, sentences: Sequence[Sentence], places: list[int]) -> None:
        """Note who begins where: at vacant places first, then behind the last."""
        reused = min(len(sentences), len(self.vacant))
        del self.vacant[:reused]
        self.sentences += sentences[reused:]
        for place, one in zip(places, sentences):
            self.sentences[place] = one
            self.place[one.id] = place
            self.began[one.id] = self.clock
            self.tally(one, 1)
        self.stale = True

    def new(
        self, sentences: Sequence[Sentence], state: list[Tensor], attends: bool, samples: bool
    ) -> Columns:
        return new_columns(
            sentences, self.clock, self.kind.width,
            score_type(state),
            self.vocabulary.never.device,
            bos=self.vocabulary.bos, attends=attends, samples=samples,
        )  # fmt: skip

    def tally(self, sentence: Sentence, one: int) -> None:
        """Note what a sentence makes its lane do, or (-1) that it has left."""
        self.sources[len(sentence.source)] += one
        if not self.sources[len(sentence.source)]:
            del self.sources[len(sentence.source)]
        self.scored += one * sentence.scored
        self.attending += one * sentence.options.reads_attention
        self.sampling += one * sentence.options.sampling
        if not self.kind.plain:
            for i, one_of in enumerate(CONSTRAINTS):
                self.asking[i] += one * bool(one_of.asked(sentence))

    def remove(self, ids: Sequence[int]) -> None:
        """Sentences leave; their places are vacant."""
        for one in ids:
            place = self.place.pop(one)
            del self.began[one]
            self.tally(self.sentences[place], -1)
            self.vacant.append(place)
        self.stale = True

    def close_up(self) -> None:
        """Let the last sentences take the vacant places."""
        self.write()
        self.vacant.sort()
        count, width = len(self.sentences), self.kind.width
        moves = Moves.without(self.vacant, count)
        columns = compacted(self.columns, moves)
        state = [
            moves.close(t.view(count, width, *t.shape[1:])).flatten(0, 1) for t in self.state
        ]
        attended = self.attended.close(moves)
        self.columns, self.attended, self.state = columns, attended, state
        self.reseat(moves)

    def reseat(self, moves: Moves) -> None:
        """Note who has moved; no place is vacant now."""
        for origin, target in zip(moves.origin, moves.target):
            self.sentences[target] = self.sentences[origin]
            self.place[self.sentences[target].id] = target
        del self.sentences[moves.kept :]
        self.vacant.clear()

    def write(self) -> None:
        """Put what the last steps chose into `columns`."""
        if not self.log:
            return
        before = self.clock - len(self.log)
        oldest = next(iter(self.began.values()), before)
        columns = fitted(self.columns, self.clock - oldest)
        room = columns.tokens.size(2) - len(self.log)
        made = (before - columns.fact(Fact.BEGAN)).long()
        if self.vacant:
            made = made.clamp(max=room)  # who has left may have been longer
        self.columns = written(columns, self.log, made)
        self.log = []

    def go_on(self, steps: int, until: float) -> list[int]:
        """Up to `steps` tokens for every sentence, at least one: fewer where one ends, or where
        the time on `time.monotonic` comes to `until`; the ids of those that have ended."""
        return self.step()

    def step(self) -> list[int]:
        """One token for every sentence; the ids of those that have ended."""
        if self.vacant:
            self.close_up()
        if self.stale:
            self.refresh()
        elif self.clock in self.min_length_clocks:
            self.hold()
        state, width = self.state, self.kind.width
        if width > 1:
            parents = self.columns.parents
            first = torch.arange(0, parents.numel(), width, device=parents.device)
            rows = (parents + first.unsqueeze(1)).flatten()
            state = [t.index_select(0, rows) for t in state]
        offer, self.state = self.offer(state)
        if self.columns.attention is not None:
            made = self.made()
            room = fitted(self.columns, self.clock - next(iter(self.began.values())) + 1)
            attention = paying(room.attention, offer.paid, made)  # type: ignore[arg-type]
            self.columns = dataclasses.replace(room, attention=attention)
        ended = self.choose_one(offer) if width == 1 else self.choose_many(offer)
        self.clock += 1
        ids = [self.sentences[place].id for place in ended]
        due = [one for one in self.due_at.pop(self.clock, ()) if one in self.place]
        return list(dict.fromkeys([*ids, *due])) if due else ids

    def refresh(self) -> None:
        """Look again at who is there."""
        longest = max(self.sources)
        self.columns = stripped(self.columns, self.attending > 0, self.sampling > 0)
        if self.columns.attention is not None:  # steps pay all sources, asked for or not
            self.columns.attention = wide_enough(self.columns.attention, longest)
        self.memory = self.empty._replace(attended=self.attended.live(longest))
        self.active = [
            (one, self.columns.asked[i]) for i, one in enumerate(CONSTRAINTS) if self.asking[i]
        ]
        self.hold()
        self.stale = False

    def hold(self) -> None:
        """Find out who must not end yet."""
        self.too_short = None
        self.min_length_clocks = {clock for clock in self.min_length_clocks if clock > self.clock}
        if self.min_length_clocks:
            self.too_short = (self.columns.fact(Fact.MAY_END) > self.clock).unsqueeze(1)

    def choose_one(self, offer: Offer) -> list[int]:
        """Go on with the tokens that are offered; the places of those that do not."""
        scores, tokens = single(self.columns, offer)
        self.log.append(Said(tokens, None))
        self.columns.previous, self.columns.scores = tokens, scores
        ends = tokens == self.vocabulary.eos
        if math.isfinite(scores.masked_fill(ends, NEVER).sum().item()):
            return []
        return (ends | ~scores.isfinite()).squeeze(1).nonzero().squeeze(1).tolist()

    def choose_many(self, offer: Offer) -> list[int]:
        """Go on with the best of the continuations; the places of those where none can win."""
        width, columns = self.kind.width, self.columns
        found = candidates(columns, offer, self.vocabulary.eos, self.all_present)
        scores, parents, tokens = (t[:, :width] for t in found[:3])
        quiet = math.isfinite(scores.masked_fill(found.ends[:, :width], NEVER).sum().item())
        if not quiet:
            self.write()
            columns = finishing(self.columns, found, self.made(), width)
            scores, parents, tokens = going_on(found, width)
            self.limited = True
        self.all_present = quiet
        attention = columns.attention
        if attention is not None:
            covered = of_parents(attention.covered, parents)
            attention = dataclasses.replace(attention, covered=covered)
        tokens = tokens.contiguous()  # as native operators read them
        self.log.append(Said(tokens, parents))
        self.columns = dataclasses.replace(
            columns, previous=tokens, scores=scores, parents=parents, attention=attention
        )
        if not self.limited:
            return []
        best = scores[:, 0]
        going = (best > columns.fact(Fact.HOPELESS)) & (best < math.inf)
        return [] if bool(going.all()) else (~going).nonzero().squeeze(1).tolist()

    def offer(self, state: list[Tensor]) -> tuple[Offer, list[Tensor]]:
        """A step of the model: what it offers, and the new state."""
        columns, width = self.columns, self.kind.width
        count = min(2 * width, self.vocabulary.size) if width > 1 else 1
        if self.kind.plain:
            return self.chosen(state, count)
        logits, state, paid = self.model.step(columns.previous, state, self.memory)
        normaliser, logits = self.allowed(logits)
        values, tokens = top(logits, count)
        if columns.draws is not None:
            rows = columns.draws.samples.nonzero().squeeze(1)
            found = draw(logits[rows, 0], columns.draws.part(rows), self.made()[rows])
            values, tokens = (
                table.index_copy(0, rows, drawn.view(-1, 1, 1))
                for table, drawn in zip((values, tokens), found)
            )
        return Offer(values, tokens, normaliser, paid), state

    def chosen(self, state: list[Tensor], count: int) -> tuple[Offer, list[Tensor]]:
        """The same of a model that chooses itself: one more token where EOS may be among them and
        must not."""
        scored, short = self.scored > 0, self.too_short
        more = count if short is None else min(count + 1, self.vocabulary.size)
        values, tokens, normaliser, state, paid = self.model.best(
            self.columns.previous, state, self.memory, more, scored
        )
        if short is not None:
            values, tokens = without(self.vocabulary.eos, short, values, tokens)
        return Offer(values, tokens, normaliser if scored else None, paid), state

    def allowed(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """The normaliser [N, K] of what the model says, where anything is scored; and logits
        [N, K, V] with what no sentence may become at -inf."""
        if self.vocabulary.shortlisted:
            some = self.model.allowed(self.memory)  # [N, V]
            due = self.due()
            if due is not None:
                named = due.clamp(min=0).unsqueeze(1)
                some = some.scatter(1, named, some.gather(1, named) | (due >= 0).unsqueeze(1))
            logits.masked_fill_(~some.unsqueeze(1), NEVER)
        logits.index_fill_(2, self.vocabulary.never, NEVER)
        for constraint, asked in self.active:
            if constraint.probable:
                logits = constraint.apply(logits, asked, self)
        normaliser = normalisers(logits) if self.scored else None
        for constraint, asked in self.active:
            if not constraint.probable:
                logits = constraint.apply(logits, asked, self)
        return normaliser, logits

    # What constraints look at

    @property
    def eos(self) -> int:
        return self.vocabulary.eos

    def short(self) -> Tensor | None:
        return self.too_short

    def due(self) -> Tensor | None:
        if not self.asking[PREFIX_PLACE]:
            return None
        return PREFIX.next(self.columns.asked[PREFIX_PLACE], self.made())

    def made(self) -> Tensor:
        """int64 [N]: the tokens that sentences have."""
        return (self.clock - self.columns.fact(Fact.BEGAN)).long()

    def said(self) -> Tensor:
        """int64 [N, K, T]: these tokens."""
        self.write()
        return self.columns.tokens

    def answers(self, ids: Sequence[int], late: bool = False) -> list[Event]:
        """What sentences have, that have ended or whose time is over (`late`)."""
        self.write()
        places = [self.place[one] for one in ids]
        made = [self.clock - self.began[one] for one in ids]
        sentences = [self.sentences[place] for place in places]
        return answers(self.columns, sentences, places, made, self.vocabulary.eos, late)

    def committed(self, sentence: int) -> list[int]:
        self.write()
        made = self.clock - self.began[sentence]
        return committed(self.columns, self.place[sentence], made)
