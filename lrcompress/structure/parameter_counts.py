"""Parameter counts and bytes of a model, as it is and as if dense."""

import math
from collections.abc import Iterable

from torch import nn

from lrcompress.nn import LowRankSparseLinear, Replacement
from lrcompress.statistics.views import view


def dense_size(model: nn.Module) -> int:
    """Return the number of parameters of ``model`` if its factored layers were dense."""
    now = sum(p.numel() for p in model.parameters())
    return now + sum(_weight(x) - factor_size(x) for x in _replaced(model))


def sizes_before(
    model: nn.Module, begun: type[Replacement] = LowRankSparseLinear
) -> tuple[int, int]:
    """Return the parameters of ``model`` and their bytes, as before a change that has only begun.

    Layers of the type ``begun`` that hold more than a dense weight count as dense: they are being
    pruned or updated. All others count as they are, factored ones too.
    """
    held = [x for x in _replaced(model) if isinstance(x, begun) and factor_size(x) > _weight(x)]
    more = [(factor_size(x) - _weight(x), x.factors[0].element_size()) for x in held]
    parameters = sum(p.numel() for p in model.parameters()) - sum(count for count, _ in more)
    return parameters, stored_bytes(model) - sum(count * size for count, size in more)


def replaced_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the parameters in place of the dense weight, of the named layers that have others."""
    layers = {name: model.get_submodule(name) for name in names}
    return {name: factor_size(x) for name, x in layers.items() if isinstance(x, Replacement)}


def whole_shape(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a linear layer in the architecture, whatever is left of it."""
    if isinstance(layer, Replacement):
        return layer.sizes["out"], layer.sizes["in"]
    return view(layer).shape


def inner_features(layer: nn.Module) -> tuple[int, int] | None:
    """Return how many features are left of those of which a layer has lost some, and of how many.

    None for a layer that has all of its inputs and outputs.
    """
    sides = zip(view(layer).shape, whole_shape(layer), strict=True)
    return next((pair for pair in sides if pair[0] < pair[1]), None)


def factor_size(layer: Replacement) -> int:
    """Return the number of parameters that stand in place of the dense weight."""
    return sum(p.numel() for p in layer.factors)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that the parameters of ``model`` take."""
    return sum(p.nbytes for p in model.parameters())


def _replaced(model: nn.Module) -> list[Replacement]:
    """Return the replaced layers; of those that share their factors only one."""
    layers = [module for module in model.modules() if isinstance(module, Replacement)]
    return list({tuple(map(id, layer.factors)): layer for layer in layers}.values())


def _weight(layer: Replacement) -> int:
    return math.prod(layer.sizes[side] for side in ("out", "in"))
