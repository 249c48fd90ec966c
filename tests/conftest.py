"""What every test runs under: deterministic algorithms (fresh buffers hold NaN), bounded hypothesis runs, and, where
there is no GPU, Triton's interpreter."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("S2S_HYPOTHESIS", "suite"))

# Processes that share the cores would wait for one another's threads. Tests of threads set their number themselves.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# Fresh memory of the extension's, which reads this when it is loaded, holds NaN; that of torch's under deterministic
# algorithms.
os.environ.setdefault("S2S_FILL", "1")

if not torch.cuda.is_available():  # triton reads it when it is imported, which nothing has done yet
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def deterministic():
    """Fresh buffers are filled with NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is available"))
