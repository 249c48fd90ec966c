import json
import subprocess
import sys

import pytest
import torch

import s2s_kernels
from s2s_kernels import cli, dispatch
from s2s_kernels.testing import CASES, OperatorCase, Sample, call

ARITHMETIC = dispatch.Operator("arithmetic", {"cpu": lambda call: None})


def test_info_reads_well_and_as_json(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "instruction_set" in text
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    public = {name for name in s2s_kernels.__all__ if name in CASES}
    assert {"lstm", "attention"} <= public - {"scaled_dot_product_attention"} <= set(facts["operators"])
    for backends in facts["operators"].values():
        assert set(backends) == set(dispatch.BACKENDS) and backends["reference"] == "available"
        assert all(state for state in backends.values())


def test_a_fault_of_the_set_up_is_told(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "extension_missing", "the compiled extension is missing (nobody built it)")
    assert cli.main(["info"]) == 0
    assert "nobody built it" in capsys.readouterr().out
    assert cli.main(["check"]) == 1
    assert "nobody built it" in capsys.readouterr().out


def pretend(monkeypatch, kernel):
    """An operator whose cpu backend is `kernel` and whose definition is the square."""
    monkeypatch.setattr(dispatch, "extension_missing", None)

    def function(x):
        return kernel(x) if dispatch.choose(ARITHMETIC, x.device, None) == "cpu" else x.square()

    case = OperatorCase(function, (Sample("plain", lambda d: call(d(3))),), (), lambda d, t: call(d(t)))
    monkeypatch.setattr(dispatch, "OPERATORS", {"arithmetic": ARITHMETIC})
    monkeypatch.setattr("s2s_kernels.testing.CASES", {"arithmetic": case})


def test_check_passes_a_right_kernel(monkeypatch, capsys):
    pretend(monkeypatch, lambda x: x * x)
    assert cli.main(["check"]) == 0
    assert "4 calls judged, 0 wrong" in capsys.readouterr().out


def test_check_fails_a_wrong_kernel(monkeypatch, capsys):
    pretend(monkeypatch, lambda x: x * x * 1.1)
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    assert "FAILED arithmetic on cpu" in text and "plain, torch.float32, output 0:" in text


def test_models_are_listed_with_their_counts(capsys):
    from s2s_kernels.models import MODELS

    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split()[0] for line in lines] == list(MODELS)
    for line, build in zip(lines, MODELS.values(), strict=True):
        assert int(line.split()[1].replace(",", "")) == sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_wrong_commands_are_refused(arguments):
    run = subprocess.run([sys.executable, "-m", "s2s_kernels", *arguments], check=False, capture_output=True, text=True)
    assert run.returncode == 2 and "usage" in run.stderr
