"""Compiling CUDA C and launching what comes out, with what torch's CUDA build brings: NVRTC and the
driver, both called as they are. No file is written, and neither a compiler nor headers are needed.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | ctypes.Structure | None


class Kernels:
    """The kernels of one GPU, loaded.

    Args:
        driver: CUDA's, or what stands in for it.
        module, context: of the driver.
        names: of the kernels within the module, by those they are launched by.
    """

    def __init__(
        self, driver: Any, module: Any, context: Any, device: torch.device, names: dict[str, str]
    ) -> None:
        driver.cuLaunchKernel.argtypes = [
            ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
        ]  # fmt: skip
        self.driver, self.context, self.device = driver, context, device
        self.functions: dict[str, Any] = {}
        for name, lowered in names.items():
            function = ctypes.c_void_p()
            self.check(driver.cuModuleGetFunction(ctypes.byref(function), module, lowered.encode()))
            self.functions[name] = function

    def check(self, code: int) -> None:
        checked(self.driver, code)

    @contextmanager
    def current(self) -> Iterator[int]:
        """The stream to launch on, while the device's context is that of this thread."""
        self.check(self.driver.cuCtxPushCurrent_v2(self.context))
        try:
            yield torch.cuda.current_stream(self.device).cuda_stream
        finally:
            self.check(self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Argument) -> None:
        """Launch one on the current stream, `threads` in a block; nothing where there are no
        blocks. Whole numbers are of 64 bits."""
        if 0 in grid:
            return
        values = [as_argument(one) for one in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(one) for one in values))
        with self.current() as stream:
            self.check(
                self.driver.cuLaunchKernel(
                    self.functions[name], *grid, 1, threads, 1, 1, 0, stream, places, None
                )
            )


def as_argument(value: Argument) -> Any:
    if isinstance(value, ctypes.Structure):
        return value
    if isinstance(value, int):
        return ctypes.c_longlong(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def checked(driver: Any, code: int) -> None:
    """Raises RuntimeError for a code of the driver that is an error."""
    if code != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({code})")


def load(device: torch.device, sources: list[Path], names: list[str]) -> Kernels:
    """Compile `sources` for a GPU, a device with an index, and load the kernels `names`.

    Raises:
        RuntimeError: it cannot be done, and why.
    """
    if torch.version.cuda is None:
        raise RuntimeError("this build of torch has no CUDA")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no CUDA driver: {error}") from None
    rtc = nvrtc(torch.version.cuda.partition(".")[0])
    major, minor = torch.cuda.get_device_capability(device)
    binary, lowered = compiled(rtc, sources, names, f"sm_{major}{minor}")
    context, handle, module = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_void_p()
    checked(driver, driver.cuInit(0))
    checked(driver, driver.cuDeviceGet(ctypes.byref(handle), device.index))
    # The one that torch uses; it is kept, as the kernels are.
    checked(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    checked(driver, driver.cuCtxPushCurrent_v2(context))
    try:
        checked(driver, driver.cuModuleLoadData(ctypes.byref(module), binary))
        return Kernels(driver, module, context, device, lowered)
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def nvrtc(major: str) -> Any:
    """NVRTC of CUDA `major`: torch has mostly loaded it, from one of the places where pip puts it.

    Raises:
        RuntimeError: there is none.
    """
    name = f"libnvrtc.so.{major}"
    installed = (str(one) for path in sys.path for one in Path(path).glob(f"nvidia/*/lib/{name}"))
    for place in (name, *installed):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise RuntimeError(f"no {name} on this machine")


def compiled(
    rtc: Any, sources: list[Path], names: list[str], architecture: str
) -> tuple[bytes, dict[str, str]]:
    """`sources`, one behind the other, for an architecture such as sm_90, and what the kernels
    `names`, which may be templates, are called in it.

    Raises:
        RuntimeError: what the compiler complains of.
    """
    rtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def demand(code: int) -> None:
        if code != 0:
            size = ctypes.c_size_t(1)
            rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            rtc.nvrtcGetProgramLog(program, log)
            said = rtc.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f"NVRTC for {architecture}: {said} {log.value.decode().strip()}")

    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    text = "".join(f'#line 1 "{one.name}"\n{one.read_text("utf-8")}' for one in sources).encode()
    demand(rtc.nvrtcCreateProgram(ctypes.byref(program), text, None, 0, None, None))
    try:
        for name in names:
            demand(rtc.nvrtcAddNameExpression(program, name.encode()))
        given = (ctypes.c_char_p * len(options))(*options)
        demand(rtc.nvrtcCompileProgram(program, len(options), given))
        size = ctypes.c_size_t()
        demand(rtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        demand(rtc.nvrtcGetCUBIN(program, binary))
        lowered: dict[str, str] = {}
        for name in names:
            found = ctypes.c_char_p()
            demand(rtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(found)))
            lowered[name] = (found.value or b"").decode()
        return binary.raw, lowered
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))
