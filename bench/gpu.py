"""Decoding on a GPU: is it right, how long is a step, how many tokens a second.

    python -m bench.gpu

Random weights in the sizes of NVIDIA's GNMT (4 + 4 layers of 1,024, vocabulary 32,000), sources of
25 tokens, exactly 25 target tokens. Three tables:

- Sentences as they come out on the CPU in float32, and sentences alone as beside others. With
  random weights tokens are close to one another, so of half precision only a trained model tells
  the truth: `--model model.pt --source-tokenizer source.model --text test.source`.
- A step as the engine makes it, the choice and the order of beams included: milliseconds, of as
  many as are made before anything is read, kernel by kernel and replayed as a CUDA graph, beside
  its floor: the bytes of weights and memory over the bandwidth measured here, or the operations
  over the rate of products measured here, whichever is more.
- The engine, encoding included: target tokens a second. NVIDIA publishes 29,646 for GNMT v2 with a
  beam of 5 on a V100 in fp16.

`--device cpu --size 1x64 --check-size 1x32 --vocabulary 500 --rows 1 8` tries the script out where
there is no GPU; its times tell nothing.
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import described
from bench.peers.job import SPECIAL
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.graphs import GraphedModel
from handler.decoding.lane import Lane, Vocabulary
from handler.decoding.model import encode_batch, load
from handler.decoding.sentence import Hypothesis, Sentence
from handler.tokenizer import Tokenizer
from model import ModelOptions, Network, ServingModel
from model.lstm import Projection
from model.serving import scripted

CPU = torch.device("cpu")
TOKENS = 25  # of each source and of each target
CALLS = 30  # timed, of which the median is told
FORMATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes
PUBLISHED = 29_646


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", default="4x1024", metavar="LAYERSxWIDTH")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--check-size", default="2x512", metavar="LAYERSxWIDTH")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--sentences", type=int, default=48, help="of the check")
    parser.add_argument("--model", type=Path, help="a trained model.pt for the check")
    parser.add_argument("--source-tokenizer", type=Path)
    parser.add_argument("--text", type=Path, help="source sentences for --model, one a line")
    parser.add_argument("--no-fuser", action="store_true", help="TorchScript fuses no kernels")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    a = parser.parse_args()
    if a.model is not None and (a.source_tokenizer is None or a.text is None):
        parser.error("--model needs --source-tokenizer and --text")
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device; `make setup TORCH=cuda`")
    if a.no_fuser:
        torch._C._jit_set_texpr_fuser_enabled(False)
    command = shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])
    print(f"{described()}; `{command}`\n")
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        Bench(a, Path(folder)).run()


class Bench:
    """One run; tables go to standard output row by row."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.a, self.folder = arguments, folder
        self.device = torch.device(arguments.device)
        # On a CPU there is one format and nothing to replay.
        self.formats = list(FORMATS) if arguments.device == "cuda" else ["float32"]

    def run(self) -> None:
        self.check()
        path, steps = exported(self.a.size, self.a.vocabulary, self.folder)
        self.steps(path, *steps)
        self.engine(path)

    def loaded(self, path: Path, weights: str, graphs: bool = True) -> GraphedModel:
        model: Any = load(str(path), self.device, weights)  # type: ignore[arg-type]
        if not isinstance(model, GraphedModel):
            model = GraphedModel(model, self.device, None)
        if not graphs:
            model.recorder = None
        return model

    def check(self) -> None:
        """Whether sentences are those of the CPU, and alone those of a batch."""
        if self.a.model is not None:
            path, tokenizer = self.a.model, Tokenizer(self.a.source_tokenizer)
            lines = [line for line in self.a.text.read_text("utf-8").split("\n") if line.strip()]
            sources = [[*tokenizer.encode(line), 3] for line in lines[: self.a.sentences]]
        else:
            path, _ = exported(self.a.check_size, 8000, self.folder)
            sources = random_sources(self.a.sentences, 8000, shortest=5)
        reference = load(str(path), CPU)
        print(f"| {len(sources)} sentences | beam | graphs | as on the CPU in float32 | as alone |")
        print("|---|---|---|---|---|")
        for beam in self.a.beams:
            options = DecodingOptions(beam_size=beam, max_length=2 * TOKENS)
            expected = decoded(Engine(reference, 16 * beam), sources, options)
            for weights in self.formats:
                for graphs in (True, False):
                    model = self.loaded(path, weights, graphs)
                    found = decoded(Engine(model, 16 * beam, self.device), sources, options)
                    alone = decoded(Engine(model, beam, self.device), sources, options)
                    print(f"| {weights} | {beam} | {told(model, graphs)} | {share(found, expected)}"
                          f" | {share(found, alone)} |", flush=True)

    def steps(self, path: Path, weights_read: int, attention: int) -> None:
        """Milliseconds of a step, beside the floor.

        Args:
            weights_read: numbers that a step multiplies by; attention: its size A.
        """
        bandwidth = measured_bandwidth(self.device)
        rates = {one: measured_rate(self.device, one) for one in self.formats}
        told_rates = ", ".join(f"{one} {rate / 1e12:.1f}" for one, rate in rates.items())
        print(f"\nmeasured: {bandwidth / 1e9:.0f} GB/s; products, TFLOP/s: {told_rates}\n")
        print("| format | beam | rows | kernel by kernel, ms | graph, ms | floor, ms | graph / "
              "floor | seconds to record |\n|---|---|---|---|---|---|---|---|")
        for weights in self.formats:
            models = [self.loaded(path, weights, graphs) for graphs in (False, True)]
            for beam in self.a.beams:
                for rows in [rows for rows in self.a.rows if rows >= beam]:
                    n = rows // beam
                    spent, first = [], 0.0
                    for model in models:
                        step = self.step_of(model, n, beam)
                        first = self.seconds(step)
                        times = [self.seconds(step) for _ in range(CALLS)]
                        spent.append(statistics.median(times) / model.unseen)
                    memory = 2 * n * TOKENS * attention  # keys and values
                    floor = max(
                        (weights_read + memory) * FORMATS[weights] / bandwidth,
                        2 * n * beam * (weights_read + 2 * TOKENS * attention) / rates[weights],
                    )
                    graph = spent[1] if told(models[1], True) == "yes" else None
                    cells = [
                        weights, str(beam), str(n * beam), f"{1e3 * spent[0]:.3g}",
                        f"{1e3 * graph:.3g}" if graph else "none", f"{1e3 * floor:.3g}",
                        f"{graph / floor:.1f}" if graph else "", f"{first:.2f}" if graph else "",
                    ]
                    print(f"| {' | '.join(cells)} |", flush=True)

    def step_of(self, model: GraphedModel, n: int, beam: int) -> Callable[[], object]:
        """`model.unseen` steps of `n` sentences."""
        sources = random_sources(n, model.source_vocabulary, TOKENS)
        options = DecodingOptions(beam_size=beam)
        begun = [Hypothesis([SPECIAL], 0.0)] * beam
        lane = Lane(model, Vocabulary.of(model, self.device), beam, fused=True)
        with torch.inference_mode():
            memory, state = encode_batch(model, sources, self.device)
            state = [t.repeat_interleave(beam, 0) for t in state]
        lane.sentences = [
            Sentence(i, source, options, 2 * TOKENS, live=begun) for i, source in enumerate(sources)
        ]
        previous = torch.full((n, beam), SPECIAL, device=self.device)

        @torch.inference_mode()
        def steps() -> object:
            return lane.several(previous, state, memory, model.unseen, lambda: True)

        return steps

    def seconds(self, call: Callable[[], object]) -> float:
        synchronised(self.device)
        started = time.perf_counter()
        call()
        synchronised(self.device)
        return time.perf_counter() - started

    def engine(self, path: Path) -> None:
        """Tokens a second by rows."""
        columns = [(one, True) for one in self.formats]
        if "float16" in self.formats:
            columns.append(("float16", False))
        names = []
        rates: dict[tuple[int, int, int], float] = {}
        for place, (weights, graphs) in enumerate(columns):  # one model on the device at a time
            model = self.loaded(path, weights, graphs)
            for beam in self.a.beams:
                for rows in [rows for rows in self.a.rows if rows >= beam]:
                    rates[beam, rows, place] = self.tokens_per_second(model, rows, beam)
            names.append(f"{weights}, graphs: {told(model, graphs)}")
        half = min(1, len(columns) - 1)
        print(f"\n| tokens/s | rows | {' | '.join(names)} | {columns[half][0]} / GNMT's "
              f"{PUBLISHED:,} |")
        print("|---" * (3 + len(names)) + "|")
        for beam, rows in dict.fromkeys((beam, rows) for beam, rows, _ in rates):
            of_row = [rates[beam, rows, place] for place in range(len(columns))]
            cells = " | ".join(f"{rate:,.0f}" for rate in of_row)
            ratio = f"{of_row[half] / PUBLISHED:.2f}" if beam == 5 else ""
            print(f"| {'greedy' if beam == 1 else f'beam {beam}'} | {rows} | {cells} | {ratio} |")

    def tokens_per_second(self, model: GraphedModel, rows: int, beam: int) -> float:
        count = max(16, 2 * rows // beam)
        sources = random_sources(count, model.source_vocabulary, TOKENS)
        options = DecodingOptions(beam_size=beam, min_length=TOKENS, max_length=TOKENS)
        rate = 0.0
        for _ in range(2):  # the first time records
            synchronised(self.device)
            started = time.perf_counter()
            found = decoded(Engine(model, rows, self.device), sources, options)
            rate = sum(map(len, found)) / (time.perf_counter() - started)
        return rate


def exported(size: str, vocabulary: int, folder: Path) -> tuple[Path, tuple[int, int]]:
    """A model.pt with random weights; how many of them a step multiplies by, and A."""
    layers, width = map(int, size.split("x"))
    options = ModelOptions(
        kind="attention", embedding_size=width, encoder_layers=layers,
        encoder_hidden_size=width // 2, decoder_layers=layers, decoder_hidden_size=width,
        attention_size=width,
    )
    network = Network(options, vocabulary, vocabulary)
    model = ServingModel(network, max_source_length=256, max_target_length=256)
    path = folder / f"{size}.pt"
    scripted(model).save(str(path))
    read = sum(m.weight.numel() for m in model.modules() if isinstance(m, Projection))
    return path, (read, width)


def random_sources(count: int, vocabulary: int, shortest: int) -> list[list[int]]:
    draw = random.Random(count)
    return [
        [draw.randrange(SPECIAL, vocabulary) for _ in range(draw.randint(shortest, TOKENS) - 1)]
        + [3]
        for _ in range(count)
    ]


def decoded(engine: Engine, sources: list[list[int]], options: DecodingOptions) -> list[list[int]]:
    """The best translation of each.

    Raises:
        RuntimeError: a sentence failed.
    """
    events = list(decode_in_order(engine, sources, options))
    for event in events:
        if event.error is not None:
            raise RuntimeError(event.error)
    return [event.results[0].tokens for event in events]


def share(found: list[list[int]], expected: list[list[int]]) -> str:
    return f"{sum(map(list.__eq__, found, expected)) / len(found):.1%}"


def told(model: GraphedModel, graphs: bool) -> str:
    if not graphs:
        return "no"
    return "none" if model.recorder is None else "yes"


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second, of a copy that reads and writes half a GiB (little on a CPU)."""
    size = 1 << (29 if device.type == "cuda" else 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)


def measured_rate(device: torch.device, weights: str) -> float:
    """Operations a second, of a square product."""
    size = 8192 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device, dtype=getattr(torch, weights))
    return 2 * size**3 / fastest(lambda: x @ x, device)


def fastest(call: Callable[[], object], device: torch.device) -> float:
    spent = []
    for _ in range(10):
        synchronised(device)
        started = time.perf_counter()
        call()
        synchronised(device)
        spent.append(time.perf_counter() - started)
    return min(spent)


if __name__ == "__main__":
    main()
