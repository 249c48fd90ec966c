"""Builds and runs the C++ unit tests of the shared CPU core under every instruction set of this machine."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDES = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc' / 'cpu'}"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror=psabi"]


def machine_sets() -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    sets = ["baseline"]
    if {"avx2", "fma", "f16c"} <= flags:
        sets.append("avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            sets.append("avx512")
            if "avx512_bf16" in flags:
                sets.append("avx512_bf16")
                if {"amx_tile", "amx_bf16"} <= flags:
                    sets.append("amx")
    return sets


@pytest.fixture(scope="module")
def core_test(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("core") / "core_test"
    command = [*compiler.split(), "-std=c++17", "-O1", "-ffp-contract=off", *WARNINGS, *INCLUDES]
    subprocess.run([*command, str(HERE / "core_test.cpp"), "-o", str(binary)], check=True)

    def run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "S2S_CPU_ISA": instruction_set}
        return subprocess.run([str(binary), *arguments], check=False, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("suite", ["math", "storage", "gemm", "random"])
@pytest.mark.parametrize("instruction_set", machine_sets())
def test_suite(core_test, instruction_set, suite):
    result = core_test(instruction_set, suite)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif("amx" not in machine_sets(), reason="this machine has no tile unit for bfloat16")
def test_products_on_the_tile_unit(core_test):
    result = core_test("amx", "tiles")
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_instruction_set_is_refused(core_test):
    result = core_test("sse9", "random")
    assert result.returncode != 0
    assert "S2S_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got sse9" in result.stderr


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. (2011), in plain integers."""
    word = 0xFFFFFFFF
    for step in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        k0, k1 = (key[0] + step * 0x9E3779B9) & word, (key[1] + step * 0xBB67AE85) & word
        counter = [second >> 32 ^ counter[1] ^ k0, second & word, first >> 32 ^ counter[3] ^ k1, first & word]
    return counter


def random_word(seed0: int, seed1: int, stream: int, row: int, column: int) -> int:
    word = 0xFFFFFFFF
    counter = [(column // 32 * 8 + column % 8) & word, row & word, row >> 32 & word, (seed1 + stream) & word]
    return philox(counter, [seed0 & word, seed0 >> 32 & word])[column // 8 % 4]


@pytest.mark.parametrize("instruction_set", machine_sets())
def test_random_words_follow_the_definition(core_test, instruction_set):
    elements = [
        (0, 0, 0, 0, 0),
        (-1, -1, 1, 7, 33),
        (2**63 - 1, -(2**63), 5, 2**40 + 3, 31),
        (0x123456789ABCDEF, 0xFFFFFFFF, 2, 12, 2**37 + 45),
        *((3, 4, stream, stream * 11, column) for stream in range(3) for column in range(0, 100, 7)),
    ]
    result = core_test(instruction_set, "word", *(str(number) for element in elements for number in element))
    assert [int(line) for line in result.stdout.split()] == [random_word(*element) for element in elements]
