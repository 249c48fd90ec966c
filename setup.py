"""Builds the compiled parts: `_C` (operators, torch's stable ABI, one abi3 library) and `_machine` (pybind11, no torch)."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

STABLE = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020B000000000000"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Werror=psabi"]

setup(
    ext_modules=[
        CppExtension(
            "s2s_kernels._C",
            ["csrc/operators.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            extra_compile_args=["-O3", "-std=c++17", *STABLE, *WARNINGS],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
