"""Matrix products of the library with float32 sums."""

import torch

from ... import checks


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b of float32, bfloat16 or float16 matrices, summed in float32 and given as that; into `out` where given."""
    if not (a.numel() and b.numel()):
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32) if out is None else out.zero_()
    if torch._C._is_any_autocast_enabled():
        with checks.without_autocast(a):
            return _product(a, b, out)
    return _product(a, b, out)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:  # where kernels are emulated; torch has mixed products for CUDA alone
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
