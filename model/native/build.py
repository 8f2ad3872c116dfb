"""Compiles the operators into one library for this system, this processor family and this torch."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
COMMON = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter",
)  # fmt: skip
AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
    "-mprefer-vector-width=512",
)  # fmt: skip
FLOAT_AVX512 = tuple(flag for flag in AVX512 if flag != "-mavx512vnni")
FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512,
    "amx": (*AVX512, "-mamx-tile", "-mamx-int8"),
    "dispatch": (),
    "search": (),
    "operators": (),
    "lanes": (),
    "decode": (),
    "float32_avx2": ("-mavx2", "-mfma"),
    "float32_avx512": FLOAT_AVX512,
    "float32_operators": (),
}
MACHINES = ("x86_64", "amd64")


class NoCompiler(RuntimeError):
    """This machine cannot compile the operators; says why."""


def build(folder: Path, name: str) -> Path:
    """The library `folder`/`name`, compiled if it is not there or its sources have changed.

    OpenMP is left to be found in torch's own copy, which is loaded already: two would each keep
    threads of their own.

    Raises:
        NoCompiler: no compiler, one that fails, or a processor for which there are no kernels.
    """
    library, stamp = folder / name, folder / f"{name}.sources"
    wanted = digest()
    if library.exists() and stamp.exists() and stamp.read_text("utf-8") == wanted:
        return library
    if platform.system() != "Linux" or platform.machine().lower() not in MACHINES:
        raise NoCompiler(f"no kernels for {platform.system()} on {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise NoCompiler("no C++ compiler (g++, c++ or what CXX names)")
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        objects = [Path(temporary, f"{source}.o") for source in FLAGS]
        commands = [
            (compiler, *COMMON, *FLAGS[source], "-isystem", str(torch_folder / "include"),
             "-c", str(SOURCES / f"{source}.cpp"), "-o", str(target))
            for source, target in zip(FLAGS, objects)
        ]  # fmt: skip
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            list(compilers.map(lambda command: run(*command), commands))
        linked = Path(temporary, name)
        run(compiler, "-shared", "-s", *map(str, objects), f"-L{torch_folder / 'lib'}",
            "-ltorch_cpu", "-lc10", "-o", str(linked))  # fmt: skip
        os.replace(linked, library)
    stamp.write_text(wanted, "utf-8")
    return library


def digest() -> str:
    """Of everything that the library is made from, but for the compiler."""
    content = hashlib.sha256(f"{torch.__version__} {COMMON} {FLAGS}".encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        content.update(path.read_bytes())
    return content.hexdigest()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise NoCompiler(f"{command[0]} failed: {told[0] if told else done.returncode}")
