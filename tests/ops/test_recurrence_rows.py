"""lstm, gru and rnn over many rows and positions: the ways that large batches, threads and packed sequences take."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurring import both_backends, broken, every_cell, needs_extension, sample

from s2s_kernels import use_backend
from s2s_kernels.testing import leaves_of, noise_like, prepare

ROOT = Path(__file__).parents[2]


@every_cell
@pytest.mark.parametrize("batch, time", [(18, 6), (40, 30)])
def test_many_rows_with_every_option(cell, batch, time):
    """Large enough for the products of large batches, some steps with few rows left."""
    lengths = [time - 3 * i % (time + 1) for i in range(batch)]
    options = {"lengths": lengths, "reset": 0.1, "state": True, "recurrent_mask": True, "zoneout": 0.2}
    if cell == "lstm":
        options["projected"] = 33
    function, arguments = sample(cell, batch, time, 41, 50, **options)
    for reverse in (False, True):
        assert not broken(functools.partial(function, reverse=reverse, training=True), arguments)


@every_cell
@needs_extension
@pytest.mark.parametrize("batch", [7, 35])
def test_same_bits_on_any_number_of_threads_where_threads_are_used(cell, batch):
    options = {
        "lengths": (9, 24, 1, 24, 13, 0, 24) * (batch // 7),
        "reset": 0.1,
        "recurrent_mask": True,
        "layer_norm": cell != "rnn_relu",
    }
    function, arguments = sample(cell, batch, 24, 48, 64, state=True, **options)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            prepared = prepare(arguments)
            output = function(*prepared[0], **prepared[1], zoneout=0.1, training=True, weight_dropout=0.1)[0]
            runs.append(
                [output, *torch.autograd.grad(output, leaves_of(prepared), noise_like(output, 0), allow_unused=True)]
            )
    finally:
        torch.set_num_threads(threads)
    for run_ in runs[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(runs[0], run_, strict=True))


@pytest.mark.parametrize(
    "batch, time, hidden, lengths",
    [
        (20, 70, 50, None),
        (33, 9, 64, [9, 4, 0] * 11),
        (1, 300, 64, None),
        (1, 140, 48, None),
        (4, 70, 32, None),
        (5, 60, 32, (60, 60, 20, 60, 60)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_cell
def test_rows_long_enough_for_products_of_their_own(cell, dtype, batch, time, hidden, lengths):
    """Sequences of several chunks, whose values and weights are read where they lie if they can be."""
    function, arguments = sample(cell, batch, time, 24, hidden, dtype=dtype, lengths=lengths, state=True)
    assert not broken(function, arguments)
    assert not broken(functools.partial(function, reverse=True), arguments)


@every_cell
@pytest.mark.parametrize("batch, time", [(1, 70), (70, 1), (9, 10)])
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_positions_too_few_to_pack_weights_for(cell, batch, time, value):
    """Large weights are read where they lie, what isn't finite among them too."""
    function, (args, kwargs) = sample(cell, batch, time, 190, 193, state=True, scale=0.3)
    args[0].view(-1)[777] = value
    args[1].view(-1)[-7] = value
    with torch.no_grad():
        assert not broken(function, (args, kwargs), upstream=None)
        assert not broken(functools.partial(function, reverse=True), (args, kwargs), upstream=None)


@pytest.mark.parametrize("cell, hidden", [("lstm", 256), ("lstm", 272), ("gru", 305), ("rnn_tanh", 529)])
@pytest.mark.parametrize("batch", [1, 3, 14])
@needs_extension
def test_threads_that_share_the_units_of_few_rows(cell, hidden, batch):
    """The same bits whoever has which units, and the definition's values: to torch's tolerance, since sums of so many
    terms round by their order."""
    options = {
        "lengths": ((7, 4, 0) * 5)[:batch] if batch < 14 else (7,) * 14,
        "reset": 0.2,
        "recurrent_mask": True,
        "zoneout": 0.1,
        "training": True,
    }
    function, arguments = sample(cell, batch, 7, 5, hidden, state=True, **options)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for reverse in (False, True):
                torch.manual_seed(0)
                args, kwargs = prepared = prepare(arguments)
                output, *states = function(*args, **kwargs, reverse=reverse, weight_dropout=0.1)
                results = [output, *(state for state in states if state is not None)]
                upstream = [noise_like(result, index) for index, result in enumerate(results)]
                grads = torch.autograd.grad(results, leaves_of(prepared), upstream, allow_unused=True)
                runs.append([*results, *grads])
    finally:
        torch.set_num_threads(threads)
    for index, found in enumerate(runs[2:]):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(runs[index % 2], found, strict=True))
    with use_backend("reference"):
        torch.manual_seed(0)
        expected = function(*arguments[0], **arguments[1], weight_dropout=0.1)
    present = [value for value in expected if value is not None]
    for a, b in zip(runs[0], present, strict=False):
        torch.testing.assert_close(a, b)


