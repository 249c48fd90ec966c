"""The persistent CUDA recurrences on the host: builds the emulated kernels, and serves the operators by them."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from s2s_kernels import dispatch
from s2s_kernels.ops.recurrence import cuda_kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIELDS = (
    "cluster", "staged", "extended", "units", "width_units", "team", "teams", "rows", "warps_m", "warps_k", "project_m",
    "project_k", "held", "shared_bytes", "workspace_bytes",
)  # fmt: skip
SIZES = ("batch", "time", "hidden", "width", "cell", "operand", "reverse", "training", "normed", "projected")
FLAGS = ("-std=c++20", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{HERE}")
ENDINGS = (".cpp", ".h", ".cuh")


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("zoneout_h", ctypes.c_double),
        ("zoneout_c", ctypes.c_double),
    ]


_plan = ctypes.c_int64 * len(FIELDS)


def build() -> Path:
    """The library, under build/, made again if a source of it has changed. FileNotFoundError: there is no g++."""
    if shutil.which("g++") is None:
        raise FileNotFoundError("g++ is not installed")
    library = ROOT / "build" / "emulated" / "recurrence.so"
    sources = [file for folder in (ROOT / "csrc", HERE) for file in folder.rglob("*") if file.suffix in ENDINGS]
    newest = max(file.stat().st_mtime for file in sources)
    if not library.exists() or library.stat().st_mtime < newest:
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")  # other processes build it too
        command = ["g++", *FLAGS, "-O1", "-g", "-shared", "-fPIC", HERE / "recurrence_emulated.cpp", "-o", partial]
        subprocess.run(command, check=True)
        partial.replace(library)
    return library


class Layout(NamedTuple):
    """How a test lays a call over blocks; what isn't said follows from it."""

    cluster: bool = False
    units: int = 8
    teams: int = 1
    rows: int = 16
    warps_k: int = 1
    staged: bool = False


class Emulated:
    """The operators of csrc/cuda/recurrence.cpp on CPU tensors."""

    def __init__(self, layout: Layout | None = None) -> None:
        self.library, self.layout = ctypes.CDLL(str(build())), layout
        self.library.modelled_step.restype = ctypes.c_double

    def recurrence_persistent_plan(self, size: Sequence[int], backward: bool, machine: Sequence[int]) -> list[int]:
        call = Call(*size, 0, 0)
        if self.layout is None:
            values = self.planned(size, backward, machine)
            if not values:
                return []
        else:
            cluster, units, teams, rows, warps_k, staged = self.layout
            team = -(-call.hidden // units)
            if cluster:
                team = 1 << (team - 1).bit_length()
            given = {"cluster": cluster, "staged": staged, "units": units, "team": team, "teams": teams, "rows": rows}
            given["warps_k"] = warps_k
            values = [given.get(name, 0) for name in FIELDS]
        plan = _plan(*values)
        self.library.complete(ctypes.byref(call), int(backward), plan)
        return list(plan)

    def planned(self, size: Sequence[int], backward: bool, machine: Sequence[int]) -> list[int]:
        """As on a GPU; `recurrence_persistent_plan` keeps fewer weights in registers."""
        plan = _plan()
        call = Call(*size, 0, 0)
        found = self.library.plan(ctypes.byref(call), int(backward), (ctypes.c_int64 * 3)(*machine), plan)
        return list(plan) if found else []

    def recurrence_persistent_resident(self, plan: Sequence[int], operand: int, backward: bool, device: int) -> int:
        return plan[FIELDS.index("teams")]

    def modelled_step(self, size: Sequence[int], backward: bool, plan: Sequence[int], hopper: bool) -> float:
        call = Call(*size, 0, 0)
        return self.library.modelled_step(ctypes.byref(call), int(backward), _plan(*plan), hopper) / 1000

    def _run(self, name: str, arguments: Sequence[Any]) -> None:
        *tensors, size, zoneout_h, zoneout_c, plan = arguments
        for tensor in tensors:
            assert tensor is None or tensor.is_contiguous()
        pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
        call = Call(*map(int, size), zoneout_h, zoneout_c)
        fits = getattr(self.library, name)(ctypes.byref(call), _plan(*plan), pointers)
        assert fits, plan

    def recurrence_persistent_forward(self, *arguments: Any) -> None:
        self._run("forward", arguments)

    def recurrence_persistent_backward(self, *arguments: Any) -> None:
        self._run("backward", arguments)


@contextlib.contextmanager
def emulated(layout: Layout | None = None, machine: tuple[int, int, bool] = (8, 96 << 10, True)) -> Iterator[Emulated]:
    """Inside, the adapter runs the emulated kernels on CPU tensors, laid over blocks as said or as planned for a
    machine of so many multiprocessors and so much shared memory, with clusters or without. Around them the cuda
    backend takes CPU tensors, where the rest of it is emulated too."""
    found = Emulated(layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "kernels", found)
        patch.setattr(cuda_kernels, "machine_of", lambda device: machine)
        patch.setattr(cuda_kernels, "missing", lambda device: None)
        patch.setattr(dispatch, "emulated", dispatch.emulated | {"cuda"})
        yield found
