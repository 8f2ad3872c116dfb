"""The fused int8 operators in C++: `training.export` has them compiled.

Start at operators.cpp (what torch sees), then kernels.h and body.h (what is computed), then one
file for each kind of processor (avx2, avx512, amx).
"""

from model.native.build import NoCompiler, build

__all__ = ["NoCompiler", "build"]
