"""Builds the compiled parts: `_C` (operators behind torch's stable ABI: one abi3 library for every torch >= 2.11 and
every Python)
and `_machine` (pybind11, no torch: built for one Python version, and not needed for the import)."""

import os
import shutil
import subprocess
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

STABLE = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020B000000000000"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Werror=psabi"]
# Every fused multiply-add is written out: contraction by the compiler would differ from place to place, and with it the
# bits.
HOST = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", *STABLE, *WARNINGS]

# Host code about a GPU: which backend is expected to be faster can be asked, and tested, without one.
PLAN = str(Path("csrc", "cuda", "recurrence_plan.cpp"))


def sources(folder: str, ending: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob(f"*.{ending}"))


def with_cuda() -> bool:
    """CUDA kernels are built where there are any, and nvcc and a CUDA torch are at hand, or when S2S_BUILD_CUDA=1 asks
    for them."""
    if not sources("cuda", "cu"):
        return False
    asked = os.environ.get("S2S_BUILD_CUDA")
    return asked == "1" or (asked != "0" and shutil.which("nvcc") is not None and torch.version.cuda is not None)


def cuda_flags() -> list[str]:
    """Machine code for the architectures that the kernels are checked for, and PTX for those between and after: of
    each that this nvcc knows."""
    nvcc = shutil.which("nvcc") or str(Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc"))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    binaries = [arch for arch in ("80", "90a", "100") if f"compute_{arch.rstrip('a')}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in binaries]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in binaries if not arch.endswith("a")]
    return ["-O3", "-std=c++17", "--threads=0", *flags]  # the architectures at once, where there are processors


def operators() -> CppExtension:
    files = ["csrc/operators.cpp", PLAN, *sources("cpu", "cpp")]
    if with_cuda():
        return CUDAExtension(
            "s2s_kernels._C",
            [*files, *(file for file in sources("cuda", "cpp") if file != PLAN), *sources("cuda", "cu")],
            extra_compile_args={"cxx": [*HOST, "-DS2S_CUDA", "-DUSE_CUDA"], "nvcc": cuda_flags()},
            py_limited_api=True,
        )
    return CppExtension("s2s_kernels._C", files, extra_compile_args=HOST, py_limited_api=True)


class Build(BuildExtension):
    """torch's builder names every extension abi3 if one is; the pybind11 module belongs to one Python version."""

    def get_ext_filename(self, ext_name: str) -> str:
        if ext_name.endswith("_machine"):
            return super(BuildExtension, self).get_ext_filename(ext_name)
        return super().get_ext_filename(ext_name)


setup(
    ext_modules=[
        operators(),
        Pybind11Extension(
            "s2s_kernels._machine", ["csrc/machine.cpp"], cxx_std=17, extra_compile_args=["-O3", "-ffp-contract=off"]
        ),
    ]
    if Path("csrc/machine.cpp").exists()
    else [operators()],
    cmdclass={"build_ext": Build},
)
