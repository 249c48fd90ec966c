"""patch and unpatch: what is swapped, what is left and why, and that the model stays the same one."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import s2s_kernels as s2s
from s2s_kernels.nn.patch import SWAPS
from s2s_kernels.testing import outputs_of

NAMES = ["encoder", "decoder.cell", "decoder.skip", "decoder.state", "head.0", "head.1"]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(12, 12)
        self.skip = nn.GRUCell(12, 12)
        self.state = nn.RNNCell(12, 12, nonlinearity="relu")

    def forward(self, memory):
        state = (memory[:, -1], memory[:, -1].tanh())
        steps = []
        for t in range(memory.shape[1]):
            state = self.cell(memory[:, t], state)
            steps.append(self.state(self.skip(memory[:, t], state[0])))
        return torch.stack(steps, 1)


class Translator(nn.Module):
    """As a model that knows nothing of this package would be written."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.decoder = Decoder()
        self.head = nn.ModuleList([nn.GRU(12, 5, batch_first=True), nn.RNN(5, 4, nonlinearity="relu")])
        self.shared = self.head[0]
        self.out = nn.Linear(4, 11)

    def forward(self, tokens):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), torch.tensor([5, 3]), batch_first=True)
        memory = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)[0]
        hidden = self.head[0](self.decoder(memory))[0]
        return self.out(self.head[1](hidden.transpose(0, 1))[0])


@pytest.fixture
def model():
    return Translator().eval()


TOKENS = torch.arange(10).view(2, 5)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_numbers_and_report(model):
    expected = model(TOKENS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = s2s.patch(model)
    assert [s.name for s in report.swapped] == NAMES
    assert next((s.before, s.after) for s in report.swapped) == (nn.LSTM, s2s.nn.LSTM)
    assert report.left == report.bypassed == () and not report.dry_run
    torch.testing.assert_close(model(TOKENS), expected)
    assert str(report).splitlines()[:2] == [
        "6 modules swapped, 0 left",
        "  swapped encoder: torch.nn.LSTM -> s2s_kernels.nn.LSTM",
    ]
    assert "Swapped(name='encoder'" in repr(report)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert s2s.unpatch(model) == tuple(NAMES)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)


def test_objects_stay_the_same(model):
    modules, parameters = list(model.modules()), list(model.parameters())
    calls = []
    model.encoder.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    model.head[0].register_full_backward_hook(lambda module, *gradients: calls.append("backward"))
    model.encoder.register_buffer("extra", torch.ones(2))
    model.encoder.note = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    s2s.patch(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.shared is model.head[0] and type(model.shared) is s2s.nn.GRU
    assert model.encoder.note == "kept" and model.encoder.extra.sum() == 2
    before = model.encoder.weight_hh_l1.detach().clone()
    model(TOKENS).square().sum().backward()
    assert calls == [s2s.nn.LSTM, "backward"]
    optimizer.step()
    assert not torch.equal(model.encoder.weight_hh_l1, before)
    after = model(TOKENS)
    s2s.unpatch(model)
    torch.testing.assert_close(model(TOKENS), after)
    assert calls[2:] == [s2s.nn.LSTM, nn.LSTM] and kinds(model) == kinds(Translator())
    assert model.encoder._flat_weights[0] is model.encoder.weight_ih_l0 and "_patched_from" not in vars(model.encoder)


def test_gradients_of_a_patched_model(model):
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters())))
        s2s.patch(model)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("before", SWAPS, ids=lambda kind: kind.__name__)
