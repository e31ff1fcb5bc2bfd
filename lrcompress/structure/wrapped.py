"""Layers that other libraries have wrapped or quantised: adapters of PEFT, weights of few bits.

All are known by the names of their classes, so that those libraries need not be imported.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from lrcompress.errors import LayerError
from lrcompress.nn import Replacement
from lrcompress.statistics.views import is_linear

MERGE = "merge the adapters first: model = model.merge_and_unload()"
# What every adapter of PEFT is, and what holds a module that is trained beside them.
_ADAPTERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"}


def adapted_names(model: nn.Module) -> list[str]:
    """Return the names of the modules in ``model`` that an adapter of PEFT wraps."""
    return [
        name
        for name, module in model.named_modules()
        if _ADAPTERS & {kind.__name__ for kind in type(module).__mro__}
    ]


def quantised(weights: Iterable[Tensor]) -> str | None:
    """Return what the first weight that is quantised is, in words, or None if none is."""
    for weight in weights:
        sharded = hasattr(weight, "full_tensor")  # an nn.Parameter too, though not by its type
        if not weight.is_floating_point() or not (sharded or type(weight) is nn.Parameter):
            return f"quantised ({weight.dtype}, {type(weight).__name__})"
    return None


def unread_layers(model: nn.Module) -> dict[str, str]:
    """Return layers that are linear by their sizes, but of types that have no normal form here.

    Such as ``Linear4bit`` of bitsandbytes. Name to the reason why it stays.
    """
    found = {}
    for name, module in model.named_modules():
        sizes = (getattr(module, key, None) for key in ("in_features", "out_features"))
        known = isinstance(module, Replacement) or is_linear(module)
        if not known and all(isinstance(size, int) for size in sizes):
            kind = type(module)
            package = kind.__module__.partition(".")[0]
            found[name] = (
                f"it is a {kind.__name__} of {package}, whose weight is not read here; factor "
                "layers before they are quantised or exchanged"
            )
    wrapped = adapted_names(model)
    return {name: why for name, why in found.items() if not _touches(name, wrapped)}


def is_adapted(name: str, wrapped: Iterable[str]) -> bool:
    """Return whether a layer lies within a wrapped module, or has one within it."""
    return name.endswith(".base_layer") or "lora_" in name or _touches(name, wrapped)


def _touches(name: str, wrapped: Iterable[str]) -> bool:
    return any(
        f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.") for other in wrapped
    )


def check_unwrapped(model: nn.Module) -> None:
    """Check that factors are all there is to the factored layers of a model.

    Raises:
        LayerError: if one has adapters, which would be lost, or its factors are quantised.
    """
    wrapped = adapted_names(model)
    for name, module in model.named_modules():
        if not isinstance(module, Replacement):
            continue
        if _touches(name, wrapped):
            raise LayerError(f"layer {name!r} has adapters, which would be lost; {MERGE}")
        bits = quantised(module.factors)
        if bits is not None:
            raise LayerError(
                f"the factors of layer {name!r} are {bits}; do this before they are quantised"
            )
