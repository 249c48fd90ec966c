"""Attention maps: what is drawn, what is refused, and the map of a model that learns to reverse a sequence."""

import sys

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s2s_kernels as s2s
from s2s_kernels.plot import attention_map

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn(dtype):
    weights = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    axes = attention_map(weights, ["the", "black", "cat"], ["le", "chat"], title="a map")
    (image,) = axes.images
    assert torch.equal(torch.tensor(image.get_array().data), weights.detach().float())
    assert words(axes.xaxis) == ["the", "black", "cat"] and words(axes.yaxis) == ["le", "chat"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("source", "target", "a map")
    assert axes.yaxis_inverted() and image.get_clim()[0] == 0
    assert image.colorbar.ax.get_ylabel() == "weight"


def test_into_given_axes_without_labels_and_of_any_size():
    figure, axes = plt.subplots()
    assert attention_map(torch.rand(3, 4), axes=axes) is axes and axes.figure is figure
    for rows, keys in ((1, 1), (1, 200), (300, 2)):
        attention_map(torch.rand(rows, keys)).figure.canvas.draw()


@pytest.mark.parametrize(
    "argument, arguments",
    [
        ("weights", (torch.rand(2, 3, 4),)),
        ("weights", (torch.rand(0, 3),)),
        ("source", (torch.rand(2, 3), ["a", "b"])),
        ("target", (torch.rand(2, 3), None, ["a", "b", "c"])),
    ],
)
def test_refuses_by_name(argument, arguments):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        attention_map(*arguments)


def test_no_tensor_is_refused():
    with pytest.raises(TypeError, match="weights"):
        attention_map([[1.0]])


def test_names_the_extra_where_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install s2s_kernels\[plot\]"):
        attention_map(torch.rand(2, 3))


class Reverser(nn.Module):
    """Bahdanau's encoder and decoder. What is said next comes of the source's words by way of the attention alone."""

    def __init__(self, words, width):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.encoder = s2s.nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.decoder = s2s.nn.GRU(width, width, batch_first=True)
        self.attention = s2s.nn.AdditiveAttention(width, 2 * width, width)
        self.output = nn.Linear(width, words)

    def forward(self, source, said, lengths):
        words = self.embedding(source)
        keys, _ = self.encoder(words, lengths=lengths)
        states, _ = self.decoder(self.embedding(said))
        context, weights = self.attention(states, keys, words, key_lengths=lengths, return_weights=True)
        return self.output(context), weights


def batch_of(batch, words, longest):
    lengths = torch.randint(longest // 2, longest + 1, (batch,))
    source = torch.randint(1, words, (batch, longest))
    position = torch.arange(longest)
    backwards = (lengths[:, None] - 1 - position).clamp(min=0)
    target = torch.where(position < lengths[:, None], source.gather(1, backwards), 0)
    return source, F.pad(target, (1, -1)), target, lengths


def reversal_map(folder, steps=300, longest=12):
    """Trains a model, draws its map of one sequence; the weights, and the file."""
    torch.manual_seed(0)
    model = Reverser(27, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        source, said, target, lengths = batch_of(32, 27, longest)
        logits, _ = model(source, said, lengths)
        loss = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, said, target, lengths = batch_of(1, 27, longest)
    with torch.no_grad():
        logits, weights = model(source, said, lengths)
    length = int(lengths)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = [letters[word - 1] for word in source[0, :length]]
    axes = attention_map(weights[0, :length, :length], text, text[::-1], title="a sequence reversed")
    path = folder / "reversal.png"
    axes.figure.savefig(path, dpi=130)
    return loss.item(), weights[0, :length, :length], path


def test_the_map_of_a_model_that_reverses_shows_it(tmp_path):
    loss, weights, path = reversal_map(tmp_path)
    length = len(weights)
    assert loss < 0.2
    assert torch.equal(weights.argmax(1), torch.arange(length - 1, -1, -1))
    picture = plt.imread(path)
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.1
