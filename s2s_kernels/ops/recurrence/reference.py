"""The definition of the recurrences: plain PyTorch, differentiable any number of times.

LSTM: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000. GRU: Cho et al. 2014, in the form that
resets after the product. Layer normalisation: Ba et al. 2016. Zoneout: Krueger et al. 2017. Variational dropout: Gal
and Ghahramani 2016. Projection: Sak et al. 2014. Heads, as in xLSTM (Beck et al. 2024): recurrent weights that are
block diagonal, of which only the blocks are given.
"""

import torch
import torch.nn.functional as F

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
EPS = 1e-5

Optional = torch.Tensor | None


def normalised(v: torch.Tensor, weight: Optional, bias: Optional = None) -> torch.Tensor:
    """Layer normalisation over all gates jointly; no weight: none."""
    return v if weight is None else F.layer_norm(v, v.shape[-1:], weight, bias, EPS)


def zoned(new: torch.Tensor, before: torch.Tensor, p: float, update: Optional) -> torch.Tensor:
    """Each unit's new value where `update`, else the one before; no `update`: the expectation over it."""
    if update is not None:
        return torch.where(update, new, before)
    return new if p == 0 else p * before + (1 - p) * new


def whole_shape(weight_hh: torch.Tensor) -> tuple[int, int]:
    """(G H, P) of recurrent weights, those of heads (heads, G H / heads, P / heads) too."""
    if weight_hh.dim() == 2:
        return weight_hh.shape[0], weight_hh.shape[1]
    return weight_hh.shape[0] * weight_hh.shape[1], weight_hh.shape[0] * weight_hh.shape[2]


def block_diagonal(weight_hh: torch.Tensor, gates: int) -> torch.Tensor:
    """The matrix (G H, P) of which the weights of heads, (heads, G H / heads, P / heads), are the blocks: those of each
    gate stand on its diagonal, and 0 elsewhere.

        W[g H + k H/heads + i, k P/heads + j] = weight_hh[k, g H/heads + i, j]
    """
    heads, rows, width = weight_hh.shape
    blocks = weight_hh.reshape(heads, gates, rows // gates, width).permute(1, 2, 3, 0)
    return torch.diag_embed(blocks).permute(0, 3, 1, 4, 2).reshape(heads * rows, heads * width)


def diagonal_blocks(weight_hh: torch.Tensor, heads: int, gates: int) -> torch.Tensor:
    """What `block_diagonal` makes a matrix of: its blocks on the diagonal of each gate."""
    rows, width = weight_hh.shape
    parts = weight_hh.reshape(gates, heads, rows // gates // heads, heads, width // heads)
    return parts.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2).reshape(heads, rows // heads, width // heads)


def padded(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed sequence x (N, I), whose rows are sorted by lengths (B,), as (B, T, I), and at which positions of
    (T, B) its own stand."""
    time, batch = int(lengths.max()) if lengths.numel() else 0, lengths.shape[0]
    where = (torch.arange(time, device=x.device).unsqueeze(1) < lengths).flatten().nonzero().squeeze(1)
    whole = x.new_zeros(time * batch, x.shape[1]).index_copy(0, where, x)
    return whole.view(time, batch, x.shape[1]).transpose(0, 1), where


def recurrence(
    cell: str,
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: Optional = None,
    bias_hh: Optional = None,
    h0: Optional = None,
    c0: Optional = None,
    *,
    lengths: Optional = None,
    reset: Optional = None,
    reverse: bool = False,
    weight_hr: Optional = None,
    recurrent_mask: Optional = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    update: tuple[Optional, Optional] = (None, None),
    layer_norm: tuple[Optional, ...] = (None, None, None, None),
    weight_factors: Optional = None,
) -> tuple[torch.Tensor, torch.Tensor, Optional]:
    """One layer and direction over x (B, T, I): output (B, T, P or H), h_n (B, P or H), c_n (B, H) or None.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        weight_hh: (G H, P), or of heads, as `block_diagonal` takes it.
        zoneout: the probabilities of h and c to keep their value.
        update: under zoneout in training the units of h (B, T, P or H) and c (B, T, H) that take their new value.
        weight_factors: what multiplies the matrix of weight_hh, (G H, P).
    """
    batch, time, _ = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)

    def widened(v: Optional) -> Optional:
        return None if v is None else v.to(wide)

    parameters = [widened(v) for v in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, recurrent_mask)]
    w_ih, w_hh, b_ih, b_hh, w_hr, mask = parameters
    assert w_ih is not None and w_hh is not None
    norm_ih, norm_hh, norm_c, norm_b = map(widened, layer_norm)
    if w_hh.dim() == 3:
        w_hh = block_diagonal(w_hh, GATES[cell])
    if weight_factors is not None:
        w_hh = w_hh * weight_factors.to(wide)
    hidden = w_ih.shape[0] // GATES[cell]
    h = x.new_zeros(batch, w_hh.shape[1], dtype=wide) if h0 is None else h0.to(wide)
    c = x.new_zeros(batch, hidden, dtype=wide) if c0 is None else c0.to(wide)

    position = torch.arange(time, device=x.device)
    present = (position < (time if lengths is None else lengths[:, None])).expand(batch, time)[..., None]
    # Whether a state is zeroed before step t: in reverse it is the flag of t + 1 that parts the two.
    starts = present.new_zeros(batch, time, 1) if reset is None else reset[..., None] & present
    if reverse:
        starts = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1)

    inputs = normalised(torch.where(present, x, 0).to(wide) @ w_ih.t(), norm_ih)  # (B, T, gates)
    inputs = inputs if b_ih is None else inputs + b_ih
    outputs: list[torch.Tensor] = []
    for t in reversed(range(time)) if reverse else range(time):
        here = present[:, t]
        # An absent position computes on zeros, whatever the state holds, and is dropped.
        begins = starts[:, t] | ~here
        h_before, c_before = torch.where(begins, 0, h), torch.where(begins, 0, c)
        masked = h_before if mask is None else h_before * mask
        recurrent = normalised(masked @ w_hh.t(), norm_hh)
        recurrent = recurrent if b_hh is None else recurrent + b_hh
        c_new = c_before
        if cell == "lstm":
            i, f, g, o = (inputs[:, t] + recurrent).chunk(4, dim=1)
            c_new = torch.sigmoid(f) * c_before + torch.sigmoid(i) * torch.tanh(g)
            h_new = torch.sigmoid(o) * torch.tanh(normalised(c_new, norm_c, norm_b))
            h_new = h_new if w_hr is None else h_new @ w_hr.t()
            c_new = zoned(c_new, c_before, zoneout[1], None if update[1] is None else update[1][:, t])
        elif cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = inputs[:, t].chunk(3, dim=1), recurrent.chunk(3, dim=1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            h_new = (1 - z) * torch.tanh(x_n + r * h_n) + z * h_before
        else:
            h_new = (torch.tanh if cell == "rnn_tanh" else torch.relu)(inputs[:, t] + recurrent)
        h_new = zoned(h_new, h_before, zoneout[0], None if update[0] is None else update[0][:, t])
        outputs.append(torch.where(here, h_new, 0))
        h, c = torch.where(here, h_new, h), torch.where(here, c_new, c)
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs, dim=1) if outputs else x.new_zeros(batch, 0, h.shape[1])
    # Copied, so that a state that no step has changed is not the caller's h0 itself.
    h, c = (v.to(x.dtype, copy=True).contiguous() for v in (h, c))
    return output.to(x.dtype).contiguous(), h, c if cell == "lstm" else None
