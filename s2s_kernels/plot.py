"""Pictures of what a model attends to. Needs matplotlib: pip install s2s_kernels[plot]."""

from collections.abc import Sequence
from typing import Any

import torch

from . import checks

__all__ = ["attention_map"]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "s2s_kernels.plot needs matplotlib, which is not installed: pip install s2s_kernels[plot]"
        ) from error
    return plt


def attention_map(
    weights: torch.Tensor,
    source: Sequence[str] | None = None,
    target: Sequence[str] | None = None,
    *,
    title: str | None = None,
    axes: Any = None,
) -> Any:
    """Draws attention weights as Bahdanau et al. 2014, figure 3: the source runs to the right, the target down.

    Args:
        weights: (T, S), of one sequence and one head, not empty; any dtype, any device.
        source: S labels of the keys; their positions if None.
        target: T labels of the queries; their positions if None.
        title: above the picture.
        axes: matplotlib's axes to draw into; those of a new figure if None.

    Returns:
        the axes; `attention_map(...).figure.savefig("map.png")` writes the picture.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "attention_map"
    checks.tensor(name, "weights", weights)
    if weights.dim() != 2 or not weights.numel():
        checks.wrong_value(name, "weights", "(T, S), neither of them 0", tuple(weights.shape))
    rows, columns = weights.shape
    for label, words, size, letter in (("source", source, columns, "S"), ("target", target, rows, "T")):
        if words is not None and len(words) != size:
            checks.wrong_value(name, label, f"{letter} = {size} labels", len(words))
    plt = _pyplot()
    if axes is None:
        side = [min(max(0.3 * size + 1.2, 3.0), 16.0) for size in (columns + 1.5, rows)]
        axes = plt.figure(figsize=side, layout="constrained").add_subplot()
    values = weights.detach().to(device="cpu", dtype=torch.float32).numpy()
    # A map that is much longer than high would be a line of points if its cells were squares.
    wide = max(rows, columns) > 4 * min(rows, columns)
    image = axes.imshow(values, cmap="viridis", vmin=0.0, aspect="auto" if wide else "equal", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="weight")
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("source")
    axes.set_ylabel("target")
    for axis, words in ((axes.xaxis, source), (axes.yaxis, target)):
        if words is None:
            axis.get_major_locator().set_params(integer=True)
        else:
            axis.set_ticks(range(len(words)), labels=list(words), parse_math=False)
    if source is not None and any(len(word) > 2 for word in source):
        axes.tick_params(axis="x", labelrotation=90)
    if title is not None:
        axes.set_title(title)
    return axes
