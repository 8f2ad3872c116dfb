"""Several processes that learn as one, started by torchrun on one machine or on many."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

import torch
from torch import distributed

from training.run import RunError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the others wait while the first validates


@dataclass(frozen=True)
class Processes:
    """This process among all that train together; alone, unless torchrun started it."""

    rank: int = 0  # of this process, among all
    count: int = 1
    local: int = 0  # of this process, on its machine: which GPU is its own

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def total(self, *figures: float) -> list[float]:
        """The sums of `figures` over all processes."""
        if self.count == 1:
            return list(figures)
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(figures, dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        return [float(one) for one in sums]

    def gathered(self, value: T) -> list[T]:
        """The `value` of each process, by rank."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def shared(self, value: T) -> T:
        """The first process's `value`, in all."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values, 0)
        return values[0]


def process_count() -> int:
    """How many processes torchrun started, as its environment tells; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes(gpu: bool) -> Iterator[Processes]:
    """Join those that torchrun started, as its environment tells.

    Args:
        gpu: whether each trains on a GPU of its own.

    Raises:
        RunError: another process has ended.
    """
    count = process_count()
    if count == 1:
        yield Processes()
        return
    mine = Processes(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    if gpu:
        torch.cuda.set_device(mine.local)
    # Its functions have the group as a default argument where it is loaded after the group is made,
    # as DistributedDataParallel does: the group would never end, and its threads abort a process
    # that leaves while one of them asks for the interpreter's lock.
    import_module("torch.distributed.nn.functional")
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield mine
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise RunError(
                f"process {mine.rank}: another process has ended, and said why; train again to go "
                "on from the last checkpoint"
            ) from None
        raise
    finally:
        distributed.destroy_process_group()
