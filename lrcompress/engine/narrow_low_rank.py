"""Low rank on top of narrowed blocks: what it would lose, and the layers that have it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.budget import Candidate, cost, match_bounds, pivoted_costs
from lrcompress.distributed import Processes
from lrcompress.engine.distributed_solve import (
    Found,
    install_factors_,
    own_weights,
    solve_layers,
    solving_rounds,
)
from lrcompress.engine.factored_layers import is_pivoted, put_factors
from lrcompress.engine.settings import Settings
from lrcompress.linalg import double, whitening
from lrcompress.nn import PrunedLinear
from lrcompress.objective import Metric, metric_of
from lrcompress.solvers.narrowing import Narrowings
from lrcompress.solvers.truncation import FLOOR, rank_energies, relative_error
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.narrowed import NarrowedStatistics
from lrcompress.statistics.views import view
from lrcompress.structure.feed_forward import Block

_WIDTHS = 8  # of inner features are tried, at even distances


def tried_widths(features: int, align: int, *, narrow: bool) -> list[int]:
    """Return the numbers of inner features at which layers may have low rank too.

    Args:
        features: that there are now.
        align: what they are multiples of.
        narrow: whether the block is narrowed already, and may stay as wide as it is.

    Example:
        >>> tried_widths(1536, 8, narrow=False)
        [192, 384, 576, 768, 960, 1152, 1344]
        >>> tried_widths(20, 8, narrow=True)
        [8, 16, 20]
    """
    steps = [features * i // _WIDTHS // align * align for i in range(1, _WIDTHS)]
    return [k for k in sorted({*steps}) if k] + ([features] if narrow else [])


@dataclass(frozen=True)
class Problems:
    """Weights of layers and the metrics that errors of theirs are measured in.

    Attributes:
        model: whose layers they are.
        statistics: of the layers as they are.
        settings: the method and what goes with it.
    """

    model: nn.Module
    statistics: Statistics
    settings: Settings

    def of(
        self, name: str, statistics: Statistics | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Metric]:
        """Return the weight and the metric of a layer.

        Args:
            name: of the layer.
            statistics: of what is left of it; by default of all.
            weight: of the layer, in full; by default as it has it.

        Raises:
            ObservationError: if a statistic that the method needs is missing.
            NotFiniteError: if a statistic holds a NaN or an infinity.
        """
        layer = view(self.model.get_submodule(name))
        settings = self.settings
        weight = (layer.weight if weight is None else weight).to(settings.solve_device)
        return weight, metric_of(
            settings.method,
            statistics or self.statistics,
            name,
            refit_bias=settings.refit_bias and layer.bias is not None,
            shrink=settings.shrink,
            device=weight.device,
        )


def rank_curves(
    problems: Problems,
    name: str,
    kept: Mapping[int, Tensor],
    reads: Narrowings | None,
    weight: Tensor | None = None,
) -> dict[int, Tensor]:
    """Return what each rank saves of a layer whose block is narrowed, by the width of the block.

    Args:
        problems: the layers as they are.
        name: of one of them.
        kept: the inner features that are left, by their number.
        reads: the narrowings of the layer, if it is the one that reads the features.
        weight: of the layer, in full; by default as it has it.

    Returns:
        ``(min(out, in),)`` falling, in predicted loss as far as the metric knows it.

    Cost:
        For every width that of solving for it, and the eigenvalues of a square matrix of what the
        layer's side that stays has; one root of the metric of that side.
    """
    weight, metric = problems.of(name, weight=weight)
    apply, _ = whitening(metric.input if reads is None else metric.output, FLOOR)
    whole = apply(double(weight).mT) if reads is None else None  # (W Q)ᵀ
    found = {}
    for k, features in kept.items():
        rows, columns = ({name: features}, {}) if reads is None else ({}, {name: features})
        own = NarrowedStatistics(whole=problems.statistics, rows=rows, columns=columns)
        _, left = problems.of(name, own, weight)
        if whole is not None:
            curve = rank_energies(whole[:, features.to(whole.device)], left.output)
        else:
            assert reads is not None
            narrow = reads.solved(weight, metric.input, k).weight
            curve = rank_energies(apply(double(narrow)), left.input)
        found[k] = curve.cpu() * (1.0 if left.loss_scale is None else left.loss_scale)
    return found


@dataclass(frozen=True)
class NarrowedRanks:
    """Layers of narrowed blocks, solved for all ranks at some widths.

    Attributes:
        problems: the layers as they are.
        curves: what each rank saves, by block, width and layer, as :func:`rank_curves` gives it.
    """

    problems: Problems
    curves: Mapping[str, Mapping[int, Mapping[str, Tensor]]] = field(default_factory=dict)

    def candidates(
        self, down: str, width: int, whole: int, keep_range: tuple[float, float]
    ) -> list[Candidate]:
        """Return the layers of a block of that width as candidates for ranks.

        Args:
            down: the block.
            width: how many of its inner features are left.
            whole: how many there are in the architecture.
            keep_range: least and greatest keep any one layer may get.
        """
        settings, found = self.problems.settings, []
        for name, curve in self.curves[down][width].items():
            layer = self.problems.model.get_submodule(name)
            rows, columns = view(layer).shape
            shape, other = ((rows, width), rows) if name == down else ((width, columns), columns)
            costs = pivoted_costs(*shape) if is_pivoted(layer, settings) else ()
            lowest, highest = match_bounds(keep_range, *shape, None, costs, whole * other)
            given = {"lowest": lowest, "highest": highest, "costs": costs, "whole": whole * other}
            found.append(Candidate(name, *shape, curve, **given))  # type: ignore[arg-type]
        return found

    def parameters(self, down: str, width: int, name: str, rank: int) -> int:
        """Return the parameters of a layer's factors of that rank."""
        layers = {x.name: x for x in self.candidates(down, width, width, (0.0, 1.0))}
        return cost(layers[name], rank)

    def tail(self, down: str, width: int, name: str, rank: int | None) -> float:
        """Return what a layer's factors lose, twice the predicted loss."""
        curve = self.curves[down][width][name]
        return 0.0 if rank is None else float(curve[rank:].sum())

    def error(self, down: str, width: int, name: str, rank: int) -> float:
        """Return the relative error of a layer's factors."""
        return relative_error(self.curves[down][width][name], rank)

    def factor_(
        self,
        ranks: Mapping[str, int],
        kept: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        optimizers: Sequence[Optimizer],
        processes: Processes,
        owner: Mapping[str, int],
        *,
        pivoted: bool,
    ) -> None:
        """Give layers whose blocks have been narrowed low rank, the same in all processes.

        Args:
            ranks: of the factors of each.
            kept: which of a layer's outputs, and which of its inputs, are left.
            optimizers: whose parameters and state follow.
            processes: the processes.
            owner: which of them solves a layer.
            pivoted: whether the factors are stored as pivoted rows.

        Cost:
            That of solving the layers; their solutions are let go after it.
        """
        model, settings = self.problems.model, self.problems.settings
        rows, columns = kept
        statistics = NarrowedStatistics(whole=self.problems.statistics, rows=rows, columns=columns)
        solutions = solve_layers(
            model,
            [*ranks],
            statistics,
            settings.method,
            refit_bias=settings.refit_bias,
            shrink=settings.shrink,
            most=ranks,
            device=settings.solve_device,
            processes=processes,
            owner={name: owner[name] for name in ranks},
        )

        def put(name: str, found: Found | None) -> None:
            stored = pivoted and is_pivoted(model.get_submodule(name), settings)
            put_factors(model, name, ranks[name], None, found, optimizers, pivoted=stored)

        install_factors_(model, solutions, ranks, put, optimizers)


