"""What is around every operator's kernels (ops/differentiation.py)."""

import pytest
import torch
from interpreting import needs_extension
from torch._dynamo.testing import CompileCounterWithBackend

import s2s_kernels as s2s
from s2s_kernels.testing import Draw


@needs_extension
@pytest.mark.parametrize("given", ["qqq", "qkk", "lengths"])
def test_compiles_with_one_tensor_given_twice(given):
    """torch.compile traces no Function that is given a tensor twice; without compiling anew for another length."""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, lengths):
        if given == "lengths":
            return s2s.attention(q, k, v, query_lengths=lengths, key_lengths=lengths)
        return s2s.attention(q, q, q) if given == "qqq" else s2s.attention(q, k, k)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for time in (5, 7, 9, 12):
        leaves = [Draw()(2, 2, time, 4).requires_grad_() for _ in range(3)]
        lengths = torch.tensor([time, 3])
        upstream = Draw()(2, 2, time, 4)
        found = []
        for function in (attend, compiled):
            out = function(*leaves, lengths)
            found.append([out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@needs_extension
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: s2s.additive_attention(x, x, x, w[0]),
        lambda x, w: s2s.causal_conv1d(x, w[:, :, None], residual=x),
        lambda x, w: s2s.rnn(x, w, w)[0],
        lambda x, w: s2s.attention_packed(x, x, x, torch.arange(0, 7, 3), torch.arange(0, 7, 3)),
    ],
)
def test_other_operators_compile_with_one_tensor_given_twice(call):
    leaves = Draw()(6, 4, 4).requires_grad_(), Draw()(4, 4).requires_grad_()
    torch._dynamo.reset()
    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
