"""A training job that `bench.training` gives to each system, and what is measured of it."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field

import torch

from bench.peers.job import Sizes

WARM_UP = 3  # updates that are not measured
BETAS, EPSILON = (0.9, 0.98), 1e-9  # of Adam, for all


@dataclass(frozen=True)
class TrainingJob:
    """Train on the same token ids for some seconds.

    folder: made by `bench.training.prepared`. batch: in tokens, as the system counts them.
    """

    folder: str
    sizes: Sizes
    batch: int
    seconds: float  # of measuring, by the wall clock
    threads: int
    precision: str  # fp32 or bf16
    input_feeding: bool
    dropout: float
    label_smoothing: float

    @classmethod
    def read(cls) -> "TrainingJob":
        """From standard input."""
        fields = json.load(sys.stdin)
        job = cls(**{**fields, "sizes": Sizes(**fields["sizes"])})
        torch.set_num_threads(job.threads)
        return job

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Meter:
    """Counts between the starts of two updates, so that all that a trainer does besides, such as
    making batches and logging, is counted too."""

    seconds: float
    source_tokens: int = 0  # real ones, EOS included
    target_tokens: int = 0
    updates: int = -WARM_UP
    started: tuple[float, float] = field(default=(0.0, 0.0))  # wall and CPU
    spent: tuple[float, float] = field(default=(0.0, 0.0))

    def update_begins(self, source_tokens: int, target_tokens: int) -> bool:
        """To be called with the tokens of the update that follows; whether it is to be done."""
        now = time.perf_counter(), time.process_time()
        if self.updates == 0:
            self.started = now
        if self.updates >= 0:
            self.spent = now[0] - self.started[0], now[1] - self.started[1]
            if self.spent[0] >= self.seconds:
                return False
            self.source_tokens += source_tokens
            self.target_tokens += target_tokens
        self.updates += 1
        return True

    def tell(self, system: str, network: str, model: torch.nn.Module) -> None:
        """One line of JSON on standard output."""
        print(json.dumps({
            "system": system,
            "network": network,
            "parameters": sum(p.numel() for p in model.parameters()),
            "wall": self.spent[0],
            "cpu": self.spent[1],
            "updates": self.updates,
            "source_tokens": self.source_tokens,
            "target_tokens": self.target_tokens,
            # Linux tells KiB.
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }))