def test_a_root_module(before):
    attention, cell = before is nn.MultiheadAttention, before.__name__.endswith("Cell")
    layer = (before(6, 2) if attention else before(6, 7)).eval()
    x = torch.randn(3, 6) if cell else torch.randn(5, 3, 6)
    inputs = (x, x, x) if attention else (x,)
    expected, text = layer(*inputs), repr(layer)
    report = s2s.patch(layer)
    assert type(layer) is SWAPS[before] and repr(layer) == text
    assert "the model itself" in str(report) and report.swapped[0].name == ""
    torch.testing.assert_close(layer(*inputs), expected)
    assert not isinstance(layer, before)
    assert s2s.unpatch(layer) == ("",)
    torch.testing.assert_close(layer(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("add", [False, True], ids=["plain", "with bias_kv, kdim and vdim"])
def test_state_of_a_patched_attention(add):
    options = {"add_bias_kv": True, "kdim": 4, "vdim": 5} if add else {"bias": False}
    layer = nn.MultiheadAttention(6, 2, batch_first=True, **options)
    inputs = torch.randn(3, 5, 6), torch.randn(3, 7, layer.kdim), torch.randn(3, 7, layer.vdim)
    expected, state = layer(*inputs), {name: value.clone() for name, value in layer.state_dict().items()}
    assert len(s2s.patch(layer).swapped) == 1
    torch.testing.assert_close(layer(*inputs), expected)
    assert list(layer.state_dict()) == list(state)
    s2s.nn.MultiheadAttention(6, 2, batch_first=True, **options).load_state_dict(state, strict=True)


def test_transformer(monkeypatch):
    model = nn.Transformer(8, 2, 2, 1, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(3, 6, 8), torch.randn(3, 5, 8)
    padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def run():
        return model(source, target, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)

    def called():
        """What a hook would tell; but torch's fast path is off where there are hooks."""
        names, forward = [], s2s.nn.MultiheadAttention.forward
        known = {id(module): name for name, module in model.named_modules()}

        def spied(self, *args, **kwargs):
            names.append(known[id(self)])
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(s2s.nn.MultiheadAttention, "forward", spied)
        output = run()
        monkeypatch.undo()
        return output, names

    expected = run()
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    report = s2s.patch(model)
    encoder, decoder = (
        [f"encoder.layers.{i}.self_attn" for i in range(2)],
        ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"],
    )
    assert [s.name for s in report.swapped] == encoder + decoder
    assert [entry.name for entry in report.bypassed] == ["encoder.layers.0", "encoder.layers.1"]
    assert "in evaluation without gradients its fast path never calls its self_attn" in str(report)
    output, names = called()
    torch.testing.assert_close(output, expected)
    assert names == encoder + decoder
    for a, b in zip(torch.autograd.grad(output.square().sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    with torch.no_grad():
        output, names = called()
    torch.testing.assert_close(output, expected)
    assert names == decoder  # what the report says: the encoder's attention is bypassed
    hooked = []
    hook = model.encoder.layers[1].self_attn.register_forward_hook(lambda *call: hooked.append(call))
    with torch.no_grad():  # a hook turns the fast path off, and the layer hands its attention a nested tensor
        torch.testing.assert_close(run(), expected)
    assert len(hooked) == 1 and hooked[0][1][0].is_nested
    hook.remove()
    assert s2s.patch(model).bypassed == report.bypassed
    s2s.unpatch(model)
    assert s2s.patch(model, only=nn.LSTM).bypassed == ()
    torch.testing.assert_close(run(), expected)


def test_converted_while_patched(model):
    """torch's own list of references to the weights must not go stale."""
    s2s.patch(model)
    model.double()
    model.encoder.weight_ih_l0 = nn.Parameter(torch.zeros_like(model.encoder.weight_ih_l0))
    expected = model.encoder(torch.ones(2, 3, 8).double())[0]
    s2s.unpatch(model)
    torch.testing.assert_close(model.encoder(torch.ones(2, 3, 8).double())[0], expected)
    assert pickle.loads(pickle.dumps(model)).encoder.weight_ih_l0.eq(0).all()


def test_context_manager(model):
    plain, expected = kinds(model), model(TOKENS)
    with s2s.patch(model) as report:
        assert len(report.swapped) == 6 and type(model.encoder) is s2s.nn.LSTM
        torch.testing.assert_close(model(TOKENS), expected)
    assert kinds(model) == plain
    with pytest.raises(KeyError), s2s.patch(model):
        raise KeyError
    assert kinds(model) == plain


def test_nested_and_double_patches(model):
    plain = kinds(model)
    with s2s.patch(model.decoder) as outer:
        with s2s.patch(model) as inner:
            assert len(outer.swapped) == 3 and [s.name for s in inner.swapped] == ["encoder", "head.0", "head.1"]
            assert [entry.name for entry in inner.left] == NAMES[1:4]
            assert all("already" in entry.reason for entry in inner.left)
        assert type(model.encoder) is nn.LSTM and type(model.decoder.cell) is s2s.nn.LSTMCell
        s2s.unpatch(model)  # leaving the context after this does nothing
    assert kinds(model) == plain
    assert s2s.unpatch(model) == ()


def test_dry_run(model):
    plain = kinds(model)
    with s2s.patch(model, dry_run=True) as report:
        assert report.dry_run and [s.name for s in report.swapped] == NAMES
        assert "6 modules would be swapped" in str(report)
        assert kinds(model) == plain
    assert kinds(model) == plain
    s2s.patch(model)
    with s2s.patch(model, dry_run=True):
        pass
    assert type(model.encoder) is s2s.nn.LSTM


@pytest.mark.parametrize("only, names", [
    ("encoder", ["encoder"]),
    ("decoder", NAMES[1:4]),
    ("", NAMES),
    ("shared", ["head.0"]),
    (["head.1", "decoder.skip"], ["decoder.skip", "head.1"]),
    (nn.LSTM, ["encoder"]),
    ((nn.RNN, nn.GRUCell, "encoder"), ["encoder", "decoder.skip", "head.1"]),
    (nn.RNNBase, ["encoder", "head.0", "head.1"]),
    (nn.Module, NAMES),
    (lambda module: module.bidirectional if isinstance(module, nn.LSTM) else False, ["encoder"]),
    (lambda name, module: name.endswith(("cell", "0")), ["decoder.cell", "head.0"]),
    ([], []),
])  # fmt: skip
def test_only(model, only, names):
    report = s2s.patch(model, only=only)
    assert [s.name for s in report.swapped] == names
    assert {name for name, kind in kinds(model).items() if kind in SWAPS.values()} == set(names)
    assert [entry.name for entry in report.left] == [name for name in NAMES if name not in names]
    assert all("only" in entry.reason for entry in report.left)


def test_errors(model):
    for call in (s2s.patch, s2s.unpatch):
        with pytest.raises(TypeError, match="model"):
            call(model.parameters())
    with pytest.raises(ValueError, match=r"only.*'enc'"):
        s2s.patch(model, only="enc")
    with pytest.raises(ValueError, match=r"only.*Linear"):
        s2s.patch(model, only=nn.Linear)
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match="only"):
            s2s.patch(model, only=wrong)
    assert kinds(model) == kinds(Translator())


class Subclass(nn.LSTM):
    pass


class OwnBase(nn.RNNBase):
    pass


class OwnParameter(nn.Parameter):
    pass


def weight_normed():
    layer = nn.GRU(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, "weight_hh_l0")


def pruned():
    layer = nn.RNNCell(4, 6)
    prune.l1_unstructured(layer, "weight_ih", amount=0.5)
    return layer


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 6)), {nn.LSTM}, dtype=torch.qint8)[0]


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.LSTMCell(4, 6))


