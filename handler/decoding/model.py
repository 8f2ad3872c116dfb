"""What decoding needs of a model: the contract of model.pt, and its guard."""

import itertools
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from handler.decoding import native
from handler.decoding.graphs import CudaGraphs, GraphedModel

FORMAT_VERSION = 3
Weights = Literal["float32", "float16", "bfloat16"]
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
    """A model that chooses tokens itself where its `fused` is true, and has an `allowed` where its
    `shortlisted` is: see model/quantized.py."""

    fused: bool

    def best(
        self, previous: Tensor, state: list[Tensor], memory: Any, count: int, normalised: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]: ...


def load(path: str, device: torch.device, weights: Weights | None = None) -> Any:
    """The TorchScript model at `path`, laid out for `device`. Native operators that lie beside it
    are used; on a GPU, CUDA graphs.

    Args:
        weights: see `converted`.

    Raises:
        ValueError: a file of another format version, or weights that cannot be had.
    """
    native.enable(Path(path).parent)
    native.declare(ONEDNN)
    # cuDNN's LSTMs would otherwise multiply float32 as TF32, with 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    model = torch.jit.load(path, map_location=device)
    version = getattr(model, "format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}; this code reads version {FORMAT_VERSION}: "
            "export the model again with the code that serves it"
        )
    model = packed(converted(model.eval(), device, weights), device)
    return GraphedModel(model, device, CudaGraphs(device)) if device.type == "cuda" else model


def converted(model: Any, device: torch.device, weights: Weights | None) -> Any:
    """`model` with its weights in another number format; None leaves them as they were exported.

    Half precision is for GPUs. On a CPU the rows of a product then depend on how many are beside
    them: of the same sentences 91 % came out equal at batch 64 and at batch 1.

    Raises:
        ValueError: a format that `device` or the model does not offer.
    """
    if weights is None:
        return model
    have = {t.dtype for t in itertools.chain(model.parameters(), model.buffers())}
    if torch.int8 in have:
        raise ValueError(
            f"weights: got {weights!r}; allowed for a model exported with int8 weights: null"
        )
    if device.type == "cpu" and weights != "float32":
        raise ValueError(
            f"weights: got {weights!r}; allowed on a CPU: null or 'float32', as in half precision "
            "sentences would depend on their neighbours; fast there is `export --weights int8`"
        )
    if torch.float32 not in have:
        raise ValueError(
            f"weights: got {weights!r}; allowed for a model not exported in float32: null"
        )
    dtype = getattr(torch, weights)
    model = model.to(dtype)
    for module in model.modules():
        # A bias that might have been None is no buffer of a scripted module, which `to` would find.
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and bias.dtype != dtype:
            module.bias = bias.to(dtype)
    return model


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
