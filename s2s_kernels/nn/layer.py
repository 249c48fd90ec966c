"""What every layer of this package shares."""

from typing import Any, NoReturn

import torch
from torch import nn

from .. import checks


class Layer(nn.Module):
    """A module whose forward calls operators that TorchScript can't compile: `torch.jit.script` is refused with
    advice."""

    _patched_from: type[nn.Module] | None = None  # torch's class, of a module that `patch` has swapped

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script can't compile {type(self).__module__}.{type(self).__name__}: "
            "call s2s_kernels.unpatch(model) first, "
            "or use torch.nn's layer in its place; torch.compile and torch.export take it as it is"
        )


def check_width(name: str, argument: str, x: torch.Tensor, size: int, dtype: torch.dtype) -> None:
    """That x is what a product with parameters takes, whose dtype autocast may see to."""
    if x.shape[-1] != size:
        checks.wrong_value(name, argument, f"of width {size}", tuple(x.shape))
    if x.dtype != dtype and not (x.is_floating_point() and checks.autocasts(x)):
        checks.wrong_type(name, argument, f"{dtype} like the parameters", x.dtype)


def check_projected(name: str, argument: str, x: Any, layout: str, projection: nn.Module | None) -> None:
    """The same of data of three dimensions, unless there is no linear map, or something has taken its place."""
    checks.data(name, argument, x, 3, layout)
    if isinstance(projection, nn.Linear):
        check_width(name, argument, x, projection.in_features, projection.weight.dtype)
