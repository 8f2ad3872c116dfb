"""Functions of tensors at fixed addresses, recorded once and replayed: CUDA graphs.

A step of few rows is some twenty small kernels, which a processor takes longer to launch than the
GPU to run. A graph launches them at once, with addresses and shapes that never change.
"""

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UP = 2  # runs before a recording, in which libraries load and choose their kernels


class Recorder(Protocol):
    """How functions of tensors at fixed addresses are recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats what `function` does, on the same memory. `function` has been run
        a few times by then.

        Raises:
            RuntimeError: it cannot be recorded; nothing is left of the try.
        """
        ...


class CudaGraphs:
    """CUDA's own recordings. They share one pool of memory, as only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self.device)
        # Named, though it is the current one: a recording that fails leaves its own in its place.
        with torch.cuda.device(self.device), torch.cuda.stream(current):
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    function()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do to the device meanwhile spoils nothing.
            try:
                with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                    function()
            except RuntimeError:
                graph.reset()
                raise
        return graph.replay


class Called:
    """Records nothing: a replay is a call. For a CPU, and for a GPU without graphs."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def bucket(size: int, sizes: list[int]) -> int:
    """The least of `sizes`, in order, that is not below `size`; or the last."""
    return next((one for one in sizes if one >= size), sizes[-1])
