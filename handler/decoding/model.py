"""What decoding needs of a model: the contract of model.pt, and its guard."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from handler.decoding import kernels, native
from handler.decoding.rows import sent

logger = logging.getLogger(__name__)

FORMAT_VERSIONS = (3, 4)  # from 4 on, steps on a GPU call the operators of kernels.py
CUDNN_LSTM = 2  # cuDNN's number of this kind of network
Weights = Literal["auto", "float32", "float16", "bfloat16"]
TENSOR_CORES = (7, 0)  # the least capability of a GPU that multiplies half precision fast
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
    card: str  # JSON; beside it may be `invariant`, bool: whether a row is the same in any company

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


def load(
    path: str, device: torch.device, weights: Weights | None = None, tiles: bool = True
) -> Any:
    """The TorchScript model at `path`, laid out for `device`. Native operators that lie beside it
    are used; on a GPU the kernels of kernels.py, which are compiled here.

    Args:
        weights: see `converted`. tiles: see `packed`.

    Raises:
        ValueError: a file of another format version, or weights that cannot be had.
    """
    native.enable(Path(path).parent)
    native.declare(ONEDNN)
    # cuDNN's LSTMs would otherwise multiply float32 as TF32, with 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        # TorchScript's simple executor: the other one compiles kernels for sizes that it sees,
        # while somebody waits, and what it computes then depends on which sizes came first.
        torch._C._jit_set_profiling_executor(True)
        torch._C._jit_set_profiling_mode(False)
    model = torch.jit.load(path, map_location=device)
    version = getattr(model, "format_version", None)
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(
            f"{path}: format version {version}; this code reads versions {known}: "
            "export the model again with the code that serves it"
        )
    model = packed(converted(model.eval(), device, weights), device, tiles)
    if device.type != "cuda":
        return model
    flatten(model)
    try:
        logger.info("kernels compiled in %.1f s", kernels.compile_for(device))
    except RuntimeError as error:
        logger.warning("no kernels of our own: %s", str(error).partition("\n")[0])
    return model


def flatten(model: Any) -> None:
    """Put the weights of each `nn.LSTM` of a scripted model into one piece of memory, as cuDNN
    reads them; else it copies them there at every call, and warns.

    Loading and a change of the number format leave them apart. `flatten_parameters` is no method of
    a scripted LSTM, but the tensors that its calls read can be had, and are changed in place.
    """
    for module in model.modules():
        if getattr(module, "original_name", "") != "LSTM":
            continue
        try:
            with torch.no_grad():
                torch._cudnn_rnn_flatten_weight(
                    module._flat_weights, 4, module.input_size, CUDNN_LSTM, module.hidden_size, 0,
                    module.num_layers, module.batch_first, module.bidirectional,
                )  # fmt: skip
        except RuntimeError as error:  # no cuDNN, or a number format that it does not have
            logger.info("weights of an LSTM stay apart: %s", str(error).partition("\n")[0])


def converted(model: Any, device: torch.device, weights: Weights | None) -> Any:
    """`model` with its weights in another number format; None leaves them as they were exported.
    `auto` is float16 on a GPU that multiplies it fast, as its ten bits of precision are more than
    bfloat16's seven and no value of these networks is too large for it; else as exported.

    Half precision is for GPUs. On a CPU the rows of a product then depend on how many are beside
    them: of the same sentences 91 % came out equal at batch 64 and at batch 1.

    Raises:
        ValueError: a format that `device` or the model does not offer.
    """
    if weights == "auto":
        weights = automatic(model, device)
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


def weight_type(model: Any) -> torch.dtype:
    """The type of floating point that a model's weights have."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def automatic(model: Any, device: torch.device) -> Weights | None:
    """What `auto` stands for."""
    have = {t.dtype for t in itertools.chain(model.parameters(), model.buffers())}
    if device.type != "cuda" or torch.float32 not in have or torch.int8 in have:
        return None
    fast = torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return "float16" if fast else None


def packed(model: Any, device: torch.device, tiles: bool = True) -> Any:
    """`model` with the weights of its steps in the layout that `device` multiplies fastest.

    Args:
        tiles: on a CPU, compute in tiles of a constant number of rows where a row would otherwise
            depend on those beside it.
    """
    cpu = device.type == "cpu"
    by_rows = hasattr(model, "invariant")  # else exported before rows were computed as if alone
    use_native = cpu and bool(native.enabled())
    if by_rows and not native.implements("float_linear"):  # a library of an older export
        use_native = False
    onednn = cpu and torch.backends.mkldnn.is_available()
    if not by_rows:
        model.pack(use_native, onednn)
        return model
    model.pack(use_native, onednn, tiles)
    if cpu and not model.invariant and weight_type(model) == torch.float32:
        logger.warning(
            "a sentence may depend on those beside it in its last bits: torch's products of this "
            "processor go in no constant order, and there is no library of native operators"
        )
    return model


def encode_batch(
    model: SequenceModel, sources: Sequence[Sequence[int]], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """Encode sentences together: their memory, and their first state [N, ...]."""
    longest, pad = max(map(len, sources)), model.pad_id
    lengths = sent([len(source) for source in sources], device)  # [N]
    padded = sent([[*s, *[pad] * (longest - len(s))] for s in sources], device)  # [N, S]
    memory = model.encode(padded, lengths)
    return memory, model.start(memory)
