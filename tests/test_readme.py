"""The README's code runs as printed, and its tables are what the generator makes."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from s2s_kernels import dispatch, nn

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_first_example_runs(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([8, 120, 128]) torch.Size([8, 4, 120, 32]) torch.Size([8, 64, 120])" in printed
    assert "served by" in printed


def test_the_example_of_patching_runs(capsys):
    model = torch.nn.ModuleDict(
        {"lstm": torch.nn.LSTM(3, 4), "attention": torch.nn.MultiheadAttention(4, 2), "linear": torch.nn.Linear(2, 2)}
    )
    import s2s_kernels as s2s

    exec(compile(BLOCKS[1], "README.md", "exec"), {"s2s": s2s, "model": model})
    assert "lstm" in capsys.readouterr().out
    assert type(model["lstm"]) is torch.nn.LSTM and not isinstance(model["lstm"], nn.LSTM)


def test_every_block_is_tested():
    assert len(BLOCKS) == 2


@pytest.mark.skipif(dispatch.extension_missing is not None, reason="the compiled extension is missing")
def test_the_tables_are_what_the_generator_makes():
    readme = README.read_text()
    assert tables.generated(readme) == readme, "run python -m benchmarks.tables"
