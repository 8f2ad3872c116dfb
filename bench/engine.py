"""What decoding costs beside the model: the engine over a model that is one look into a table.

    python -m bench.engine                    this checkout
    python -m bench.engine --beside FOLDER    and another one, say of the version before, in turns

One core. The next logits are those that a table has for the previous token, so nearly all of a step
is the engine's: choosing, bookkeeping, moving rows, letting sentences in and out. The model's own
time is taken by a clock around its methods, and left out of what is told of the engine. All times
are CPU times, which depend little on what share of the machine other processes take.

The native operators are compiled for it and loaded, as an archive of int8 weights has them.

The engine is kept full: sentences that end are followed by others, and each has a length of its
own, which alone ends it, so that at any time some end and some begin.

- forms: `plain` gives logits, from which the engine chooses; `fused` gives the best tokens of each
  row itself, as int8 models do (see `best` in model/quantized.py).
- searches: `greedy`; `beam 5`; `mixed`: greedy where of eight sentences four sample with top_p 0.9
  and three have no_repeat_ngram_size 3, repetition_penalty 1.2 and a min_length, one each.
- rows: sentences times beam, as many whole sentences as that allows, but at least one.

`bench.turns` makes the rounds and the table.
"""

import dataclasses
import gc
import itertools
import json
import random
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import handler
from handler.decoding import DecodingOptions, Engine, Event, native
from model.native import build
from model.native.build import digest

EOS, VOCABULARY = 3, 64
SHORTEST, LONGEST = 15, 35  # targets, in tokens
SOURCE = [*range(4, 15), EOS]
STEPS = {1: 2000, 16: 1000, 64: 200, 256: 80, 1024: 32}  # that are measured, by rows
WARM_UP = 40  # steps before those, in which the first sentences end
TOGETHER = 16  # steps that the engine is asked for at once, as the server does
AHEAD = 16  # sentences that wait, beside as many as are live
SAMPLED = DecodingOptions(sampling=True, top_p=0.9)
MIXED = [
    SAMPLED, DecodingOptions(no_repeat_ngram_size=3),
    SAMPLED, DecodingOptions(repetition_penalty=1.2),
    SAMPLED, DecodingOptions(min_length=SHORTEST),
    SAMPLED, DecodingOptions(),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """attention: whether the model has any. minimum: whether sentences have a min_length too, as
    long as their max_length, which makes the engine rule out EOS; in `mixed` they have not."""

    form: str
    search: str
    rows: int
    attention: bool
    minimum: bool

    @property
    def beam_size(self) -> int:
        return 5 if self.search == "beam 5" else 1

    @property
    def sentences(self) -> int:
        return max(1, self.rows // self.beam_size)

    def options(self, i: int, length: int) -> DecodingOptions:
        """Of sentence i."""
        if self.search != "mixed":
            least = length if self.minimum else 0
            return DecodingOptions(beam_size=self.beam_size, max_length=length, min_length=least)
        kind = MIXED[i % len(MIXED)]
        least, seed = min(kind.min_length, length), i if kind.sampling else None
        return dataclasses.replace(kind, max_length=length, min_length=least, seed=seed)


@dataclass(frozen=True)
class Found:
    """Of a case in one round. output: a checksum of the first translations."""

    engine: float  # microseconds of a step beyond the model's own
    model: float  # the model's own
    tokens: float  # a second of both
    busy: float  # CPU time over the time that passed
    output: int


def answer_all(folder: Path) -> None:
    """Answer each case of standard input, a line of JSON each way; but end where the packages are
    not those of `folder`, which would be measured in its name."""
    place = Path(handler.__file__ or "").resolve().parents[1]
    if place != folder.resolve():
        sys.exit(f"{folder}: its process has imported handler from {place}")
    torch.set_num_threads(1)
    # The searches in C++ of a checkout that has any; of each in a place of its own.
    libraries = Path(__file__).resolve().parents[1] / "build" / f"native-{digest()[:12]}"
    native.enable(build(libraries, native.library()).parent)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(measured(Case(**json.loads(line))))), flush=True)


class Memory(NamedTuple):
    attended: list[Tensor]
    initial: list[Tensor]


