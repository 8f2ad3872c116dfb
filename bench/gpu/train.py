"""Part `train`: words a second of an update of the weights."""

import argparse
import statistics
from typing import Any

import torch

from bench.gpu.ledger import Ledger, Record
from bench.gpu.models import MULTI30K, Models, gnmt, profiled, seconds
from bench.peers.job import SPECIAL
from model import ModelOptions, Network
from training.batches import Batch
from training.learner import Learner
from training.recipe import TrainingOptions

BOS = 2
WARM_UP, UPDATES = 4, 9
# Of the recipe: name, sentences of a batch, tokens of each sentence on both sides.
RECIPE = [("Multi30k recipe", 128, 16), ("Multi30k recipe", 1024, 16)]


def train(a: argparse.Namespace, models: Models, ledger: Ledger) -> None:
    small = a.device == "cpu"
    cases: list[tuple[str, ModelOptions, TrainingOptions, int, int, int]] = [
        (name, ModelOptions(**MULTI30K), TrainingOptions(average=0.998, label_smoothing=0.1),
         min(6000, a.vocabulary), 4 if small else n, length)
        for name, n, length in RECIPE[: 1 if small else None]
    ]  # fmt: skip
    options = TrainingOptions(label_smoothing=0.1)
    n, length = (2, 5) if small else (256, 25)
    cases.append((a.size, gnmt(a.size), options, a.vocabulary, n, length))
    for name, shape, options, vocabulary, n, length in cases:
        key = {"part": "train", "model": name, "sentences": n, "tokens": length}

        def make(
            shape: ModelOptions = shape, options: TrainingOptions = options,
            vocabulary: int = vocabulary, n: int = n, length: int = length,
        ) -> Record:  # fmt: skip
            return measured(shape, options, vocabulary, n, length, models.device)

        ledger.measure(key, make)


def measured(
    shape: ModelOptions, options: TrainingOptions, vocabulary: int, n: int, length: int,
    device: torch.device,
) -> Record:  # fmt: skip
    torch.manual_seed(1)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    network = Network(shape, vocabulary, vocabulary).to(device)
    learner = Learner(network, options)
    batches = [batch(vocabulary, n, length, seed, device) for seed in range(4)]
    done = 0

    def update() -> None:
        nonlocal done
        done += 1
        learner.update([batches[done % len(batches)]], done, 0.001)

    spent = [seconds(update, device) for _ in range(WARM_UP + UPDATES if cuda else 2)]
    median = statistics.median(spent[WARM_UP if cuda else 1 :])
    found: Record = {
        "ms": 1e3 * median, "words_per_second": n * length / median,
        "parameters": sum(one.numel() for one in network.parameters()),
        "precision": learner.precision_name,
    }  # fmt: skip
    kernels, busy = profiled(update, device)
    if kernels:
        found |= {
            "busy_ms": 1e3 * busy, "kernels": sum(kernels.values()),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }  # fmt: skip
    return found


def batch(vocabulary: int, n: int, length: int, seed: int, device: torch.device) -> Batch:
    """Random pairs of equal lengths."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(SPECIAL, vocabulary, (n, length), generator=draw) for _ in range(2)]
    source, target = ids
    before = torch.cat([torch.full((n, 1), BOS), target[:, :-1]], 1)
    lengths = torch.full((n,), length)
    tensors: list[Any] = [source, lengths, before, target, lengths]
    return Batch(*(one.to(device) for one in tensors))
