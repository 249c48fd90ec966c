"""What was built, and what happens where it wasn't."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import s2s_kernels
from s2s_kernels import dispatch, machine

ROOT = Path(s2s_kernels.__file__).parents[1]
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden!r}:
            raise ImportError(name + " is hidden")
sys.meta_path.insert(0, Hide())
"""


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "S2S_BACKEND": "", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_without_the_extension_the_reference_serves():
    run = python(
        HIDE.format(hidden=("s2s_kernels._C", "s2s_kernels._machine"))
        + """
import torch, s2s_kernels as s
x, w = torch.randn(2, 5, 3), torch.randn(4, 3, 2)
y = s.causal_conv1d(x.mT, w)
assert y.shape == (2, 4, 5)
print(s.explain(s.causal_conv1d, x.mT, w))
from s2s_kernels import cli
cli.main(["info"])
"""
    )
    assert run.returncode == 0, run.stderr
    assert "served by reference" in run.stdout
    assert "not cpu: the compiled extension is missing (s2s_kernels._C is hidden)" in run.stdout


def test_importing_loads_and_starts_nothing_else():
    run = python(
        """
import sys, torch, s2s_kernels
print([name for name in ("triton", "matplotlib", "numpy.testing", "onnx", "pytest") if name in sys.modules])
print(torch.cuda.is_initialized(), "torch._dynamo.convert_frame" in sys.modules)
"""
    )
    assert run.stdout.split("\n")[:2] == ["[]", "False False"], run.stdout + run.stderr


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_each_instruction_set_runs_or_is_refused(isa):
    run = python(
        """
import torch, s2s_kernels as s
from s2s_kernels import machine
from s2s_kernels.testing import CASES, Draw, compare
for name, case in CASES.items():
    for sample in case.samples[:3]:
        assert max(compare(case.function, sample.build(Draw())).values()) <= 0, (name, sample.name)
print("served by", machine.active_isa())
""",
        S2S_CPU_ISA=isa,
    )
    order = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    if order.index(isa) <= order.index(machine._machine.widest_isa()):
        assert f"served by {isa}" in run.stdout, run.stderr
    else:
        assert f"S2S_CPU_ISA={isa}: this machine has only" in run.stderr
        assert run.returncode == 1


@needs_extension
def test_an_unknown_instruction_set_is_refused():
    run = python("from s2s_kernels import machine; machine.active_isa()", S2S_CPU_ISA="mmx")
    assert "S2S_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got mmx" in run.stderr


def wide_registers(disassembly, namespace):
    """The widest register that functions of this namespace use: "xmm", "ymm", "zmm", or the tile unit's "tmm"."""
    found, inside = set(), False
    for line in disassembly:
        if line.endswith(">:\n"):
            inside = f"s2s::{namespace}::" in line
        elif inside:
            found.update(re.findall(r"%([xyzt]mm)", line))
    return max(found, key=("xmm", "ymm", "zmm", "tmm").index, default=None)


@needs_extension
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has several instruction sets")
def test_each_namespace_holds_code_of_its_own_width():
    library = next((ROOT / "s2s_kernels").glob("_C*.so"))
    with subprocess.Popen(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library], stdout=subprocess.PIPE, text=True
    ) as run:
        lines = list(run.stdout)
    names = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    assert [wide_registers(lines, name) for name in names] == ["xmm", "ymm", "zmm", "zmm", "tmm"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A source distribution, and a wheel with nothing compiled (compiling is what the suite itself runs on)."""
    folder = tmp_path_factory.mktemp("source")
    copied = folder / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "results", "*.egg-info", "out")
    shutil.copytree(ROOT, copied, ignore=ignored)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", folder], check=True, cwd=copied, capture_output=True
    )
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--skip-build", "-d", folder],
        check=True,
        cwd=copied,
        capture_output=True,
    )
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_source_distribution_can_be_built(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    needed.add("s2s_kernels/ops/recurrence/measurements.json")
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_the_wheel_belongs_to_one_python_and_holds_the_package_alone(distributions):
    """_machine is built for one Python version, so the wheel must not claim to be abi3."""
    assert "abi3" not in distributions[1].name
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(distributions[1]).namelist()}
    assert {top.partition("-")[0] for top in tops} == {"s2s_kernels"}


@needs_extension
def test_names_of_the_compiled_parts():
    folder = ROOT / "s2s_kernels"
    assert (folder / "_C.abi3.so").exists()
    assert machine.missing is None, machine.missing
    assert "abi3" not in Path(machine._machine.__file__).name