def of_a_parameter_subclass():
    layer = nn.GRUCell(4, 6)
    layer.weight_hh = OwnParameter(layer.weight_hh.detach())
    return layer


def with_another_forward():
    layer = nn.LSTM(4, 6)
    forward = layer.forward
    layer.forward = lambda *args: forward(*args)
    return layer


def with_a_parametrised_projection():
    layer = nn.MultiheadAttention(4, 2)
    weight_norm(layer.out_proj)
    return layer


LEFT = {
    "projection parametrised": (with_a_parametrised_projection, "out_proj.weight is no plain Parameter"),
    "subclass": (lambda: Subclass(4, 6), "subclass of torch.nn.LSTM"),
    "subclass of the base": (lambda: OwnBase("GRU", 4, 6), "subclass of torch.nn.RNNBase"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0"),
        "weight_hh_l0 is param",
    ),
    "weight-normed": (weight_normed, "weight_hh_l0 is no plain Parameter"),
    "pruned": (pruned, "weight_ih is no plain Parameter"),
    "parameter subclass": (of_a_parameter_subclass, "weight_hh is no plain Parameter"),
    "quantised": (quantised, "quantised"),
    "scripted": (scripted, "scripted"),
    "forward replaced": (with_another_forward, "forward was replaced"),
    "ours": (lambda: s2s.nn.LSTM(4, 6), "s2s_kernels.nn.LSTM already"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name):
    build, reason = LEFT[name]
    odd = build()
    kind = type(odd)
    model = nn.ModuleDict({"odd": odd, "plain": nn.GRU(4, 6)})
    x = torch.randn(5, 3, 4) if name == "quantised" else torch.randn(5, 4)
    inputs = (x, x, x) if isinstance(odd, nn.MultiheadAttention) else (x,)
    runs = kind is not OwnBase
    expected = odd(*inputs) if runs else None
    report = s2s.patch(model)
    assert [s.name for s in report.swapped] == ["plain"]
    assert [(entry.name, entry.type) for entry in report.left] == [("odd", kind)]
    assert reason in report.left[0].reason and reason in str(report) and "left odd" in str(report)
    assert type(odd) is kind
    if runs:
        for a, b in zip(outputs_of(odd(*inputs)), outputs_of(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert s2s.unpatch(model) == ("plain",) and type(odd) is kind


def test_ours_by_construction_stay_ours():
    model = nn.Sequential(s2s.nn.LSTM(4, 6), nn.LSTM(6, 6))
    s2s.patch(model)
    assert s2s.unpatch(model) == ("1",)
    assert [type(m) for m in model] == [s2s.nn.LSTM, nn.LSTM]


def test_copies_of_a_patched_model(model):
    s2s.patch(model)
    expected = model(TOKENS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert kinds(other) == kinds(model)
        torch.testing.assert_close(other(TOKENS), expected, rtol=0, atol=0)
        assert s2s.unpatch(other) == tuple(NAMES)
        torch.testing.assert_close(other(TOKENS), expected)
        assert copy.deepcopy(other).encoder.weight_ih_l0 is not other.encoder.weight_ih_l0
    assert type(model.encoder) is s2s.nn.LSTM


def test_state_dicts_load_both_ways(model):
    patched = copy.deepcopy(model)
    s2s.patch(patched)
    other = Translator()
    other.load_state_dict(patched.state_dict(), strict=True)
    patched.load_state_dict(Translator().state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_a_patched_model_compiles_and_scripts_after_unpatch():
    model = nn.Sequential(nn.LSTM(4, 6, batch_first=True)).eval()
    x = torch.randn(2, 5, 4)
    expected = model(x)
    s2s.patch(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x)[0], expected[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="unpatch"):
            torch.jit.script(model)
        s2s.unpatch(model)
        torch.testing.assert_close(torch.jit.script(model)(x)[0], expected[0])


def test_parametrised_while_patched(model):
    s2s.patch(model)
    weight_norm(model.encoder, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"encoder is .*parametrization"):
        s2s.unpatch(model)
    assert type(model.head[0]) is s2s.nn.GRU
    remove_parametrizations(model.encoder, "weight_hh_l0")
    assert s2s.unpatch(model) == tuple(NAMES)


def test_options_can_be_set_on_a_patched_layer():
    layer = nn.LSTM(4, 6)
    s2s.patch(layer)
    layer.zoneout = 0.5
    x = torch.randn(5, 3, 4)
    torch.manual_seed(0)
    first = layer(x)[0]
    assert not torch.equal(first, layer.eval()(x)[0])
    assert repr(layer) == "LSTM(4, 6, zoneout=0.5)"
