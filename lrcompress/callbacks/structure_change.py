"""Changes of structure as the trainer's other callbacks and the module hear of them.

Whoever has a method of this name is called after a change, before the next training step::

    def on_structure_change(self, trainer, pl_module, changes): ...  # a callback
    def on_structure_change(self, changes): ...                      # the LightningModule

``changes`` maps the name of each parameter of the layers that were replaced to the names of those
in its place: ``{"net.0.weight": ["net.0.right.weight", "net.0.left.weight"], "net.0.bias":
["net.0.left.bias"]}``. All of these have new values. Parameters of other layers are not named.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lrcompress.structure.schedule_free import averaged, begin_averages_

HOOK = "on_structure_change"
Changes = dict[str, list[str]]
_MARK = "_lrcompress_name"  # of a parameter: what it was called before a change


@contextmanager
def structure_change(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Change the structure inside the block, and tell all others after it.

    Schedule-free optimizers are in evaluation mode there, so that what is factored are averages.
    """
    with averaged(trainer.optimizers):
        before = Structure(module)
        try:
            yield
            changes = before.changes(module)
        finally:
            before.forget(module)
        if not changes:
            return
        begin_averages_(trainer.optimizers)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, HOOK):
                getattr(callback, HOOK)(trainer, module, changes)
        if hasattr(module, HOOK):
            getattr(module, HOOK)(changes)


class Structure:
    """The modules and parameters that a model has now, by name; it keeps none of them alive."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: ref(module) for name, module in model.named_modules()}
        self._names = []
        for name, parameter in model.named_parameters():
            self._names.append(name)
            setattr(parameter, _MARK, name)  # torch swaps no parameter that is weakly referred to

    def changes(self, model: nn.Module) -> Changes:
        """Return what stands in ``model`` for each parameter of a layer that is another one now.

        Where several are replaced by one, it stands with each of them. Parameters that are no
        successor of a certain one, such as those of an update beside a weight that stays,
        are listed with the first of their layer.
        """
        now = dict(model.named_modules())
        other = [name for name, held in self._modules.items() if held() is not now.get(name)]
        layers = [name for name in other if not _within(name, other)]
        named = {name: getattr(p, _MARK, None) for name, p in model.named_parameters()}
        still = {before: name for name, before in named.items() if before is not None}
        found: Changes = {}
        for layer in layers:
            old = [name for name in self._names if _within(name, [layer])]
            stayed = {name: still[name] for name in old if name in still}
            new = [n for n in named if _within(n, [layer]) and n not in stayed.values()]
            gone = [n for n in old if not _within(stayed.get(n, ""), [layer])]
            heirs = gone or old[:1]
            for name in old:
                found[name] = [stayed[name]] if name in stayed else []
                found[name] += new if name in heirs else []
        return found

    def forget(self, model: nn.Module) -> None:
        """Remove from the parameters what tells which ones they were."""
        for parameter in model.parameters():
            vars(parameter).pop(_MARK, None)


def _within(name: str, layers: Sequence[str]) -> bool:
    """Return whether a name lies in one of the layers, and is none of them."""
    return any(
        name.startswith(f"{layer}." if layer else layer) and name != layer for layer in layers
    )


def warn_of_stale(trainer: pl.Trainer, module: nn.Module, layers: Sequence[str]) -> None:
    """Warn of callbacks that keep parameters of these layers, or values under their names.

    They would go on with those of the dense layers. Whoever has the hook knows better.
    """
    held = dict(module.named_parameters())
    names = {name for name in held if _within(name, layers)}
    numbers = {id(held[name]) for name in names}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        ours = type(callback).__module__.partition(".")[0] in ("lightning", "lrcompress")
        if ours or hasattr(callback, HOOK):
            continue
        for key, value in vars(callback).items():
            if _keeps(value, names, numbers):
                rank_zero_warn(
                    f"{type(callback).__name__}.{key} keeps parameters of layers that are to be "
                    f"replaced, such as {min(names)!r}, and would not follow: give "
                    f"{type(callback).__name__} a method {HOOK}(trainer, pl_module, changes), or "
                    "leave the callback out"
                )


def _keeps(value: Any, names: set[str], numbers: set[int]) -> bool:
    if isinstance(value, nn.Module):  # a copy, of the module or of a part of it
        tails = (*names, *(name.partition(".")[2] for name in names))
        return any(name.endswith(tails) for name, _ in value.named_parameters())
    if isinstance(value, Mapping):
        return any(key in names for key in value if isinstance(key, str))
    if isinstance(value, list | tuple | set):
        return any(id(one) in numbers for one in value)
    return False