def solve_ranks(
    problems: Problems,
    blocks: Mapping[str, Block],
    own: Mapping[str, Narrowings],
    owner: Mapping[str, int],
    processes: Processes,
) -> NarrowedRanks:
    """Solve the layers of blocks for all ranks at some widths, each in one process.

    Args:
        problems: the layers as they are.
        blocks: by the layer that reads the inner features.
        own: the narrowings of those that this process has solved.
        owner: which process solves a layer.
        processes: the processes.

    Cost:
        :func:`rank_curves` for every layer.
    """

    def told() -> dict[str, dict[int, Tensor]]:
        kept = {}
        for down, found in own.items():
            layer = problems.model.get_submodule(down)
            narrow = isinstance(layer, PrunedLinear)
            widths = tried_widths(view(layer).shape[1], problems.settings.align, narrow=narrow)
            kept[down] = {k: found.kept(k) for k in widths}
        return kept

    kept: dict[str, dict[int, Tensor]] = {}
    for part in processes.run_on_all(told) if blocks else ():
        kept |= part

    block_of = {name: down for down, block in blocks.items() for name in block.names}

    def work(weights: dict[str, Callable[[], Tensor]]) -> dict[str, dict[int, Tensor]]:
        found = {}
        for name, weight in weights.items():
            down = block_of[name]
            reads = own[down] if name == down else None
            found[name] = rank_curves(problems, name, kept[down], reads, weight())
        return found

    found: dict[str, dict[int, Tensor]] = {}
    for turn in solving_rounds({name: owner[name] for name in block_of}, processes):
        weights = own_weights(problems.model, turn, owner, processes)
        for part in processes.run_on_all(partial(work, weights)):
            found |= part
    curves = {
        down: {k: {name: found[name][k] for name in block.names} for k in kept[down]}
        for down, block in blocks.items()
    }
    return NarrowedRanks(problems, curves)
