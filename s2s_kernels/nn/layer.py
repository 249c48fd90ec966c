"""What every layer of this package shares."""

from typing import NoReturn

from torch import nn


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
