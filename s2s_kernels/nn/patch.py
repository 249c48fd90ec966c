"""Swaps torch's layers inside a model for ours, in place, and back."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import checks
from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .layer import Layer
from .recurrence import GRU, LSTM, RNN

SWAPS: dict[type[nn.Module], type[Layer]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
    nn.MultiheadAttention: MultiheadAttention,
}
# The weights of a layer that may be absent or None; RNNBase lists its own.
_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.RNNCellBase: ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    nn.MultiheadAttention: (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "out_proj.weight",
        "out_proj.bias",
    ),
}
_FAMILIES = (*SWAPS, nn.RNNBase, nn.RNNCellBase)  # whose subclasses a report names

Only = str | type | Iterable[str | type] | Callable[..., Any] | None
Selector = Callable[[str, nn.Module], bool]


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A module that became, or under dry_run would become, ours.

    Attributes:
        name: its qualified name in the model, "" for the model itself.
        before, after: its classes.
        module: itself.
    """

    name: str
    before: type[nn.Module]
    after: type[Layer]
    module: nn.Module = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Left:
    """A module that was left as it is, or that goes past a swapped one, and why.

    Attributes:
        name: its qualified name in the model, "" for the model itself.
        type: its class.
        reason: in words.
    """

    name: str
    type: type[nn.Module]
    reason: str


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` did; printing it reads well. As a context manager it undoes, at the end, what it did.

    Attributes:
        swapped: the modules that became ours.
        left: the layers that didn't, each with its reason.
        bypassed: modules that don't always call a swapped module inside them, each with its reason.
        dry_run: nothing was changed.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    bypassed: tuple[Left, ...]
    dry_run: bool = False

    def __str__(self) -> str:
        count = len(self.swapped)
        verb = "would be swapped" if self.dry_run else "swapped"
        lines = [f"{count} module{'' if count == 1 else 's'} {verb}, {len(self.left)} left"]
        lines += [f"  swapped {_label(s.name)}: {_title(s.before)} -> {_title(s.after)}" for s in self.swapped]
        for heading, entries in (("left", self.left), ("bypassed", self.bypassed)):
            lines += [f"  {heading} {_label(e.name)} ({_title(e.type)}): {e.reason}" for e in entries]
        return "\n".join(lines)

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.dry_run:
            _restore([(s.name, s.module) for s in self.swapped])


def patch(model: nn.Module, *, only: Only = None, dry_run: bool = False) -> PatchReport:
    """Makes torch's recurrent and attention layers inside a model ours, in place: the same objects with the same
    Parameters and hooks, so optimizers, references and checkpoints keep working.

    Only modules whose class is exactly torch's `LSTM`, `GRU`, `RNN`, a cell of these or `MultiheadAttention`, with
    plain Parameters, are swapped; the report names every other one that looks like them, and why it was left.
    Afterwards `isinstance(layer, torch.nn.LSTM)` is False.

    Args:
        model: any module, which may itself be such a layer.
        only: what to swap: a qualified name (of a module, with all inside it), a class (with its subclasses), several
            of these, or a predicate of (module) or (name, module).
        dry_run: report what would happen, and change nothing.

    Returns:
        a report, which is also a context manager: ``with patch(model): ...`` swaps for a while.

    Raises:
        TypeError, ValueError: an argument is not as above, or a name is not in the model; the message names it.
    """
    if not isinstance(model, nn.Module):
        checks.wrong_type("patch", "model", "a torch.nn.Module", type(model).__name__)
    selects = _selector(only, model)
    swapped, left = [], []
    for name, module in model.named_modules():
        found = _examine(module)
        if found is None:
            continue
        if isinstance(found, str):
            left.append(Left(name, type(module), found))
        elif not selects(name, module):
            left.append(Left(name, type(module), "only doesn't select it"))
        else:
            swapped.append(Swapped(name, type(module), found, module))
    report = PatchReport(tuple(swapped), tuple(left), _bypassed(model, swapped), dry_run)
    if not dry_run:
        for swap in swapped:
            _become_ours(swap.module, swap.after)
    return report


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Gives every module that `patch` has swapped its class of torch's again, in place.

    Args:
        model: any module; copies and unpickled ones of a patched model too.

    Returns:
        the qualified names of the modules that were restored.

    Raises:
        TypeError: the model is no module.
        ValueError: a module was parametrised while it was patched; its parametrizations have to be removed first.
    """
    if not isinstance(model, nn.Module):
        checks.wrong_type("unpatch", "model", "a torch.nn.Module", type(model).__name__)
    return _restore(list(model.named_modules()))


def _examine(module: nn.Module) -> type[Layer] | str | None:
    """The class of ours that a module is to have, or why it stays as it is, or None where it is no such layer."""
    kind = type(module)
    if kind in SWAPS.values():
        return f"it is {_title(kind)} already"
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", None)
        same = any(scripted == known.__name__ for known in SWAPS)
        return "it is scripted, and its code can't be exchanged" if same else None
    if kind.__module__.startswith(("torch.ao.nn.", "torchao.")):
        return "it is quantised" if any(kind.__name__ == known.__name__ for known in SWAPS) else None
    if not isinstance(module, _FAMILIES):
        return None
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"its {names} is parametrised: remove the parametrization, or patch first"
    if kind not in SWAPS:
        base = next(known for known in kind.__mro__ if known in _FAMILIES)
        return f"it is a subclass of {_title(base)}, whose methods ours doesn't have"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for path in _weight_names(module):
        prefix, _, name = path.rpartition(".")
        owner = module.get_submodule(prefix)
        value = owner._parameters[name] if name in owner._parameters else getattr(owner, name, None)
        if value is not None and (name not in owner._parameters or type(value) is not nn.Parameter):
            return f"its {path} is no plain Parameter (weight-normed, pruned, dropped or of a tensor subclass)"
    return SWAPS[kind]


def _weight_names(module: nn.Module) -> Iterable[str]:
    if isinstance(module, nn.RNNBase):
        return module._flat_weights_names
    return next(names for family, names in _WEIGHTS.items() if isinstance(module, family))


def _bypassed(model: nn.Module, swapped: list[Swapped]) -> tuple[Left, ...]:
    """Encoder layers whose attention is ours, or is to become ours."""
    ours = {id(swap.module) for swap in swapped}
    return tuple(
        Left(
            name,
            type(module),
            "in evaluation without gradients its fast path never calls its self_attn, which is bypassed there",
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and type(module).forward is nn.TransformerEncoderLayer.forward
        and (id(module.self_attn) in ours or isinstance(module.self_attn, Layer))
    )


def _become_ours(module: nn.Module, after: type[Layer]) -> None:
    if isinstance(module, nn.RNNBase):
        for copy in ("_flat_weights", "_flat_weight_refs"):
            module.__dict__.pop(copy, None)  # references to the Parameters, which only torch's class keeps up to date
    before, module.__class__ = type(module), after  # type: ignore[assignment]
    module._patched_from = before  # type: ignore[assignment]


def _restore(modules: list[tuple[str, nn.Module]]) -> tuple[str, ...]:
    patched = [(name, m) for name, m in modules if isinstance(m, Layer) and m._patched_from is not None]
    for name, module in patched:
        if type(module) not in SWAPS.values():
            raise ValueError(
                f"unpatch: {_label(name)} is {_title(type(module))} by now: "
                "what was done to it while it was patched (a parametrization, for one) has to be undone first"
            )
    for _, module in patched:
        assert module._patched_from is not None
        module.__class__ = module._patched_from  # type: ignore[assignment]
        del module._patched_from
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return tuple(name for name, _ in patched)


def _selector(only: Only, model: nn.Module) -> Selector:
    """Whether a candidate is to be swapped, given its name and itself."""
    if only is None:
        return lambda name, module: True
    if callable(only) and not isinstance(only, type):
        return _predicate(only)
    wanted = [only] if isinstance(only, (str, type)) else list(only) if isinstance(only, Iterable) else [None]
    if not all(isinstance(w, (str, type)) for w in wanted):
        checks.wrong_type("patch", "only", "names, types or a predicate", repr(only))
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    known = {name for names in aliases.values() for name in names}
    for name in (w for w in wanted if isinstance(w, str)):
        if name not in known:
            checks.wrong_value("patch", "only", "names of modules in the model", repr(name))
    types = tuple(w for w in wanted if isinstance(w, type))
    for kind in types:
        if not any(issubclass(base, kind) for base in SWAPS):
            checks.wrong_value("patch", "only", f"types that are swapped ({_titles()})", _title(kind))

    def selects(name: str, module: nn.Module) -> bool:
        return isinstance(module, types) or any(
            not w or alias == w or alias.startswith(f"{w}.")
            for w in wanted
            if isinstance(w, str)
            for alias in aliases[id(module)]
        )

    return selects


def _predicate(only: Callable[..., Any]) -> Selector:
    required = [
        p
        for p in inspect.signature(only).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(required) == 1:
        return lambda name, module: bool(only(module))
    return lambda name, module: bool(only(name, module))


def _label(name: str) -> str:
    return name or "the model itself"


def _title(kind: type) -> str:
    for package in ("torch.nn", "s2s_kernels.nn"):
        if kind.__module__.startswith(f"{package}."):
            return f"{package}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _titles() -> str:
    return ", ".join(_title(kind) for kind in SWAPS)
