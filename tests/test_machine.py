import pytest

from s2s_kernels import machine

pytestmark = pytest.mark.skipif(machine.missing is not None, reason=str(machine.missing))


def test_facts():
    features = machine._machine.cpu_features()
    assert machine.active_isa() in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    assert features.get("avx2", False) or machine._machine.widest_isa() == "baseline"
    assert {"compiler", "standard", "instruction_sets"} == set(machine._machine.build())
    assert machine.processor()


def test_the_last_cache_is_the_systems():
    """Processors that don't tell give 0; the system asks them the same."""
    sizes = machine.cache_sizes()
    assert not sizes or machine._machine.last_cache() in (0, max(sizes.values()))


def test_limits_are_plausible():
    """Not a timing: any machine of this century lies inside these factors of ten."""
    assert 1e9 < machine.peak_flops(1, 0.02) < 1e12
    rates = machine.bandwidths(0.02)
    assert [name for name, _, _ in rates][-1] == "DRAM"
    assert all(1e8 < rate < 1e13 for _, _, rate in rates)
    assert [size for _, size, _ in rates] == sorted(size for _, size, _ in rates)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="threads must be at least 1"):
        machine.peak_flops(0)
    with pytest.raises(ValueError, match="bytes must be at least 4096"):
        machine._machine.read_bandwidth(8)
