"""The operators of `model/native`, where a library for this machine lies beside a model.

They are torch.ops.seq2serve.*, of the whole process. Without them an int8 model computes the same
with torch's own operators, several times slower.
"""

import logging
import platform
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Of what model/native/operators.cpp implements. Where there is no library a model that names them
# has to load, and never calls them. They are never taken back: functions that TorchScript has
# compiled hold on to them.
SCHEMAS = {
    # Of float32_operators.cpp: see model/projection.py and model/encoding.py.
    "seq2serve::float_use": "(str name) -> str",
    "seq2serve::float_linear": "(Tensor x, Tensor more, Tensor[] packed, int size, bool tanh) -> "
    "Tensor",
    "seq2serve::float_cell": "(Tensor x, Tensor h, Tensor c, Tensor[] packed) -> (Tensor, Tensor)",
    "seq2serve::float_layer": "(Tensor added, Tensor sizes, Tensor[] packed, int size, "
    "bool backwards) -> (Tensor, Tensor, Tensor)",
    "seq2serve::float_attend": "(Tensor query, Tensor keys, Tensor values, Tensor mask, "
    "Tensor score, int heads) -> (Tensor, Tensor)",
    "seq2serve::use": "(str name) -> str",
    "seq2serve::cell": "(Tensor x, Tensor tokens, Tensor table, Tensor h, Tensor c, "
    "Tensor[] packed) -> (Tensor, Tensor)",
    "seq2serve::linear": "(Tensor x, Tensor more, Tensor[] packed, int size, bool tanh) -> Tensor",
    "seq2serve::best": "(Tensor x, Tensor[] packed, int count, bool normalised) -> "
    "(Tensor, Tensor, Tensor)",
    "seq2serve::listed": "(Tensor x, Tensor rows, Tensor[] packed, Tensor candidates, "
    "Tensor common, int count, bool normalised) -> (Tensor, Tensor, Tensor)",
    "seq2serve::attend": "(Tensor query, Tensor keys, Tensor values, Tensor mask, int heads) -> "
    "(Tensor, Tensor)",
    "seq2serve::layer": "(Tensor added, Tensor tokens, Tensor table, Tensor lengths, "
    "Tensor[] packed, int size, bool backwards) -> (Tensor, Tensor, Tensor)",
    # Of lanes (native_lane.py); `board` is `Board.tables`, of which the first `count` are live.
    "seq2serve::search": "(Tensor values, Tensor tokens, Tensor normaliser, int eos, "
    "Tensor(a!)[] board, int count) -> int[]",
    "seq2serve::begin": "(Tensor(a!)[] board, Tensor(b!)[] state, int[] places, float[] facts, "
    "int[] longest, int bos, Tensor[] first) -> ()",
    "seq2serve::move": "(Tensor(a!)[] tables, int[] origin, int[] target, int rows) -> ()",
    "seq2serve::read": "(Tensor[] board, int[] places, int most) -> Tensor[]",
    "seq2serve::reorder": "(Tensor[] state, Tensor parents) -> Tensor[]",
    "seq2serve::decode": "(Tensor(a!)[] board, Tensor(b!)[] state, Tensor(c!)[] spare, "
    "Tensor[] attended, Tensor[] parts, int[] numbers, int eos, int count, bool normalised, "
    "int steps, float until) -> (int, int[])",
}
_kernels = ""  # of the library that this process has loaded
_declared: dict[str, torch.library.Library] = {}  # by namespace


def library() -> str:
    """The file name of the operators for this system, processor and torch, whose ABI they use."""
    version = torch.__version__.partition("+")[0]
    return f"seq2serve-torch{version}-{platform.system()}-{platform.machine()}.so".lower()


def enabled() -> str:
    """The name of the kernels in use, the fastest that this processor has; empty for none."""
    return _kernels


def implements(name: str) -> bool:
    """Whether an operator has code: one that is only declared, or that the library of an older
    export does not have, has none."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"seq2serve::{name}", "CompositeExplicitAutograd"
    )


def searches() -> bool:
    """Whether the library has the operators of lanes, which those of former versions have not."""
    return bool(_kernels) and implements("decode")


def enable(folder: Path) -> str:
    """Load the library in `folder`, if there is one and none is loaded yet.

    Returns:
        What `enabled` says from now on.
    """
    global _kernels
    path = folder / library()
    if _kernels or not path.exists():
        return _kernels
    try:
        torch.ops.load_library(str(path))
        _kernels = torch.ops.seq2serve.use("")
    except (OSError, RuntimeError) as error:
        logger.warning("%s cannot be used: %s", path, error)
    return _kernels


def declare(operators: dict[str, str]) -> None:
    """Make operators known by name and schema, where nothing has brought them."""
    for name, schema in operators.items():
        namespace, _, short = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), short):
            if namespace not in _declared:
                _declared[namespace] = torch.library.Library(namespace, "FRAGMENT")
            torch.library.define(name, schema, lib=_declared[namespace])


declare(SCHEMAS)
