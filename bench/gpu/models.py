"""Models of random weights, what they are asked, and engines whose steps are recorded."""

import argparse
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.peers.job import SPECIAL
from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.cuda_runner import CudaOptions, CudaRunner
from handler.decoding.graphs import Called
from handler.decoding.model import load
from handler.decoding.runner import Runner
from model import ModelOptions, Network, ServingModel
from model.projection import Projection
from model.serving import scripted

CPU = torch.device("cpu")
EOS = 3
TOKENS = 25  # of each source and of each target
FORMATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes
# Of recipes/multi30k_en_de.yaml.
MULTI30K: dict[str, Any] = {
    "kind": "attention", "embedding_size": 256, "encoder_layers": 1, "encoder_hidden_size": 256,
    "decoder_layers": 1, "decoder_hidden_size": 512, "attention_size": 256, "dropout": 0.3,
    "embedding_dropout": 0.3, "output_dropout": 0.4, "recurrent_dropout": 0.1,
    "variational_dropout": True, "tie_embeddings": "all",
}  # fmt: skip


def gnmt(size: str) -> ModelOptions:
    """Of LAYERSxWIDTH on both sides, as NVIDIA's GNMT is of 4x1024."""
    layers, width = map(int, size.split("x"))
    return ModelOptions(
        kind="attention", embedding_size=width, encoder_layers=layers,
        encoder_hidden_size=width // 2, decoder_layers=layers, decoder_hidden_size=width,
        attention_size=width,
    )  # fmt: skip


class Models:
    """Models of a run, written once and one of them on the device at a time."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.a, self.folder = arguments, folder
        self.device = torch.device(arguments.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.held: tuple[Path, str] | None = None
        self.model: Any = None
        self.paths: dict[tuple[str, int], Path] = {}
        # What a step of each file multiplies by, in numbers, and the size of its attention.
        self.read: dict[Path, tuple[int, int]] = {}

    def exported(self, size: str, vocabulary: int) -> Path:
        """A model.pt of random weights."""
        if (size, vocabulary) not in self.paths:
            torch.manual_seed(1)
            options = gnmt(size)
            network = Network(options, vocabulary, vocabulary)
            model = ServingModel(network, max_source_length=256, max_target_length=256)
            path = self.folder / f"{size}-{vocabulary}.pt"
            scripted(model).save(str(path))
            weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Projection))
            self.paths[size, vocabulary] = path
            self.read[path] = weights, options.attention_size
        return self.paths[size, vocabulary]

    def loaded(self, path: Path, weights: str) -> Any:
        """On the device."""
        gc.collect()  # what the last measurement held there
        if self.held != (path, weights):
            self.model, self.held = None, None  # the last one goes before the next one comes
            self.model = load(str(path), self.device, weights)  # type: ignore[arg-type]
            self.held = path, weights
        return self.model


class Recorded(Engine):
    """An engine of recorded steps; on a CPU they are called. widths: beams that are recorded."""

    def __init__(
        self, model: Any, rows: int, device: torch.device, widths: Sequence[int],
        called: bool = False,
    ) -> None:  # fmt: skip
        self.widths = tuple(widths)
        self.called = called or device.type != "cuda"
        super().__init__(model, rows, device)

    def new_runner(self) -> Runner:
        recorder = Called() if self.called else None
        return CudaRunner(
            self.model, self.device, self.clock, self.capacity, CudaOptions(self.widths),
            recorder=recorder,
        )  # fmt: skip


class KernelByKernel(Engine):
    """An engine that records nothing."""

    def new_runner(self) -> Runner:
        return Runner(self.model, self.device, self.clock)


def random_sources(count: int, vocabulary: int, shortest: int = TOKENS) -> list[list[int]]:
    draw = random.Random(count)
    return [
        [draw.randrange(SPECIAL, vocabulary) for _ in range(draw.randint(shortest, TOKENS) - 1)]
        + [EOS]
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


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """That a call and what it enqueues take."""
    synchronised(device)
    started = time.perf_counter()
    call()
    synchronised(device)
    return time.perf_counter() - started


def median_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    return statistics.median(seconds(call, device) for _ in range(calls))


def profiled(call: Callable[[], object], device: torch.device) -> tuple[dict[str, int], float]:
    """What a GPU does in a call: its kernels and copies by name, and the seconds they take. Empty
    on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return {}, 0.0
    synchronised(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with warnings.catch_warnings():  # of what some versions of the profiler do not keep
        warnings.simplefilter("ignore")
        with profile(activities=activities) as profiler:
            call()
            synchronised(device)
    names: dict[str, int] = {}
    busy = 0.0
    for event in profiler.events() or []:
        if not str(event.device_type).endswith("CUDA") or getattr(
            event, "is_user_annotation", False
        ):
            continue
        names[event.name] = names.get(event.name, 0) + 1
        busy += event.time_range.elapsed_us() / 1e6
    return names, busy
