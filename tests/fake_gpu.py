"""A GPU that is not there, and a look at everything that is done on it.

Torch's fake tensors carry a device and no values. `Watch` looks at every operation on them: it
refuses operands of different devices, and notes what makes Python wait until the device has done
all that it was given before.

Fake tensors alone do not do, and what stands in for what:

- A build of torch without CUDA has no guard for such a device and refuses even an index. Torch's
  own one that does nothing, which its CUDA build takes where there is no GPU, is compiled here.
- How many words a packed batch has is a value. `_pack_padded_sequence`, `lstm` and
  `_pad_packed_sequence` are answered with memory of the right shapes, after a look at where their
  operands are.
- Pinned memory needs a driver: tensors that should be pinned are marked, and so are views of them.
- Streams and events are stand-ins; that work waits for the right ones is for tests/test_gpu.py.
- What is read on the host has no value: 0 is read, or what a test says.
- The operators of kernels.py are counted as one kernel each and computed by their plain forms,
  which run on a GPU too where nothing can be compiled: these are watched as well.
"""

import ctypes
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from handler.decoding import kernels, static_search

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
GUARD = """\
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""
PLAIN = {
    "lstm_pointwise": kernels.plain_lstm_pointwise, "attend": kernels.plain_attend,
    "gather_rows": kernels.plain_gather_rows, "choose": kernels.plain_choose,
    "advance": static_search.advance,
}  # fmt: skip
# Whose result is a number or has a size that only the device knows.
READING = ("nonzero", "masked_select", "bincount", "repeat_interleave")
ANSWERED = ("_pack_padded_sequence", "lstm", "_pad_packed_sequence", "_unique2", "equal")
# What makes no kernel: a look at memory in another way, or asking for some.
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach",
             "lift_fresh")  # fmt: skip
# Operators that move a single number from the host to where the others are, and wait for it.
FETCHING = ("index_put_", "index_put", "_index_put_impl_", "where", "cat", "stack")


class Watch(TorchDispatchMode):
    """Looks at every operation.

    waits: where something waits for the device, as "file:line operator".
    kernels: operators that are at least one kernel on a GPU, by name.
    answer, truth: the number (by a lane, else 0) and the bool that are read from the device.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = [], Counter()
        self.answer, self.truth = 0.0, False
        self.inside = False  # an operator of kernels.py, which has been counted

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        space, name = function.namespace, function._schema.name.partition("::")[2]
        if space == "prim":  # where a tensor is
            return function(*arguments, **named)
        tensors = [t for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)]
        if name == "_local_scalar_dense":
            return self.read(function, arguments)
        if name in ("_to_copy", "copy_"):
            self.kernels[name] += not self.inside and on_gpu(tensors)
            return self.copied(function, name, arguments, named)
        if name in ANSWERED:
            return getattr(self, name)(*arguments, **named)
        with self:  # in inference mode operators arrive whole
            parts = function.decompose(*arguments, **named)
        if parts is not NotImplemented:
            return parts
        if not self.inside and not function.is_view and name not in NO_KERNEL:
            self.kernels[name] += on_gpu(tensors) or named.get("device") == GPU
        self.refuse_mixed(function, name, tensors)
        if name in ("index", "index_put_") and on_gpu(tensors) and any(
            one is not None and one.dtype == torch.bool for one in arguments[1]
        ):  # a mask, of which the places are counted first
            self.waited(name)
            return self.masked(function, *arguments)
        if space == "seq2serve":
            return self.plainly(PLAIN[name], arguments, named)
        if any(name.startswith(one) for one in READING) and on_gpu(tensors):
            self.waited(name)
            return tensors[0].new_empty((0, tensors[0].dim()), dtype=torch.long)
        pinned = named.pop("pin_memory", False)
        found = function(*arguments, **named)
        if pinned or (function.is_view and is_pinned(tensors[0])):
            for one in tree_leaves(found):
                one.pinned = True
        return found

    @staticmethod
    def masked(function, table, indices, *rest):
        """As many rows as a test needs: none."""
        if rest:
            return table
        return table.new_empty((0, *table.shape[indices[-1].dim() :]))

    def plainly(self, form, arguments, named):
        before, self.inside = self.inside, True
        try:
            with self:
                return form(*arguments, **named)
        finally:
            self.inside = before

    def read(self, function, arguments):
        (one,) = arguments
        if one.device == GPU:
            self.waited("read")
            asked = self.answer if where().startswith("lane.py") else 0.0
            return asked if one.dtype.is_floating_point else self.truth
        try:
            return function(one)
        except DataDependentOutputException:
            return 0.0 if one.dtype.is_floating_point else 0

    def copied(self, function, name, arguments, named):
        """A copy between devices waits, unless it may go on and the host's memory is pinned."""
        into = arguments[0].device if name == "copy_" else named.get("device")
        origin = arguments[1] if name == "copy_" else arguments[0]
        free = named.get("non_blocking", False) or (name == "copy_" and arguments[2:] == (True,))
        if into is not None and into != origin.device:
            there = arguments[0] if name == "copy_" else None
            host = origin if into == GPU else there
            if not free or (host is not None and not is_pinned(host)):
                self.waited(name)
        return function(*arguments, **named)

    def refuse_mixed(self, function, name, tensors):
        devices = {t.device for t in tensors if t.dim() > 0}
        if len(devices) > 1:
            raise AssertionError(f"{where()} {function}: operands on {sorted(map(str, devices))}")
        single = any(t.device == HOST for t in tensors if t.dim() == 0)
        if name in FETCHING and GPU in devices and single:
            self.waited(name)

    def waited(self, name):
        self.waits.append(f"{where()} {name}")

    # What fake tensors cannot do. Lengths are read on the host, and so must be there.

    def equal(self, one, other):
        assert one.device == other.device
        self.waited("equal")
        return True

    def _unique2(self, table, *_):
        self.waited("unique")
        return table.new_empty(table.numel()), torch.empty_like(table), table.new_empty(0)

    def _pack_padded_sequence(self, x, lengths, batch_first):
        assert (x.device, lengths.device) == (GPU, HOST)
        n, steps = x.shape[:2]
        return x.new_empty((n * steps, *x.shape[2:])), torch.empty(steps, dtype=torch.long)

    def lstm(self, data, sizes, state, weights, biased, layers, dropout, train, both_ways):
        assert {t.device for t in (data, *state, *weights)} == {GPU}
        assert sizes.device == HOST
        width = state[0].size(2) * (2 if both_ways else 1)
        return data.new_empty((data.size(0), width)), *(torch.empty_like(t) for t in state)

    def _pad_packed_sequence(self, data, sizes, batch_first, padding, total):
        assert (data.device, sizes.device) == (GPU, HOST)
        return (data.new_empty((data.size(0) // total, total, data.size(1))),
                torch.empty(data.size(0) // total, dtype=torch.long))  # fmt: skip


def on_gpu(tensors):
    return any(t.device == GPU for t in tensors)


def is_pinned(tensor):
    return getattr(tensor, "pinned", False)


def marked(tensor):
    """In the place of `Tensor.pin_memory`."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def where():
    """The line of the project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.parts[len(ROOT.parts)] in ("handler", "model"):
            return f"{path.name}:{frame.lineno}"
    return "test"


class Stream:
    """Of torch.cuda, which does nothing."""

    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


def allow_indices(folder):
    """Of tensors on a GPU, where torch is built without any."""
    if torch.version.cuda is not None:
        return
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux")
    (folder / "guard.cpp").write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-fPIC", "-shared", "guard.cpp", "-o", "guard.so",
         f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"],
        cwd=folder, check=True,
    )  # fmt: skip
    ctypes.CDLL(str(folder / "guard.so"))


@contextmanager
def watching(monkeypatch):
    """What is done inside is done on no device, and looked at."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", marked)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda _: False)
    free = 1 << 40  # bytes
    for name, one in {
        "Stream": Stream, "Event": Event, "stream": lambda _: nullcontext(),
        "current_stream": lambda *_: Stream(), "mem_get_info": lambda *_: (free, free),
        "memory_reserved": lambda *_: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, one)
    with FakeTensorMode(), torch.inference_mode(), Watch() as watch:
        yield watch


@contextmanager
def waits(watch):
    """Those of what is done inside, each place once."""
    before = len(watch.waits)
    found = set()
    yield found
    found |= {*watch.waits[before:]}
