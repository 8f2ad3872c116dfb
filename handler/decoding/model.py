"""What decoding needs of a model: the contract of model.pt, and its guard."""

from typing import Any, Protocol

import torch
from torch import Tensor

FORMAT_VERSION = 1


class SourceLengthError(ValueError):
    """A source that is longer than the model can be asked to read, or empty."""


class SequenceModel(Protocol):
    """`model.pt`, scripted or eager; an ensemble looks the same.

    Memory is a named pair of lists of tensors: `attended` [N, S, ...], which every step reads, and
    `initial` [N, ...], which only `start` reads. State is a list of tensors [rows, ...].
    """

    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    source_vocabulary: int
    target_vocabulary: int
    max_source_length: int
    max_target_length: int
    card: str  # JSON

    def encode(self, source: Tensor, lengths: Tensor) -> Any: ...

    def start(self, memory: Any) -> list[Tensor]: ...

    def step(
        self, previous: Tensor, state: list[Tensor], memory: Any
    ) -> tuple[Tensor, list[Tensor]]: ...


def load(path: str, device: torch.device) -> Any:
    """The TorchScript model at `path`.

    Raises:
        ValueError: a file of another format version.
    """
    model = torch.jit.load(path, map_location=device)
    version = getattr(model, "format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}; this code reads version {FORMAT_VERSION}: "
            "export the model again with the code that serves it"
        )
    return model.eval()


def encode_batch(
    model: SequenceModel, sources: list[list[int]], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """Encode sentences together: their memory, and their first state [N, ...]."""
    lengths = torch.tensor([len(s) for s in sources])  # [N]
    padded = torch.full((len(sources), int(lengths.max())), model.pad_id)  # [N, S]
    for i, source in enumerate(sources):
        padded[i, : len(source)] = torch.tensor(source)
    memory = model.encode(padded.to(device), lengths.to(device))
    return memory, model.start(memory)
