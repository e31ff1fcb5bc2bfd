"""Split dense layers into low-rank factors and rows of the remainder, exactly (LoSparse)."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.budget import Candidate, allocate
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.distributed_solve import (
    Found,
    Solutions,
    greatest_rank,
    install_factors_,
    solve_layers,
)
from lrcompress.engine.progress import Track, untracked
from lrcompress.engine.settings import Settings
from lrcompress.errors import LayerError, SettingError
from lrcompress.linalg import double
from lrcompress.nn import LowRankSparseLinear, Replacement
from lrcompress.objective import METHODS, Metric
from lrcompress.pruning.budget import AUTO, LoSparseBudget, Quota
from lrcompress.pruning.ranks_and_rows import allocate_ranks_and_rows
from lrcompress.report.record import LayerRecord
from lrcompress.solvers.row_errors import row_energies
from lrcompress.solvers.truncation import Factors, Truncation, truncate
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view
from lrcompress.structure.selection import Selection
from lrcompress.structure.surgery import carry_later, carry_sparse, replace_, swap_parameters_

Sizes = Mapping[str, tuple[int, int]]


@torch.no_grad()
def split_(
    model: nn.Module,
    statistics: Statistics,
    settings: Settings,
    shares: LoSparseBudget,
    *,
    optimizers: Iterable[Optimizer] = (),
    processes: Processes = ONE_PROCESS,
    owner: Mapping[str, int] | None = None,
    track: Track = untracked,
) -> tuple[dict[str, Tensor], list[Quota]]:
    """Replace the targeted layers by factors plus all rows of the remainder, exactly.

    ``W = left right + S`` with ``left right`` the best matrix of its rank in the metric of
    ``settings.method``. Without a sparse part the factors start with full rank; only there, with
    an ``initial_rank`` below 1, is something lost.

    Args:
        model: changed in place.
        statistics: of the targeted layers, of the kinds the method needs.
        settings: which layers, and the metric.
        shares: what will remain.
        optimizers: whose parameters and state follow.
        processes: those that do the same at the same time, each of which solves some layers.
        owner: the process of each layer, where only that one has observed it.
        track: yields layers while they are solved, as a progress bar does.

    Returns:
        The mean input ``(in,)`` of every layer whose bias can take up what pruning takes away,
        and what may stay of the units.

    Raises:
        SettingError: if ``keep`` is less than one rank a layer takes, or ranks and rows shall
            compete by predicted losses, which the method does not know.
        LayerError: if a targeted layer is factored already.
    """
    names = settings.select(model).names
    check_dense(model, names)
    shares.check_method(settings.method)
    sizes = {name: view(model.get_submodule(name)).shape for name in names}
    start = shares.start_rank
    most = {
        name: greatest_rank(model.get_submodule(name))
        if start is None
        else max(1, math.ceil(start * min(shape)))
        for name, shape in sizes.items()
    }
    divides = shares.start_rank is None and shares.low_rank_share == AUTO
    losses: dict[str, Tensor] = {}

    def solve(name: str, weight: Tensor, metric: Metric) -> Truncation:
        found = truncate(weight, metric.output, metric.input, most=most[name])
        if divides:
            losses[name] = _row_losses(weight, metric, found)
        return found

    solutions = solve_layers(
        model,
        names,
        statistics,
        settings.method,
        refit_bias=settings.refit_bias,
        shrink=settings.shrink,
        solver=solve,
        device=settings.solve_device,
        processes=processes,
        owner=owner,
        track=track,
    )
    budget = _budget(sizes, shares)
    if divides:
        units = {name: sum(shape) for name, shape in sizes.items()}
        ranks = allocate_ranks_and_rows(losses, units, budget, processes)
        losses.clear()
    else:
        ranks = processes.run_on_first(lambda: _ranks(solutions, settings, shares, sizes, budget))
    held = tuple(optimizers)

    def put(name: str, found: Found | None) -> None:
        factors = found[0] if found else None
        assert factors is None or isinstance(factors, Factors)
        _put(model, name, factors, ranks[name], shares, held)

    install_factors_(model, solutions, ranks, put, held)
    like = {name: view(model.get_submodule(name)).parameters[0] for name in names}
    known = {name: one.mean for name, one in solutions.measured.items()}
    means = {name: mean.to(like[name]) for name, mean in known.items() if mean is not None}
    return means, _quotas(sizes, ranks, shares)


def growth(model: nn.Module, names: Iterable[str], shares: LoSparseBudget) -> int:
    """Return at most how many parameters splitting adds: factors, beside all that is pruned later.

    Args:
        model: with dense layers of these names.
        names: of the layers.
        shares: what will remain.
    """
    sizes = [view(model.get_submodule(name)).shape for name in names]
    dense = sum(map(math.prod, sizes))
    if shares.start_rank is not None:
        factors = sum(math.ceil(shares.start_rank * min(shape)) * sum(shape) for shape in sizes)
    else:
        share = 1.0 if shares.low_rank_share == AUTO else float(shares.low_rank_share)
        factors = math.ceil(shares.keep * share * dense) + sum(map(sum, sizes))  # ranks are whole
    return factors if shares.sparse else max(0, factors - dense)


def check_dense(model: nn.Module, names: Iterable[str]) -> None:
    """Check that layers are dense, as splitting needs them.

    Raises:
        LayerError: if one is factored already.
    """
    for name in names:
        if isinstance(model.get_submodule(name), Replacement):
            raise LayerError(
                f"layer {name!r} is factored already; LoSparse starts from dense layers: leave "
                "it out with exclude=, or use one of Factorize and LoSparse"
            )


def _budget(sizes: Sizes, shares: LoSparseBudget) -> int:
    """Return the number of parameters that remain.

    Raises:
        SettingError: if they are less than one rank a layer takes.
    """
    total = sum(map(math.prod, sizes.values()))
    budget, least = math.floor(shares.keep * total + 1e-6), sum(map(sum, sizes.values()))
    if budget < least:
        raise SettingError(
            f"keep={shares.keep:g} leaves {budget:,} of {total:,} parameters, but one rank and no "
            f"row in each of {len(sizes)} layers take {least:,}; the least keep is "
            f"{math.ceil(least / total * 1e4) / 1e4:.4f}"
        )
    return budget


def _ranks(
    solutions: Solutions, settings: Settings, shares: LoSparseBudget, sizes: Sizes, budget: int
) -> dict[str, int]:
    """Return the rank with which every layer starts."""
    if shares.start_rank is not None:
        return {n: math.ceil(shares.start_rank * min(s) - 1e-9) or 1 for n, s in sizes.items()}
    part = shares.keep * float(shares.low_rank_share)
    ranks = {n: math.ceil(part * math.prod(s) / sum(s) - 1e-9) or 1 for n, s in sizes.items()}
    if settings.spread == "uniform" and sum(r * sum(sizes[n]) for n, r in ranks.items()) <= budget:
        return ranks
    asked = [
        Candidate(name, *sizes[name], energies=one.curve, highest=(min(sizes[name]) + 1) // 2)
        for name, one in solutions.measured.items()
    ]
    least = sum(map(sum, sizes.values())) / sum(map(math.prod, sizes.values()))
    shared = allocate(asked, max(part, least), settings.spread)
    return {name: rank or 1 for name, rank in shared.items()}


def _row_losses(weight: Tensor, metric: Metric, truncation: Truncation) -> Tensor:
    """Return the predicted loss by every row at every rank, ``(most + 1, out)``, on the CPU."""
    most = max(1, weight.numel() // sum(weight.shape))
    rows = row_energies(weight, metric.output, metric.input, truncation, most)
    return (0.5 * (metric.loss_scale or 0.0) * rows).float().cpu()


def _put(
    model: nn.Module,
    name: str,
    factors: Factors | None,
    rank: int,
    shares: LoSparseBudget,
    optimizers: Sequence[Optimizer],
) -> None:
    """Replace a layer by a split one; if it was not solved here, one to receive its values."""
    layer = model.get_submodule(name)
    old = view(layer)
    new = LowRankSparseLinear.in_place_of(layer, rank, None if shares.sparse else 0)
    fresh = (new.inner.weight, new.left.weight)
    carry = carry_later(fresh)
    if factors is not None:
        new.left.weight.copy_(factors.left)
        new.right.copy_(factors.right)
        if shares.sparse:
            new.rows.copy_(double(old.weight) - double(factors.left) @ double(factors.right))
        carry = carry_sparse(factors.left, factors.right, old.transposed, rows=shares.sparse)
    replace_(model, name, new)
    tied = any(parameter is old.parameters[0] for parameter in model.parameters())
    swap_parameters_(
        optimizers,
        old.parameters,
        fresh,
        carry,
        names=("inner.weight", "left.weight"),
        staying=tied,
        exact_from=rank,
    )


def _quotas(sizes: Sizes, ranks: Mapping[str, int], shares: LoSparseBudget) -> list[Quota]:
    dense = sum(map(math.prod, sizes.values()))
    factors = sum(rank * sum(sizes[name]) for name, rank in ranks.items())
    budget = math.floor(shares.keep * dense + 1e-6)
    if shares.keep == 1:
        return []
    if shares.competes:
        return [Quota(("components", "rows"), factors + dense, budget)]
    quotas = []
    low_rank = factors
    if shares.start_rank is not None:
        share = 1.0 if not shares.sparse else shares.low_rank_share
        low_rank = min(factors, math.floor(budget * float(share) + 1e-6))
        quotas.append(Quota(("components",), factors, low_rank))
    if shares.sparse:
        quotas.append(Quota(("rows",), dense, max(0, budget - low_rank)))
    return quotas


def preview(
    model: nn.Module, settings: Settings, shares: LoSparseBudget
) -> tuple[list[LayerRecord], Selection, int]:
    """Return the records if every layer kept the same share, and the bytes of statistics.

    Nothing is observed or changed. Scores share the same parameters out otherwise.

    Raises:
        SettingError: if ``keep`` is less than one rank a layer takes.
        LayerError: if a targeted layer is factored already.
    """
    selection = settings.select(model)
    check_dense(model, selection.names)
    _budget({name: view(model.get_submodule(name)).shape for name in selection.names}, shares)
    share = 0.5 if shares.low_rank_share == AUTO else float(shares.low_rank_share)
    records = []
    for name in selection.names:
        out_features, in_features = view(model.get_submodule(name)).shape
        kept, unit = shares.keep * out_features * in_features, out_features + in_features
        rank = max(1, round(share * kept / unit))
        rows = min(out_features, max(0, int((kept - rank * unit) / in_features)))
        records.append(LayerRecord(name, out_features, in_features, rank, None, None, rows=rows))
    recorder = Recorder(model, selection.names, METHODS[settings.method].kinds)
    return records, selection, recorder.nbytes
