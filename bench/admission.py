"""What a client that streams notices of another one's expensive request.

    python -m bench.admission                    this checkout
    python -m bench.admission --beside FOLDER    and another one, in turns
    python -m bench.admission --large alignments breaks n_best

The service alone, without TorchServe, over a model whose steps take a millisecond each, whatever
the rows. Three clients, each of which asks again as soon as it is answered: one streams a
translation of many tokens; one sends something large; one sends a single short sentence. Told are
the gaps between two events of the stream, the time of the two others from request to answer, all in
rounds (`round_ms`), and by how much the process has grown at its largest. All times are CPU times
of one core, which depend little on what share of the machine other processes take. The large one:

- sentences: 4,096 short sentences in 1,024 texts
- alignments: 60 texts of some 200 tokens with `return_alignments`, 40 target tokens each
- too_long: the same with 250 target tokens each: more than an answer may have
- breaks: two words with 125,000 line breaks between them, and their 64 best translations
- n_best: the 64 best translations of each of 1,024 texts
- one_line: 250 kB of one line that is not split, too long for the model
- stream: as `sentences`, streamed
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import handler
from handler.decoding import Engine
from handler.request import JSON
from handler.service import Incoming, Service
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer
from training.recipe import TokenizerOptions
from training.tokenizer import learn

SCRIPT = Path(__file__).resolve()
KINDS = ("sentences", "stream", "alignments", "too_long", "breaks", "n_best", "one_line")
TEXTS, SENTENCES, WORDS = 1024, 4, 8  # sentences of each text, words of each sentence
STEP = 0.001  # seconds
EOS = 3


@dataclass(frozen=True)
class Found:
    """In rounds; but for what the process grew by, MiB, and how the large requests were answered:
    their number by status."""

    gap_p50: float
    gap_p99: float
    gap_most: float
    small_p50: float
    small_p99: float
    large_p50: float
    grown: float
    answered: dict[str, int]


class Memory(NamedTuple):
    attended: list[Tensor]
    initial: list[Tensor]


class TableModel:
    """Random logits for each previous token; EOS never comes. Attention is equal shares."""

    format_version, card = 3, "{}"
    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, EOS
    max_source_length, max_target_length = 256, 2048

    def __init__(self, vocabulary: int, attention: bool) -> None:
        self.has_attention = attention
        self.source_vocabulary = self.target_vocabulary = vocabulary
        self.logits = torch.randn(vocabulary, vocabulary, generator=torch.manual_seed(1))
        self.logits[:, :4] = -30.0

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        attended = [torch.ones(*source.shape, 1)] if self.has_attention else []
        return Memory(attended, [torch.zeros(source.size(0), 4)])

    def start(self, memory: Memory) -> list[Tensor]:
        return [memory.initial[0]]

    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        over = time.process_time() + STEP
        length = memory.attended[0].size(1) if self.has_attention else 0
        paid = self.logits.new_full([*previous.shape, length], 1 / max(length, 1))
        found = self.logits[previous], [state[0] + 1], paid
        while time.process_time() < over:
            pass
        return found


class Client:
    """Asks again and again. `took`: seconds of each request that was answered."""

    def __init__(self, name: str, body: dict[str, Any], now: float) -> None:
        self.name, self.body, self.number = name, body, 0
        self.took: list[float] = []
        self.asks(now)

    def asks(self, now: float) -> None:
        self.number += 1
        self.asked = now
        self.incoming = Incoming(f"{self.name} {self.number}", "", JSON, self.body)

    def hears(self, now: float) -> None:
        """The end of an answer."""
        self.took.append(now - self.asked)
        self.asks(now)


def served(round_ms: float, attention: bool) -> tuple[Service, list[str]]:
    """A service, and words of its language."""
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(2000)]
    lines = [" ".join(draw.choices(words, k=10)) for _ in range(2000)]
    tokenizer = Tokenizer(learn(TokenizerOptions(), 2000, lines, "source_vocabulary"))
    engine = Engine(TableModel(tokenizer.size, attention), 64, clock=time.process_time)
    options = ServiceOptions(round_ms=round_ms)
    service = Service(engine, tokenizer, tokenizer, "m", "1", options, time.process_time)
    service.warm_up()
    return service, words


def asked_of(kind: str, words: list[str]) -> dict[str, Any]:
    """The large request."""
    draw = random.Random(3)
    many = [paragraph(draw, words, SENTENCES) for _ in range(TEXTS)]
    long = " ".join(draw.choices(words, k=60_000))
    aligned = {
        "text": [long[1200 * i : 1200 * i + 400] for i in range(60)], "split": False,
        "return_alignments": True,
    }  # fmt: skip
    return {
        "sentences": {"text": many, "max_length": 4},
        "stream": {"text": many, "max_length": 4, "stream": True},
        "alignments": aligned | {"max_length": 40},
        "too_long": aligned | {"max_length": 250},
        "breaks": {
            "text": words[0] + "\n" * 125_000 + words[1], "max_length": 4, "beam_size": 64,
            "n_best": 64,
        },
        "n_best": {
            "text": [" ".join(draw.choices(words, k=2)) for _ in range(TEXTS)], "max_length": 8,
            "beam_size": 64, "n_best": 64,
        },
        "one_line": {"text": long[:250_000], "split": False},
    }[kind]  # fmt: skip


def paragraph(draw: random.Random, words: list[str], sentences: int) -> str:
    spoken = (" ".join(draw.choices(words, k=WORDS)).capitalize() for _ in range(sentences))
    return ". ".join(spoken) + "."


def measured(kind: str, seconds: float, round_ms: float) -> Found:
    service, words = served(round_ms, kind in ("alignments", "too_long"))
    text = paragraph(random.Random(2), words, 1)
    asked = asked_of(kind, words)
    before = largest()
    now = started = time.process_time()
    stream = Client("stream", {"text": text, "max_length": 600, "stream": True}, now)
    small = Client("small", {"text": text, "max_length": 4}, now)
    large = Client("large", asked, now)
    clients = stream, small, large
    gaps: list[float] = []
    last: float | None = None
    answered = Counter[str]()
    while now < started + seconds:
        replies = service.round([one.incoming for one in clients])
        now = time.process_time()
        for one, reply in zip(clients, replies):
            if reply is None:
                continue
            if reply.status != 200 and one is not large:
                raise RuntimeError(f"{one.name}: {reply.body}")
            if one is stream:
                if last is not None:
                    gaps.append(now - last)
                last = now if reply.kind == "more" and reply.body.startswith("data") else None
            if reply.kind != "more":
                one.hears(now)
                if one is large:
                    answered[str(reply.status)] += 1
    if large.took == []:
        large.took.append(now - large.asked)
    rounds = [
        [1000 * gap / round_ms for gap in found] for found in (gaps, small.took, large.took)
    ]
    between, of_small, of_large = rounds
    return Found(
        statistics.median(between), percentile(between, 99), max(between),
        statistics.median(of_small), percentile(of_small, 99),
        statistics.median(of_large), largest() - before, dict(answered),
    )  # fmt: skip


def largest() -> float:
    """MiB that this process has had at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def percentile(values: list[float], p: int) -> float:
    """The least that p of a hundred do not exceed."""
    return sorted(values)[-(-p * len(values) // 100) - 1]


def child(folder: Path, kind: str, seconds: float, round_ms: float) -> None:
    """Measure the packages of `folder`, and no others in its name."""
    place = Path(handler.__file__ or "").resolve().parents[1]
    if place != folder.resolve():
        sys.exit(f"{folder}: its process has imported handler from {place}")
    torch.set_num_threads(1)
    print(json.dumps(dataclasses.asdict(measured(kind, seconds, round_ms))))


def found_of(folder: Path, kind: str, seconds: float, round_ms: float) -> Found:
    # Not `python script`, which would put the script's own folder before all others.
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code, "--child", str(folder), kind, str(seconds), str(round_ms)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return Found(**json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.admission", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--large", nargs="+", choices=KINDS, default=["sentences"])
    parser.add_argument("--rounds", type=int, default=5, help="of measurements, in turns")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--round-ms", type=float, default=20.0)
    a = parser.parse_args()
    from bench.machine import described
    from bench.turns import alternating, spread

    folders = {"here": SCRIPT.parents[1]}
    if a.beside is not None:
        folders["beside"] = a.beside.resolve()
    print(f"{described()}; `{' '.join(['python -m bench.admission', *sys.argv[1:]])}`\n")
    print(
        "| in rounds | gap p50 | gap p99 | largest gap | small p50 | small p99 | large p50 | MiB | "
        "answered |"
    )
    print(f"|{'---|' * 9}")
    for kind in a.large:
        found: dict[str, list[Found]] = {name: [] for name in folders}
        for number in range(a.rounds):
            for name in alternating(list(folders), number):
                found[name].append(found_of(folders[name], kind, a.seconds, a.round_ms))
        for name, rows in found.items():
            columns = list(zip(*(dataclasses.astuple(one)[:-1] for one in rows)))
            answered: Counter[str] = sum((Counter(one.answered) for one in rows), Counter())
            told = ", ".join(f"{count} x {status}" for status, count in answered.items())
            told = told or "none"
            print(f"| {kind}, {name} | {' | '.join(spread(one) for one in columns)} | {told} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # with the packages of any checkout, so none of `bench`
        child(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
