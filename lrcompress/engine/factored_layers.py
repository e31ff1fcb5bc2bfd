"""Factors in place of layers, in the storage asked for, with the optimizer state carried over."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.engine.distributed_solve import Found
from lrcompress.engine.settings import Settings
from lrcompress.linalg import double
from lrcompress.nn import FactoredLinear, KroneckerLinear, LowRankLinear, PivotedLinear
from lrcompress.nn.kronecker import carry_kronecker
from lrcompress.objective import Metric
from lrcompress.solvers.kronecker import KroneckerFactors, Sizes
from lrcompress.solvers.truncation import Factors
from lrcompress.statistics.views import view
from lrcompress.structure.surgery import (
    Carry,
    carry_dense,
    carry_factors,
    carry_later,
    replace_,
    swap_parameters_,
)


def is_pivoted(layer: nn.Module, settings: Settings) -> bool:
    """Return whether factors of a layer are stored as pivoted rows; those that are stay so."""
    return settings.storage == "pivoted" or isinstance(layer, PivotedLinear)


def keep_lower_ranks(model: nn.Module, ranks: dict[str, int | None]) -> None:
    """Leave a layer alone whose factors would only grow: truncation cannot add rank."""
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if isinstance(layer, LowRankLinear | PivotedLinear):
            ranks[name] = layer.rank if rank is None else min(rank, layer.rank)


def put_factors(
    model: nn.Module,
    name: str,
    rank: int,
    first: Sizes | None,
    found: Found | None,
    optimizers: Sequence[Optimizer],
    *,
    pivoted: bool = False,
) -> None:
    """Put factors in place of a layer; without any, a layer that another process fills.

    Args:
        model: changed in place.
        name: of the layer.
        rank: of the factors, or how many terms of Kronecker products.
        first: sizes of the first factor of Kronecker products; None for low-rank factors.
        found: the factors and the metric they were found in.
        optimizers: whose parameters and state follow.
        pivoted: whether low-rank factors are stored as pivoted rows.
    """
    layer = model.get_submodule(name)
    old, parts = view(layer), None
    new: FactoredLinear
    if first is not None:
        new, parts = KroneckerLinear.in_place_of(layer, rank, *first), ("first", "second")
    elif pivoted:
        new, parts = PivotedLinear.in_place_of(layer, rank), ("right", "rest")
    else:
        new = LowRankLinear.in_place_of(layer, rank)
    carry = _set_factors_(new, layer, *found) if found else carry_later(new.factors)
    replace_(model, name, new)
    tied = any(parameter is old.parameters[0] for parameter in model.parameters())
    swap_parameters_(optimizers, old.parameters, new.factors, carry, names=parts, staying=tied)


def _set_factors_(
    new: FactoredLinear, layer: nn.Module, factors: Factors | KroneckerFactors, metric: Metric
) -> Carry:
    """Give ``new`` its values, and return how ``layer``'s optimizer state carries over."""
    old = view(layer)
    if metric.mean is not None and old.bias is not None:
        lost = double(old.weight)
        lost -= factors.product().to(lost)
        old.bias.add_((lost @ metric.mean.to(lost)).to(old.bias))
    if isinstance(new, PivotedLinear):
        assert isinstance(factors, Factors)
        left, right = new.set_(factors.left, factors.right)
        carry = _carry(layer, left, right)
        return lambda state, squared: new.rows_of(carry(state, squared))
    for parameter, value in zip(new.factors, factors.values, strict=True):
        parameter.copy_(value)
    if isinstance(factors, KroneckerFactors):
        return carry_kronecker(factors.first, factors.second, old.transposed)
    return _carry(layer, factors.left, factors.right)


def _carry(layer: nn.Module, left: Tensor, right: Tensor) -> Carry:
    """Return how the optimizer state of a layer becomes that of low-rank factors."""
    if isinstance(layer, LowRankLinear):
        return carry_factors((layer.left.weight, layer.right.weight), (left, right))
    if isinstance(layer, PivotedLinear):
        carry = carry_factors((layer.left, layer.right), (left, right))
        return lambda state, squared: carry(layer.state_of_factors(state, squared), squared)
    return carry_dense(left, right, view(layer).transposed)
