"""Factors in place of layers, in the storage asked for, with the optimizer state carried over."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.distributed_solve import Found, broadcast_layers_
from lrcompress.engine.settings import Settings
from lrcompress.linalg import double
from lrcompress.nn import (
    FactoredLinear,
    KroneckerLinear,
    LowRankLinear,
    PivotedLinear,
    low_rank_in_place_of,
)
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
from lrcompress.structure.tied_weights import tied_layers


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
    else:
        new = low_rank_in_place_of(layer, rank, pivoted=pivoted)
        parts = ("right", "rest") if pivoted else None
    carry = _set_factors_(new, layer, *found) if found else carry_later(new.factors)
    replace_(model, name, new)
    tied = any(parameter is old.parameters[0] for parameter in model.parameters())
    swap_parameters_(optimizers, old.parameters, new.factors, carry, names=parts, staying=tied)


@torch.no_grad()
def store_pivoted_(
    model: nn.Module,
    names: Iterable[str] | None = None,
    optimizers: Sequence[Optimizer] = (),
    *,
    processes: Processes = ONE_PROCESS,
) -> list[str]:
    """Store low-rank layers as pivoted rows: the same matrices in fewer parameters.

    A layer of ``rank·(out + in)`` parameters becomes a :class:`~lrcompress.nn.PivotedLinear` of
    ``rank·(out + in − rank)``; its weight is the same to rounding.

    Args:
        model: changed in place.
        names: of layers, by default all; those that are no :class:`~lrcompress.LowRankLinear`,
            or share their factors with an embedding, are left alone.
        optimizers: whose parameters and state follow.
        processes: those that do the same with the same model; sharded layers are turned in full.

    Returns:
        The names of the layers that were turned.

    Cost:
        ``O(rank²·out)`` a layer.

    Example:
        >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2))
        >>> sum(p.numel() for p in model.parameters())
        24
        >>> store_pivoted_(model), sum(p.numel() for p in model.parameters())
        (['0'], 20)
    """
    modules = dict(model.named_modules())
    tied = tied_layers(modules)
    wanted = (modules.keys() if names is None else {*names}) - tied.keys() - {*tied.values()}
    turned = [n for n, m in modules.items() if n in wanted and isinstance(m, LowRankLinear)]
    for name in turned:
        with processes.unsharded(model, [name], optimizers):
            layer = model.get_submodule(name)
            assert isinstance(layer, LowRankLinear)
            factors = Factors(layer.left.weight.detach(), layer.right.weight.detach(), 0.0, 0.0)
            found = factors, Metric()
            put_factors(model, name, layer.rank, None, found, optimizers, pivoted=True)
            broadcast_layers_(model, {name: 0}, optimizers, processes)
    return turned


def saved_by_pivoting(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the parameters, and their bytes, that pivoted rows take less than balanced factors.

    Args:
        model: whose layers they are.
        names: of layers; those that are no :class:`~lrcompress.LowRankLinear` are left out.

    Example:
        >>> saved_by_pivoting(nn.Sequential(LowRankLinear(6, 4, rank=2), nn.Linear(3, 3)), "01")
        {'0': (4, 16)}
    """
    layers = {name: model.get_submodule(name) for name in names}
    found = {n: layer for n, layer in layers.items() if isinstance(layer, LowRankLinear)}
    fewer = {n: layer.rank**2 for n, layer in found.items()}
    return {n: (fewer[n], fewer[n] * found[n].right.weight.element_size()) for n in found}


def _set_factors_(
    new: FactoredLinear, layer: nn.Module, factors: Factors | KroneckerFactors, metric: Metric
) -> Carry:
    """Give ``new`` its values, and return how ``layer``'s optimizer state carries over."""
    old = view(layer)
    if metric.mean is not None and old.bias is not None:
        whole = double(old.weight)  # the weight itself, where that is in float64
        lost = factors.product().to(whole).neg_().add_(whole)
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
