"""How large a model is, and how large it was before it was compressed."""

import math

from torch import nn

from lrcompress.nn import Factored
from lrcompress.statistics.views import view


def dense_size(model: nn.Module) -> int:
    """Return how many parameters ``model`` would have with its factored layers dense."""
    now = sum(p.numel() for p in model.parameters())
    views = [view(module) for module in model.modules() if isinstance(module, Factored)]
    return now + sum(math.prod(v.shape) - sum(p.numel() for p in v.parameters) for v in views)


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes they would take, in the types of the factors."""
    now = stored_bytes(model)
    views = [view(module) for module in model.modules() if isinstance(module, Factored)]
    dense = sum(math.prod(v.shape) * v.parameters[0].element_size() for v in views)
    return now + dense - sum(p.nbytes for v in views for p in v.parameters)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that the parameters of ``model`` take."""
    return sum(p.nbytes for p in model.parameters())
