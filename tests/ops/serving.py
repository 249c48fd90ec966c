"""What the generic tests run on: each backend, those of a GPU emulated on CPU tensors, and its samples."""

import contextlib
import os
import shutil

import emulated_recurrence
import pytest
import torch

from s2s_kernels import dispatch
from s2s_kernels.testing import CASES, Draw, compare, emulation

THOROUGH = os.environ.get("S2S_HYPOTHESIS") == "thorough"
ON_CPU = ("reference", "cpu", "torch")
EMULATED = ("triton", "cuda")
HALVES = {"triton": (torch.float16,), "cuda": (torch.bfloat16, torch.float16)}  # as emulated: see emulation.emulated
SLOW = {"attention": ("tails", "tails, everything", "several blocks"), "recurrent layers": ("tails",)}
# Made of the kernels of others: without S2S_HYPOTHESIS=thorough most tests leave emulated ones out.
COMPOSED = ("recurrent layers", "scaled_dot_product_attention", "prepared additive_attention")
RECURRENT = ("lstm", "gru", "rnn", "recurrent layers")  # what cuda has kernels of


def not_emulated(backend):
    """Why an emulated backend can't run in this process; None where it can."""
    missing = "g++ is not installed" if backend == "cuda" and shutil.which("g++") is None else None
    return emulation.unavailable() or missing


def marks_of(backend):
    if backend not in EMULATED:
        return ()
    # numpy, in which Triton's interpreter computes, warns of what a GPU does in silence.
    quiet = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
    return pytest.mark.skipif(not_emulated(backend) is not None, reason=str(not_emulated(backend))), quiet


@contextlib.contextmanager
def forced(backend):
    """Inside, every call is this backend's; None: of whichever serves."""
    with contextlib.ExitStack() as stack:
        if backend in EMULATED:
            stack.enter_context(emulation.emulated())
        if backend == "cuda":
            stack.enter_context(emulated_recurrence.emulated())
        if backend is not None:
            stack.enter_context(dispatch.use_backend(backend))
        yield


def covers(function, arguments):
    """Whether the backend that is forced takes the call; where it doesn't, that calling it raises and says why."""
    args, kwargs = arguments
    try:
        dispatch.explain(function, *args, **kwargs)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=r"does not cover this call: ."):
            function(*args, **kwargs)
        return False
    return True


def judge(function, arguments, **options):
    """Asserts that the results and gradients of what serves are as close to the definition's as the contract asks."""
    if covers(function, arguments):
        broken = {name: by for name, by in compare(function, arguments, **options).items() if not by <= 0}
        assert not broken, broken


# Samples of an operator

NAMES = {case.function: name for name, case in CASES.items()}


def every(case):
    return case.samples


def brief(case):
    """All but those that take an interpreter seconds."""
    return [sample for sample in case.samples if sample.name not in SLOW.get(NAMES[case.function], ())]


def refused(case):
    return case.errors


def smooth(case):
    return [sample for sample in case.samples if sample.smooth]


def first(case):
    return case.samples[:1]


def given(sample):
    args, kwargs = sample.build(Draw())
    return {place for place, value in enumerate(args) if value is not None} | kwargs.keys()


def covering(case):
    """The first, and smooth ones that give between them every argument that smooth ones give."""
    found, left = [case.samples[0]], smooth(case)
    known = given(found[0])
    while len(given(most := max(left, key=lambda sample: len(given(sample) - known))) - known):
        found.append(most)
        known |= given(most)
    return found


def fullest(case):
    """The smooth one that gives most arguments."""
    return [max(smooth(case), key=lambda sample: len(given(sample)))]


def over(*backends, samples=None, emulated=None):
    """Runs a test for each operator, sample of it and backend, which is forced for the whole test.

    Args:
        backends: None: whichever serves.
        samples: gives those of an operator; None: the test takes none.
        emulated: those on emulated backends, whose calls take long, unless S2S_HYPOTHESIS=thorough.
    """
    found = []
    for backend in backends:
        for name, case in CASES.items():
            if backend == "cuda" and name not in RECURRENT:
                continue
            few = backend in EMULATED and not THOROUGH
            if few and name in COMPOSED and emulated not in (brief, refused):
                continue
            for sample in (emulated if few and emulated else samples)(case) if samples else (None,):
                values, ids = ((case,), [name]) if sample is None else ((case, sample), [name, sample.name])
                told = "-".join(ids if backend is None else [*ids, backend])
                found.append(pytest.param(*values, backend, id=told, marks=marks_of(backend)))
    names = "case, sample, backend" if samples else "case, backend"
    return pytest.mark.parametrize(names, found, indirect=["backend"])
