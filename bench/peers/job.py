"""A job for a decoder, and the loop of a process that takes jobs: one JSON line each way."""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

SPECIAL = 4  # ids that every system reserves: padding, unknown, BOS and EOS, in its own order


@dataclass(frozen=True)
class Sizes:
    """Of the network, the same number of layers and width on both sides."""

    layers: int
    hidden_size: int
    embedding_size: int
    vocabulary: int  # of each side, special tokens included


@dataclass(frozen=True)
class Job:
    """Decode each sentence into exactly `tokens` tokens.

    sources: ids from SPECIAL on. A system that ends sources with EOS puts it in the place of the
        last id, so that all read equally many tokens.
    batch: sentences decoded together; beam_size: 1 is greedy search.
    """

    sizes: Sizes
    sources: list[list[int]]
    tokens: int
    batch: int
    beam_size: int
    threads: int
    cpu_time: bool = False  # instead of the time that passed

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**{**fields, "sizes": Sizes(**fields["sizes"])})


class Decoder(Protocol):
    """One system with one network of random weights.

    system: its name and version. network: what its network has.
    """

    system: str
    network: str

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        """Decode `sources`, longest first, and tell how many tokens the best of each has."""
        ...


def batches(sources: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for first in range(0, len(sources), size):
        yield sources[first : first + size]


def timed(decoder: Decoder, job: Job) -> float:
    """Tokens a second, from lists of ids to lists of ids, encoding included; after one batch
    that is not counted.

    Raises:
        RuntimeError: a sentence did not get as many tokens as it should have.
    """
    torch.set_num_threads(job.threads)
    longest_first = sorted(job.sources, key=len, reverse=True)
    decoder.decode(longest_first[: job.batch], job)
    clock = time.process_time if job.cpu_time else time.perf_counter
    started = clock()
    lengths = decoder.decode(longest_first, job)
    seconds = clock() - started
    if lengths != [job.tokens] * len(job.sources):
        raise RuntimeError(
            f"{decoder.system}: {len(lengths)} sentences of {sorted(set(lengths))} tokens; asked "
            f"for {len(job.sources)} of {job.tokens}"
        )
    return len(job.sources) * job.tokens / seconds


def serve(build: Callable[[Sizes], Decoder]) -> None:
    """Answer the jobs of standard input until it ends; keeps the network of the last sizes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    decoder: Decoder | None = None
    sizes: Sizes | None = None
    for line in sys.stdin:
        job = Job.from_json(line)
        try:
            if decoder is None or sizes != job.sizes:
                decoder = None  # the last network goes before the next one comes
                torch.manual_seed(1)
                decoder, sizes = build(job.sizes), job.sizes
            answer: dict[str, object] = {
                "tokens_per_second": timed(decoder, job),
                "system": decoder.system,
                "network": decoder.network,
                "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
            }
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def padded(sources: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [N, S], padded on the right, and lengths int64 [N]."""
    lengths = torch.tensor([len(one) for one in sources])
    ids = torch.full((len(sources), int(lengths.max())), pad)
    for i, one in enumerate(sources):
        ids[i, : len(one)] = torch.tensor(one)
    return ids, lengths


def randomise(model: torch.nn.Module) -> None:
    """All weights from U(-0.1, 0.1)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
