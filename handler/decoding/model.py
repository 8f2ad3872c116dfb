"""What decoding needs of a model: the contract of model.pt, and its guard."""

from typing import Any, Protocol

import torch
from torch import Tensor

FORMAT_VERSION = 2
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


def load(path: str, device: torch.device) -> Any:
    """The TorchScript model at `path`, laid out for `device`.

    Raises:
        ValueError: a file of another format version.
    """
    declare(ONEDNN)
    model = torch.jit.load(path, map_location=device)
    version = getattr(model, "format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}; this code reads version {FORMAT_VERSION}: "
            "export the model again with the code that serves it"
        )
    return packed(model.eval(), device)


def declare(operators: dict[str, str]) -> None:
    """Make operators known by name and schema, where this build of torch lacks them."""
    for name, schema in operators.items():
        namespace, _, short = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), short):
            torch.library.define(name, schema)


def packed(model: Any, device: torch.device) -> Any:
    """`model` with the weights of its steps in the layout that `device` multiplies fastest."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        model.pack()
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
