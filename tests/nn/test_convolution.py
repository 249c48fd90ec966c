"""CausalConv1d, GatedCausalConv1d, WaveNetStack and TCNStack: torch's parameters, steps equal to forward, beams."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.nn import CausalConv1d, GatedCausalConv1d, TCNStack, WaveNetStack
from s2s_kernels.testing import Draw

needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_conv1d(bias):
    torch.manual_seed(5)
    theirs = nn.Conv1d(6, 8, 3, dilation=2, groups=2, bias=bias)
    torch.manual_seed(5)
    ours = CausalConv1d(6, 8, 3, dilation=2, groups=2, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = Draw()(2, 6, 11)
    torch.testing.assert_close(ours(x), theirs(F.pad(x, (4, 0))))


def test_arguments_of_forward_reach_the_operator():
    draw = Draw()
    layer, x = CausalConv1d(4, 4, 3, dilation=2, activation="silu"), draw(2, 4, 9)
    residual, state, lengths = draw(2, 4, 9), draw(2, 4, 4), torch.tensor([9, 2])
    ours = layer(x, residual=residual, initial_state=state, lengths=lengths, return_state=True)
    plain = s2s.causal_conv1d(
        x, layer.weight, layer.bias, dilation=2, activation="silu", residual=residual,
        initial_state=state, lengths=lengths,
        return_state=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("gate", ["glu", "gated_tanh"])
def test_gated(gate):
    layer, x = GatedCausalConv1d(3, 5, 2, 4, gate), Draw()(2, 3, 9)
    a, b = F.conv1d(F.pad(x, (4, 0)), layer.weight, layer.bias, dilation=4).chunk(2, 1)
    torch.testing.assert_close(layer(x), (a if gate == "glu" else a.tanh()) * b.sigmoid())
    with pytest.raises(ValueError, match="gate"):
        GatedCausalConv1d(3, 5, 2, gate="relu")


def test_layer_steps():
    layer, x = GatedCausalConv1d(3, 5, 3, 2), Draw()(2, 3, 9)
    state = layer.initial_state(2)
    with torch.no_grad():
        steps = torch.stack([layer.step(x[:, :, t], state) for t in range(9)], 2)
        torch.testing.assert_close(steps, layer(x))


def wavenet_by_torch(stack, x, condition=None):
    """The stack's equations in torch's own operations."""
    skip = 0
    for index, (conv, out) in enumerate(zip(stack.conv, stack.out, strict=True)):
        span = (stack.kernel_size - 1) * stack.dilations[index]
        u = F.conv1d(F.pad(x, (span, 0)), conv.weight, conv.bias, dilation=stack.dilations[index])
        if condition is not None:
            u = u + condition[:, index * 2 * stack.channels : (index + 1) * 2 * stack.channels]
        a, b = u.chunk(2, 1)
        both = F.conv1d(a.tanh() * b.sigmoid(), out.weight, out.bias)
        x, skip = x + both[:, : stack.channels], skip + both[:, stack.channels :]
    return skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("condition_time", [None, 1, 12])
def test_wavenet_equals_torch(backend, condition_time):
    draw = Draw(torch.float64)
    stack = WaveNetStack(6, 5, (1, 2, 4), kernel_size=3, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in stack.named_parameters() if ".1." in name} == {
        "conv.1.weight": (12, 6, 3), "conv.1.bias": (12,), "out.1.weight": (11, 6, 1), "out.1.bias": (11,),
    }  # fmt: skip
    x = draw(2, 6, 12).requires_grad_()
    condition = None if condition_time is None else draw(2, 36, condition_time).requires_grad_()
    leaves = [t for t in (x, condition, *stack.parameters()) if t is not None]
    expected = wavenet_by_torch(stack, x, condition)
    wanted = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    with s2s.use_backend(backend):
        ours = stack(x, condition)
        grads = torch.autograd.grad(ours.square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [(64, 128, (1, 2, 4, 8), 2), (20, 37, (1, 2), 3), (8, 40, (3,), 4), (7, 5, (3, 1), 3), (1, 0, (2,), 1)],
    ids=str,
)
def test_wavenet_steps_equal_forward(backend, dtype, batch, sizes):
    draw = Draw(dtype)
    channels, skips, dilations, taps = sizes
    stack = WaveNetStack(channels, skips, dilations, taps, dtype=dtype)
    x, conditions = draw(batch, channels, 20), (None, draw(batch, len(dilations) * 2 * channels, 20))
    for condition in conditions:
        with torch.no_grad(), s2s.use_backend(backend):
            whole = stack(x, condition)
            for prepared in (False, True) if backend == "cpu" else (False,):
                state, steps = stack.initial_state(batch, prepared=prepared), []
                for t in range(20):
                    skip, after = stack.step(x[:, :, t], state, None if condition is None else condition[:, :, t])
                    assert after is state
                    steps.append(skip)
                if backend == "cpu":
                    assert torch.equal(torch.stack(steps, 2), whole)
                torch.testing.assert_close(torch.stack(steps, 2), whole)


def test_wavenet_beams():
    draw = Draw()
    stack, x, index = WaveNetStack(4, 3, (1, 2, 4)), draw(2, 4, 14), torch.tensor([1, 1, 0])
    state = stack.initial_state(2)
    with torch.no_grad():
        for t in range(9):
            stack.step(x[:, :, t], state)
        other = state.reorder(index)
        for t in range(9, 14):
            skip, _ = stack.step(x[index, :, t], other)
        torch.testing.assert_close(skip, stack(x[index])[:, :, -1])
        assert state.ordered()[2].equal(state.reorder(torch.arange(2)).ordered()[2])


def test_wavenet_steps_carry_gradients():
    stack = WaveNetStack(4, 3, (1, 2))
    inputs = Draw()(2, 4, 6).requires_grad_()
    state, steps = stack.initial_state(2), []
    for t in range(6):
        skip, state = stack.step(inputs[:, :, t], state)
        steps.append(skip)
    ours = torch.autograd.grad(torch.stack(steps, 2).square().sum(), inputs)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(stack(inputs).square().sum(), inputs)[0])


@pytest.mark.parametrize("prepared", [False, pytest.param(True, marks=needs_extension)])
def test_steps_carry_tangents_of_weights(prepared):
    """Row 43; a prepared state would drop them."""
    stack, x = WaveNetStack(4, 3, (1, 2)).requires_grad_(False), Draw()(2, 4)
    state, tangent = stack.initial_state(2, prepared=prepared), Draw()(7)
    with forward_ad.dual_level():
        stack.out[1]._parameters["bias"] = forward_ad.make_dual(stack.out[1].bias, tangent)
        if prepared:
            with pytest.raises(NotImplementedError, match=r"prepared.*transform"):
                stack.step(x, state)
        else:
            ours = forward_ad.unpack_dual(stack.step(x, state)[0]).tangent
            torch.testing.assert_close(ours, tangent[4:].expand(2, 3))


def test_wavenet_step_with_normalised_weights():
    """Row 41: a parametrised weight is no plain parameter of its layer."""
    stack = WaveNetStack(4, 3, (1, 2))
    nn.utils.parametrizations.weight_norm(stack.conv[1])
    with torch.no_grad():
        stack.conv[1].parametrizations.weight.original0.mul_(2.0)
        x, state = Draw()(2, 4, 5), stack.initial_state(2)
        for t in range(5):
            skip, _ = stack.step(x[:, :, t], state)
        torch.testing.assert_close(skip, stack(x)[:, :, -1])


def test_wavenet_step_with_weights_of_other_strides():
    stack, x = WaveNetStack(4, 3, (1, 2)), Draw()(1, 4, 3)
    with torch.no_grad():
        whole = stack(x)
        for weight in stack.parameters():
            weight.data = weight.data.mT.contiguous().mT if weight.dim() == 3 else weight.data
        assert not stack.conv[0].weight.is_contiguous()
        state = stack.initial_state(1)
        steps = [stack.step(x[:, :, t], state)[0] for t in range(3)]
        torch.testing.assert_close(torch.stack(steps, 2), whole)


STACKS = {"wavenet": lambda: WaveNetStack(4, 3, (1, 2)), "tcn": lambda: TCNStack(4, (4, 3))}


@pytest.mark.parametrize("stack", [pytest.param(make, id=name) for name, make in STACKS.items()])
def test_steps_read_the_weights_as_they_are(stack):
    """Whatever wrote them: nothing made of them outlives a step."""
    stack, x = stack(), Draw()(2, 4, 6)
    state = stack.initial_state(2)
    with torch.no_grad():
        for t in range(4):
            stack.step(x[:, :, t], state)
        twin = copy.deepcopy(state)
        other = copy.deepcopy(stack)
        for module in (stack, other):
            for value in module.parameters():
                value.data.mul_(2.0)
        assert torch.equal(stack.step(x[:, :, 4], state)[0], other.step(x[:, :, 4], twin)[0])
        for value in stack.parameters():
            value.zero_()
        assert stack.step(torch.zeros(2, 4), state)[0].eq(0).all()


@needs_extension
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("stack", [pytest.param(make, id=name) for name, make in STACKS.items()])
def test_prepared_states_hold_the_weights(stack, normalised):
    """Those of when they were made, in copies and for other beams too."""
    stack, x, index = stack(), Draw()(2, 4, 9), torch.tensor([1, 0, 1])
    if normalised:
        nn.utils.parametrizations.weight_norm(
            stack.conv[1] if isinstance(stack, WaveNetStack) else stack.blocks[0].conv2
        )
    state = stack.initial_state(2, prepared=True)
    with torch.no_grad():
        whole = stack(x)
        for value in stack.parameters():
            value.add_(1.0)
        steps = [stack.step(x[:, :, t], state)[0] for t in range(8)]
        assert torch.equal(torch.stack(steps, 2), whole[:, :, :8])
        beams = state.reorder(index)
        assert beams.packed is state.packed
        assert torch.equal(stack.step(x[index, :, 8], beams)[0], whole[index, :, 8])
        for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state):
            assert torch.equal(stack.step(x[:, :, 8], twin)[0], whole[:, :, 8])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", [pytest.param(make, id=name) for name, make in STACKS.items()])
def test_prepared_steps_equal_others(stack, dtype):
    stack, x = stack().to(dtype), Draw(dtype)(2, 4, 9)
    states = stack.initial_state(2), stack.initial_state(2, prepared=True)
    assert states[1].packed.dtype == dtype
    with torch.no_grad():
        for t in range(9):
            ours, theirs = (stack.step(x[:, :, t], state)[0] for state in states)
            assert torch.equal(ours, theirs)


@needs_extension
def test_prepared_steps_under_autocast():
    stack, x = WaveNetStack(4, 3, (1, 2)), Draw()(2, 4, 5)
    states = stack.initial_state(2), stack.initial_state(2, prepared=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for t in range(5):
            ours, theirs = (stack.step(x[:, :, t], state)[0] for state in states)
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@needs_extension
def test_prepared_states_are_refused():
    """Wherever the reference would serve, and by a stack of other sizes."""
    stack, x = WaveNetStack(4, 3, (1, 2)), Draw()(2, 4, 2)
    state = stack.initial_state(2, prepared=True)
    before = copy.deepcopy(state.ring)
    with pytest.raises(NotImplementedError, match=r"prepared.*gradient"):
        stack.step(x[:, :, 0], state)
    stack.requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"prepared.*gradient"):
        stack.step(x[:, :, 0].requires_grad_(), state)
    with pytest.raises(NotImplementedError, match=r"prepared.*transform"):
        torch.func.vmap(lambda frame: stack.step(frame, state)[0])(x[None, :, :, 0])
    with s2s.use_backend("reference"):
        with pytest.raises(NotImplementedError, match=r"prepared.*forced"):
            stack.step(x[:, :, 0], state)
        with pytest.raises(NotImplementedError, match=r"prepared.*forced"):
            stack.initial_state(2, prepared=True)
    with pytest.raises(ValueError, match="packed weights"):
        WaveNetStack(4, 20, (1, 2)).requires_grad_(False).step(x[:, :, 0], state)
    with pytest.raises(TypeError, match="x_t"):
        stack.step(x[:, :, 0].double(), state)
    assert torch.equal(state.ring, before) and state.position == 0
    stack.step(x[:, :, 0], state)
    assert state.position == 1
    for other in (WaveNetStack(4, 3, (1, 2), device="meta"), TCNStack(4, (3,), device="meta")):
        with pytest.raises(NotImplementedError, match=r"prepared.*meta"):
            other.initial_state(2, prepared=True)


def test_nothing_is_prepared_without_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "extension_missing", "no extension")
    with pytest.raises(NotImplementedError, match=r"prepared.*no extension"):
        TCNStack(4, (3,)).initial_state(2, prepared=True)


def test_wavenet_errors():
    stack = WaveNetStack(4, 3, (1, 2))
    state = stack.initial_state(2)
    with pytest.raises(ValueError, match="x_t"):
        stack.step(torch.zeros(2, 5), state)
    with pytest.raises(ValueError, match="state"):
        stack.step(torch.zeros(3, 4), state)
    with pytest.raises(TypeError, match="state"):
        stack.step(torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match="condition"):
        stack(torch.zeros(2, 4, 3), torch.zeros(2, 16, 2))
    with pytest.raises(ValueError, match="dilations"):
        WaveNetStack(4, 3, ())


def tcn_by_torch(stack, x):
    """The stack's equations in torch's own operations."""
    for block, dilation in zip(stack.blocks, stack.dilations, strict=True):

        def causal(x, layer, d):
            span = (layer.kernel_size - 1) * d
            return F.conv1d(F.pad(x, (span, 0)), layer.weight, layer.bias, dilation=d)

        skip = x if isinstance(block.match, nn.Identity) else causal(x, block.match, 1)
        hidden = causal(x, block.conv1, dilation).relu()
        x = (skip + causal(hidden, block.conv2, dilation).relu()).relu()
    return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_tcn_equals_torch(backend):
    draw = Draw(torch.float64)
    stack = TCNStack(3, [6, 6, 4], kernel_size=3, dtype=torch.float64)
    assert stack.dilations == (1, 2, 4)
    assert {name: tuple(p.shape) for name, p in stack.named_parameters() if ".0." in name} == {
        "blocks.0.conv1.weight": (6, 3, 3), "blocks.0.conv1.bias": (6,), "blocks.0.conv2.weight": (6, 6, 3),
        "blocks.0.conv2.bias": (6,), "blocks.0.match.weight": (6, 3, 1), "blocks.0.match.bias": (6,),
    }  # fmt: skip
    x = draw(2, 3, 15).requires_grad_()
    leaves = [x, *stack.parameters()]
    expected = tcn_by_torch(stack, x)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    with s2s.use_backend(backend):
        ours = stack(x)
        grads = torch.autograd.grad(ours.square().sum(), leaves)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_tcn_drops_out_in_training_alone():
    torch.manual_seed(0)
    stack, x = TCNStack(4, [4, 4], dropout=0.5), Draw()(2, 4, 40)
    assert not torch.equal(stack(x), stack(x))
    with pytest.raises(ValueError, match="dropout"):
        stack.step(x[:, :, 0], stack.initial_state(2))
    torch.testing.assert_close(stack.eval()(x), tcn_by_torch(stack, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", [(32, (32, 40), 3), (12, (25, 25, 12), 7), (1, (1, 2), 2), (5, (3,), 1)], ids=str)
def test_tcn_steps_equal_forward(backend, dtype, batch, sizes):
    draw = Draw(dtype)
    inputs, channels, taps = sizes
    stack, x = TCNStack(inputs, channels, taps, dtype=dtype), draw(batch, inputs, 20)
    with torch.no_grad(), s2s.use_backend(backend):
        whole = stack(x)
        for prepared in (False, True) if backend == "cpu" else (False,):
            state = stack.initial_state(batch, prepared=prepared)
            steps = torch.stack([stack.step(x[:, :, t], state)[0] for t in range(20)], 2)
            if backend == "cpu" and dtype != torch.bfloat16:
                assert torch.equal(steps, whole)
            torch.testing.assert_close(steps, whole)


def test_tcn_beams():
    draw = Draw()
    stack, x, index = TCNStack(4, (4, 6)), draw(2, 4, 14), torch.tensor([1, 1, 0])
    state = stack.initial_state(2)
    with torch.no_grad():
        for t in range(9):
            stack.step(x[:, :, t], state)
        other = state.reorder(index)
        for t in range(9, 14):
            y, _ = stack.step(x[index, :, t], other)
        torch.testing.assert_close(y, stack(x[index])[:, :, -1])
        assert all(a.equal(b) for a, b in zip(state.ordered(), state.reorder(torch.arange(2)).ordered(), strict=True))


def test_tcn_steps_carry_gradients_and_take_normalised_weights():
    stack = TCNStack(4, (4, 3))
    nn.utils.parametrizations.weight_norm(stack.blocks[0].conv2)
    inputs = Draw()(2, 4, 6).requires_grad_()
    state, steps = stack.initial_state(2), []
    for t in range(6):
        y, state = stack.step(inputs[:, :, t], state)
        steps.append(y)
    ours = torch.autograd.grad(torch.stack(steps, 2).square().sum(), inputs)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(stack(inputs).square().sum(), inputs)[0])
    with torch.no_grad():
        state = stack.initial_state(2)
        ours = torch.stack([stack.step(inputs[:, :, t], state)[0] for t in range(6)], 2)
        torch.testing.assert_close(ours, stack(inputs))


def test_tcn_errors():
    stack = TCNStack(4, (3,))
    state = stack.initial_state(2)
    with pytest.raises(ValueError, match="x_t"):
        stack.step(torch.zeros(2, 5), state)
    with pytest.raises(ValueError, match="state"):
        stack.step(torch.zeros(3, 4), state)
    with pytest.raises(ValueError, match="dilations"):
        TCNStack(4, (3, 3), dilations=(1,))


def test_stacks_are_copied_and_cast(tmp_path):
    """Row 32."""
    for stack, sample in ((TCNStack(4, (4, 3)), Draw()(2, 4, 6)), (WaveNetStack(4, 3, (1, 2)), Draw()(2, 4, 6))):
        expected = stack(sample)
        torch.save(stack, tmp_path / "stack.pt")
        for other in (copy.deepcopy(stack), torch.load(tmp_path / "stack.pt", weights_only=False)):
            other.load_state_dict(stack.state_dict(), strict=True)
            assert torch.equal(other(sample), expected)
            state = copy.deepcopy(other.initial_state(2))
            with torch.no_grad():
                steps = [other.step(sample[:, :, t], state)[0] for t in range(6)]
            torch.testing.assert_close(torch.stack(steps, 2), expected)
        assert stack.half().step(sample[:, :, 0].half(), stack.initial_state(2))[0].dtype == torch.float16
        assert stack.to("meta")(sample.half().to("meta")).shape == expected.shape
