"""What decoding needs of a model: the contract of model.pt, and its guard."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from handler.decoding import native

FORMAT_VERSION = 3
# oneDNN's operators that model.pt names. A build of torch without oneDNN (macOS) has to know them
# to load it, and never calls them.
ONEDNN = {
    "mkldnn::_reorder_linear_weight": "(Tensor self, int? batch_size=None) -> Tensor",
    "mkldnn::_linear_pointwise": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y",
}


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
    has_attention: bool
    card: str  # JSON

    def encode(self, source: Tensor, lengths: Tensor) -> Any: ...

    def start(self, memory: Any) -> list[Tensor]: ...

    def step(
        self, previous: Tensor, state: list[Tensor], memory: Any
    ) -> tuple[Tensor, list[Tensor], Tensor]: ...


class FusedModel(SequenceModel, Protocol):
    """A model that chooses tokens itself where its `fused` is true: see model/quantized.py."""

    fused: bool

    def best(
        self, previous: Tensor, state: list[Tensor], memory: Any, count: int, normalised: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]: ...


def load(path: str, device: torch.device) -> Any:
    """The TorchScript model at `path`, laid out for `device`. Native operators that lie beside it
    are used.

    Raises:
        ValueError: a file of another format version.
    """
    native.enable(Path(path).parent)
    native.declare(native.SCHEMAS | ONEDNN)
    model = torch.jit.load(path, map_location=device)
    version = getattr(model, "format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}; this code reads version {FORMAT_VERSION}: "
            "export the model again with the code that serves it"
        )
    return packed(model.eval(), device)


def packed(model: Any, device: torch.device) -> Any:
    """`model` with the weights of its steps in the layout that `device` multiplies fastest."""
    cpu = device.type == "cpu"
    model.pack(cpu and bool(native.enabled()), cpu and torch.backends.mkldnn.is_available())
    return model


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