SHARED_UNITS = """
import torch, s2s_kernels as s2s
runs = []
for threads in (1, 3, 5):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer, x = s2s.nn.LSTM(5, 272, batch_first=True), torch.randn(1, 7, 5, requires_grad=True)
    output = layer(x)[0]
    runs.append([output.detach(), *torch.autograd.grad(output.sum(), [x, *layer.parameters()])])
assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
"""


@needs_extension
@pytest.mark.parametrize("limit", ["1", "2", "4"])
def test_fewer_threads_come_than_were_asked_for(limit):
    """Threads that wait for each other count those that came."""
    environment = {**os.environ, "OMP_THREAD_LIMIT": limit}
    subprocess.run([sys.executable, "-c", SHARED_UNITS], check=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_positions_than_backward_takes_at_once(cell, reverse):
    function, arguments = sample(cell, 3, 160, 7, 260, lengths=(97, 160, 20), layer_norm=reverse, state=True, scale=0.5)
    assert not broken(functools.partial(function, reverse=reverse), arguments)


@pytest.mark.parametrize("cell, time, norm", [("lstm", 1024, False), ("lstm", 400, True), ("gru", 1280, False)])
def test_what_forward_keeps_and_no_cache_holds(cell, time, norm):
    """40 MiB are written past the caches; 20 of each half of the batch are not, and give the same bits."""
    function, arguments = sample(cell, 4, time, 5, 512, layer_norm=norm, scale=0.02)
    (x, *parameters), kwargs = prepare(arguments)
    upstream = torch.randn(4, time, 512)

    def results(rows):
        output = function(x[rows], *parameters, **kwargs)[0]
        return [output, torch.autograd.grad(output, x, upstream[rows])[0][rows]]  # it takes all that was kept

    whole = results(slice(4))
    for rows in (slice(2), slice(2, 4)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, results(rows), strict=True))


@pytest.mark.parametrize("heads, dtype", [(1, torch.float32), (2, torch.float32), (2, torch.float16)], ids=str)
@every_cell
@both_backends
def test_packed_sequences_are_their_present_positions(cell, backend, heads, dtype):
    """The data of a PackedSequence give what the padded sequence gives at its present positions, to the bit."""
    lengths, hidden = torch.tensor([6, 4, 4, 1]), 5 if heads == 1 else 6
    function, (args, kwargs) = sample(
        cell, 4, 6, 3, hidden, heads=heads, state=True, lengths=lengths.tolist(), dtype=dtype
    )  # fmt: skip
    where = torch.arange(6).unsqueeze(1) < lengths  # (T, B)
    x, *others = args
    for options in ({}, {"reverse": True}, {"zoneout": 0.3, "training": True}):
        with use_backend(backend):
            padded, data = x.clone().requires_grad_(), x.transpose(0, 1)[where].requires_grad_()
            torch.manual_seed(1)
            whole, *states = function(padded, *others, **kwargs, **options)
            torch.manual_seed(1)
            packed, *same = function(data, *others, **kwargs, **options, packed=True)
            assert torch.equal(packed, whole.transpose(0, 1)[where])
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(states, same, strict=True))
            upstream = noise_like(packed, 0)
            (grad,) = torch.autograd.grad(packed, data, upstream)
            (expected,) = torch.autograd.grad(whole.transpose(0, 1)[where], padded, upstream)
            torch.testing.assert_close(grad, expected.transpose(0, 1)[where])


@needs_extension
def test_packed_operators_and_steps_pass_opcheck():
    _, (args, kwargs) = sample("lstm", 3, 4, 3, 5, state=True, lengths=(4, 2, 1))
    x, weight_ih, weight_hh, bias_ih, bias_hh = args
    data, rest = x.reshape(-1, 3)[:7], (None,) * 6
    tensors = (weight_ih, weight_hh, bias_ih, bias_hh, kwargs["h0"], kwargs["c0"])
    options = (0, False, 0.0, 0.0, False, 0.0, True, False)
    torch.library.opcheck(
        torch.ops.s2s.recurrence_forward.default, (data, *tensors, *rest, kwargs["lengths"], None, None, *options, 2)
    )
    torch.library.opcheck(torch.ops.s2s.recurrence_step.default, (x[:, 0], *tensors, 0))


@needs_extension
def test_packed_input_is_checked_again():
    function, (args, kwargs) = sample("gru", 2, 3, 3, 5)
    x = args[0].reshape(-1, 3)
    for lengths, message in (((2, 3), "descending"), ((3, 2), "as many rows")):
        with pytest.raises(RuntimeError, match=message):
            function(x, *args[1:], **kwargs, lengths=torch.tensor(lengths), packed=True)