class TableModel:
    """Random logits for each previous token. Its state [rows, 4] is new after each step, as a
    network's is. `spent` are the seconds of `calls` of its methods, reading the clock included."""

    format_version, card = 3, "{}"
    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, EOS
    source_vocabulary = target_vocabulary = VOCABULARY
    max_source_length = max_target_length = 64

    def __init__(self, fused: bool, attention: bool) -> None:
        self.fused, self.has_attention = fused, attention
        self.logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.manual_seed(1))
        self.logits[:, EOS] = -30.0
        texts = self.logits.clone()
        texts[:, :EOS] = float("-inf")  # what no text has
        self.values, self.tokens = texts.sort(dim=1, descending=True, stable=True)
        self.normalisers = texts.logsumexp(1)
        self.spent, self.calls = 0.0, 0

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        started = time.process_time()
        attended = [torch.ones(*source.shape, 1)] if self.has_attention else []
        memory = Memory(attended, [torch.zeros(source.size(0), 4)])
        self.took(started)
        return memory

    def start(self, memory: Memory) -> list[Tensor]:
        return [memory.initial[0]]

    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        started = time.process_time()
        found = self.logits[previous], [state[0] + 1], self.weights(previous, memory)
        self.took(started)
        return found

    def best(
        self, previous: Tensor, state: list[Tensor], memory: Memory, count: int, normalised: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        started = time.process_time()
        values, tokens = self.values[:, :count][previous], self.tokens[:, :count][previous]
        total = self.normalisers[previous] if normalised else self.values.new_empty(0)
        found = values, tokens, total, [state[0] + 1], self.weights(previous, memory)
        self.took(started)
        return found

    def weights(self, previous: Tensor, memory: Memory) -> Tensor:
        if self.has_attention:
            return memory.attended[0].transpose(1, 2).expand(-1, previous.size(1), -1)
        return self.logits.new_empty([*previous.shape, 0])

    def took(self, started: float) -> None:
        self.calls += 1
        self.spent += time.process_time() - started


class Load:
    """An engine that is kept full. asked: the options of each sentence, by its id."""

    def __init__(self, case: Case) -> None:
        self.model = TableModel(case.form == "fused", case.attention)
        self.engine = Engine(self.model, rows=case.sentences * case.beam_size)
        draw = random.Random(1)
        lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(4096)]
        for i in range(case.sentences):  # as if these had begun before
            lengths[i] = draw.randint(1, lengths[i])
        self.following = itertools.cycle([*map(case.options, itertools.count(), lengths)])
        self.asked: dict[int, DecodingOptions] = {}
        self.ended: list[Event] = []
        for _ in range(2 * case.sentences + AHEAD):
            self.admit()

    def admit(self) -> None:
        options = next(self.following)
        self.asked[self.engine.admit(SOURCE, options)] = options

    def go(self, steps: int) -> int:
        """Make at least so many; returns how many."""
        first = self.engine.steps
        while self.engine.steps < first + steps:
            events = self.engine.advance(TOGETHER)
            self.ended += events
            for _ in events:
                self.admit()
        return self.engine.steps - first

    def translations(self) -> list[list[int]]:
        """Of what has ended since the last call, in the order of admission.

        Raises:
            RuntimeError: one failed, or has another length than it should have.
        """
        found, self.ended = sorted(self.ended, key=lambda event: event.sentence), []
        for event in found:
            asked = self.asked[event.sentence]
            if event.error or len(event.results[0].tokens) != asked.max_length:
                raise RuntimeError(f"{asked} became {event}")
        return [event.results[0].tokens for event in found]


def measured(case: Case) -> Found:
    load = Load(case)
    load.go(WARM_UP)
    # Of sentences that began together; those behind them depend on how many steps were made.
    output = load.translations()[: case.sentences]
    model, reading = load.model, time_of_reading()
    gc.collect()
    gc.freeze()  # or a look at all that torch has made would fall into one round or another
    model.spent, model.calls = 0.0, 0
    began, started = time.perf_counter(), time.process_time()
    steps = load.go(STEPS[case.rows])
    whole, passed = time.process_time() - started, time.perf_counter() - began
    read = model.calls * reading  # a call reads twice, once in its own time
    return Found(
        engine=1e6 * (whole - model.spent - read) / steps,
        model=1e6 * (model.spent - read) / steps,
        tokens=sum(map(len, load.translations())) / (whole - 2 * read),
        busy=whole / passed,
        output=zlib.crc32(json.dumps(output).encode()),
    )


def time_of_reading(times: int = 2000) -> float:
    """Seconds that reading the clock takes."""
    read = [time.process_time() for _ in range(times)]
    return (read[-1] - read[0]) / (times - 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # with the packages of any checkout, so none of `bench`
        answer_all(Path(sys.argv[2]))
    else:
        from bench.turns import main

        main(__doc__)
