"""Parameter counts and bytes of a model, as it is and as if dense."""

import math

from torch import nn

from lrcompress.nn import Replacement


def dense_size(model: nn.Module) -> int:
    """Return the number of parameters of ``model`` if its factored layers were dense."""
    now = sum(p.numel() for p in model.parameters())
    return now + sum(_weight(x) - sum(p.numel() for p in x.factors) for x in _replaced(model))


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters if factored layers were dense, in the factors' dtypes."""
    now = stored_bytes(model)
    layers = _replaced(model)
    dense = sum(_weight(x) * x.factors[0].element_size() for x in layers)
    return now + dense - sum(p.nbytes for x in layers for p in x.factors)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that the parameters of ``model`` take."""
    return sum(p.nbytes for p in model.parameters())


def _replaced(model: nn.Module) -> list[Replacement]:
    """Return the replaced layers; of those that share their factors only one."""
    layers = [module for module in model.modules() if isinstance(module, Replacement)]
    return list({tuple(map(id, layer.factors)): layer for layer in layers}.values())


def _weight(layer: Replacement) -> int:
    return math.prod(layer.sizes[side] for side in ("out", "in"))
