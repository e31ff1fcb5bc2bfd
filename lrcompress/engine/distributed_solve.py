"""Distributed solve: each process solves some of the layers, all receive the results.

One process alone solves all layers and communicates nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.progress import Track, untracked
from lrcompress.errors import naming_layer
from lrcompress.linalg import noted_retries
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.objective import Metric, metric_of
from lrcompress.report.record import LayerRecord
from lrcompress.solvers.kronecker import KroneckerFactors, KroneckerSums, Sizes
from lrcompress.solvers.truncation import Factors, Truncation, relative_error, truncate
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view
from lrcompress.structure.transaction import PutAway, all_or_nothing, undone

Found = tuple[Factors | KroneckerFactors, Metric]
# Solves a layer of that name, with that weight, in a metric; None where nothing is smaller.
Solver = Callable[[str, Tensor, Metric], Truncation | KroneckerSums | None]
# Multiply-adds of a product that take as long as one of an eigendecomposition.
_EIGEN = 25
_SHOWN = 20  # ranks of an error curve that are kept for the report


@dataclass(frozen=True)
class LayerSummary:
    """Error curve and metric of a solved layer, small enough to send to every process.

    Attributes:
        energies: of its truncation, on the CPU.
        loss_scale: of its metric.
        note: of its metric, and of solvers that failed at first.
        mean: of its metric, on the CPU.
        unit: parameters of one rank or term; 0 is those of a column and a row.
        first: sizes of the first factor of a sum of Kronecker products.
    """

    energies: Tensor
    loss_scale: float | None
    note: str
    mean: Tensor | None
    unit: int = 0
    first: Sizes | None = None

    @property
    def curve(self) -> Tensor:
        """What each further rank saves: of the loss, where the metric knows it."""
        return self.energies * (1.0 if self.loss_scale is None else self.loss_scale)

    def error(self, rank: int | None) -> float:
        """Return the relative error of a truncation to a rank; None is the layer itself."""
        return 0.0 if rank is None else relative_error(self.energies, rank)

    def loss(self, rank: int | None) -> float | None:
        """Return the increase of the loss that is predicted for a rank; None if it is not."""
        if rank is None:
            return 0.0
        scale = self.loss_scale
        return None if scale is None else 0.5 * scale * float(self.energies[rank:].sum())

    def record(
        self,
        name: str,
        shape: tuple[int, int],
        rank: int | None,
        note: str = "",
        reached: tuple[float, float] | None = None,
        stood: int | None = None,
        parameters: int | None = None,
        narrow: tuple[int, int] | None = None,
    ) -> LayerRecord:
        """Return what became of the layer at ``rank``, with some of its error curve.

        Args:
            name: of the layer.
            shape: ``(out, in)``.
            rank: of its factors; None if it stays dense.
            note: added to that of the metric.
            reached: the relative error and the squared one, where they are known better than
                from the energies.
            stood: parameters that stood there before, where it was not dense.
            parameters: of what stands there now, where it is no pair of factors.
            narrow: inner features that are left, and of how many, where it has lost some.
        """
        most = len(self.energies)
        shown = {round(most ** (i / (_SHOWN - 1))) for i in range(_SHOWN)} if most else ()
        if narrow:  # the curves of such layers are over features
            shown = set()
        # six digits: a report is read by people
        curve = tuple((r, float(f"{self.error(r):.6g}")) for r in sorted(shown))
        error, loss = self.error(rank), self.loss(rank)
        if rank is not None and reached is not None:
            error = reached[0]
            loss = None if self.loss_scale is None else 0.5 * self.loss_scale * reached[1]
        notes = "; ".join(filter(None, (self.note, note)))
        first = None if rank is None else self.first
        given = (name, *shape, rank, error, loss, notes)
        now = {"stood": stood, "parameters": parameters, "narrow": narrow}
        return LayerRecord(*given, curve=curve, first=first, **now)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SolvedLayer:
    """A layer that this process has solved.

    Attributes:
        truncation: of its weight, of all ranks that may be asked for; None where no factors would
            be smaller, and where only :class:`LayerSummary` was kept.
        metric: what it was measured in, without what is large; its note tells of solvers too.
    """

    truncation: Truncation | KroneckerSums | None
    metric: Metric


@dataclass(frozen=True)
class Solutions:
    """Solved layers of a model, before any of them is replaced.

    Attributes:
        processes: the processes.
        owner: which of them solves a layer.
        own: the layers that this process has solved. They are taken out as they are replaced.
        measured: all layers.
        solve: solves a layer of that name and weight once more: nothing of sums of Kronecker
            products is kept, which need the metric to be cut.
    """

    processes: Processes
    owner: Mapping[str, int]
    own: dict[str, SolvedLayer]
    measured: Mapping[str, LayerSummary]
    solve: Callable[[str, Tensor], SolvedLayer]

    def rounds(self, names: Iterable[str]) -> list[list[str]]:
        """Return layers round by round, in each at most one of every process."""
        return self.processes.rounds({name: self.owner[name] for name in names})


def solve_layers(
    model: nn.Module,
    names: Sequence[str],
    statistics: Statistics,
    method: str,
    *,
    refit_bias: bool,
    shrink: tuple[float, float],
    most: Mapping[str, int] | None = None,
    solver: Solver | None = None,
    device: str | None = None,
    processes: Processes = ONE_PROCESS,
    owner: Mapping[str, int] | None = None,
    track: Track = untracked,
) -> Solutions:
    """Solve layers in the metric of a method, for all ranks at once, each in one process.

    Args:
        model: the same in all processes.
        names: of its layers.
        statistics: the same in all processes, or of the layers that each owns.
        method: a key of :data:`lrcompress.objective.METHODS`.
        refit_bias: let biases take up the mean error, where there are any.
        shrink: shares of their mean diagonal mixed into the input and the output metric.
        most: the greatest ranks that will be asked for; by default those up to which factors are
            smaller than a weight, and the rank of a layer that is factored already.
        solver: of a layer; by default all low-rank truncations.
        device: where layers are solved; by default where each lies.
        processes: the processes.
        owner: which of them solves a layer; by default the work is shared out.
        track: yields the layers of this process while they are solved, as a progress bar does.

    Raises:
        ObservationError: if a statistic that the method needs is missing.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.
        PlatformError: if another process failed for a reason outside this package.

    Cost:
        Of every layer that this process solves ``most·(out + in)`` values stay, on the CPU: over
        all processes as much as the weights themselves. While a layer is solved some ten float64
        matrices of its larger side are there, beside the statistics.
    """
    owner = owner or processes.assign({n: solving_cost(model.get_submodule(n)) for n in names})

    def of_layer(name: str, weight: Tensor) -> SolvedLayer:
        layer = model.get_submodule(name)
        refit = refit_bias and view(layer).bias is not None
        there = weight.to(device)
        metric = metric_of(
            method, statistics, name, refit_bias=refit, shrink=shrink, device=there.device
        )
        with naming_layer(name), noted_retries() as told:
            found = (solver or low_rank)(name, there, metric)
        if isinstance(found, Truncation):
            found = replace(found, like=weight.new_empty(()))
        note = "; ".join(filter(None, (metric.note, *told)))
        return SolvedLayer(found, replace(metric, output=None, input=None, note=note))

    def low_rank(name: str, weight: Tensor, metric: Metric) -> Truncation:
        limit = greatest_rank(model.get_submodule(name)) if most is None else most[name]
        return truncate(weight, metric.output, metric.input, most=limit)

    own: dict[str, SolvedLayer] = {}
    found: dict[str, LayerSummary] = {}

    def work(weights: dict[str, Callable[[], Tensor]]) -> dict[str, LayerSummary]:
        solved: dict[str, LayerSummary] = {}
        for name in track(list(weights), "solving"):
            weight = weights.pop(name)()
            one = of_layer(name, weight)
            solved[name] = _summary(one, weight.numel())
            kept = isinstance(one.truncation, Truncation)
            own[name] = one if kept else replace(one, truncation=None)
        return solved

    for turn in solving_rounds({name: owner[name] for name in names}, processes):
        weights = own_weights(model, turn, owner, processes)
        for part in processes.run_on_all(partial(work, weights)):
            found |= part
    return Solutions(processes, owner, own, {name: found[name] for name in names}, of_layer)


def solving_rounds(owner: Mapping[str, int], processes: Processes) -> list[list[str]]:
    """Return layers in the rounds in which they are solved, from the process of each.

    All at once where parameters are whole. Where layers have to be gathered, round by round, since
    rounds wait for each other: one layer of each process.
    """
    return processes.rounds(owner) if processes.sharded else [[*owner]]


def own_weights(
    model: nn.Module, turn: Sequence[str], owner: Mapping[str, int], processes: Processes
) -> dict[str, Callable[[], Tensor]]:
    """Return what gives the weights of this process's layers; of factored ones, multiplied out.

    A collective call where parameters are sharded; then the weights are whole, and are held.

    Args:
        model: whose layers they are.
        turn: names of layers.
        owner: which process solves a layer.
        processes: the processes.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for name in turn:
        with processes.gathered(model, name):
            if owner[name] == processes.index:
                layer = model.get_submodule(name)
                whole = view(layer).weight if processes.sharded else None
                found[name] = partial(_weight, layer, whole)
    return found


def _weight(layer: nn.Module, whole: Tensor | None) -> Tensor:
    return view(layer).weight if whole is None else whole


def greatest_rank(layer: nn.Module, *, pivoted: bool = False) -> int:
    """Return up to which rank factors of a layer are of use, or the rank that it has already.

    Args:
        layer: dense or low-rank.
        pivoted: whether they are stored as pivoted rows, of which every rank is.

    Example:
        >>> greatest_rank(nn.Linear(30, 20))  # 12 ranks take 600 parameters, as the weight does
        12
    """
    shape = view(layer).shape
    if pivoted:
        return min(shape)
    useful = max(1, min(*shape, -(-math.prod(shape) // sum(shape))))
    return max(useful, layer.rank) if isinstance(layer, LowRankLinear | PivotedLinear) else useful


def _summary(one: SolvedLayer, dense: int) -> LayerSummary:
    metric, mean = one.metric, one.metric.mean
    mean = None if mean is None else mean.cpu()
    known, found = (metric.loss_scale, metric.note, mean), one.truncation
    if isinstance(found, KroneckerSums):
        return LayerSummary(found.energies.cpu(), *known, found.unit, found.shape)
    if found is None:
        return LayerSummary(torch.zeros(0), *known, dense)
    return LayerSummary(found.energies.cpu(), *known)


def solving_cost(layer: nn.Module) -> float:
    """Return roughly what solving a layer takes, in multiply-adds of a product."""
    shape = view(layer).shape
    smaller, larger = sorted(shape)
    return float(_EIGEN * smaller**3 + 2 * math.prod(shape) * (smaller + larger))


def install_factors_(
    model: nn.Module,
    solutions: Solutions,
    ranks: Mapping[str, int],
    put: Callable[[str, Found | None], None],
    optimizers: Sequence[Optimizer],
    *,
    away: bool = True,
) -> dict[str, tuple[float, float]]:
    """Replace layers by their factors, the same in all processes.

    Args:
        model: changed in place.
        solutions: the layers, solved.
        ranks: of the factors of each.
        put: puts what was found for a layer in its place; where another process has found it,
            a layer of the same structure, whose values and optimizer state are sent.
        optimizers: whose parameters and state follow.
        away: move what was replaced to the CPU; otherwise it stays as it is.

    Returns:
        The relative and the squared error of each layer's factors.
    """
    # where parameters are sharded, a layer that was open cannot be put back
    sharded = solutions.processes.sharded
    guard = None if sharded else all_or_nothing(model, ranks, optimizers)
    with guard or nullcontext() as put_away:
        return _install_(model, solutions, ranks, put, optimizers, put_away if away else None)


@contextmanager
def factors_on_trial(
    model: nn.Module,
    solutions: Solutions,
    ranks: Mapping[str, int],
    put: Callable[[str, Found | None], None],
) -> Iterator[None]:
    """Replace layers by their factors for the time of the block, the same in all processes.

    The solutions stay for others. Parameters are whole: sharded ones could not be put back.

    Args:
        model: as it was after the block.
        solutions: the layers, solved.
        ranks: of the factors of each.
        put: as of :func:`install_factors_`, with no optimizers.
    """
    with undone(model, ranks) as put_away:
        held = replace(solutions, own=dict(solutions.own))
        _install_(model, held, ranks, put, (), put_away)
        yield


def _install_(
    model: nn.Module,
    solutions: Solutions,
    ranks: Mapping[str, int],
    put: Callable[[str, Found | None], None],
    optimizers: Sequence[Optimizer],
    put_away: PutAway | None,
) -> dict[str, tuple[float, float]]:
    processes = solutions.processes
    reached: dict[str, tuple[float, float]] = {}
    for turn in solutions.rounds(ranks):
        again = [name for name in turn if solutions.measured[name].first]
        weights = own_weights(model, again, solutions.owner, processes)
        found: dict[str, Found] = {}
        work = partial(_cut, solutions, turn, ranks, weights, found)
        for part_reached in processes.run_on_all(work):
            reached |= part_reached
        for part in [[name] for name in turn] if processes.sharded else [turn]:
            with processes.unsharded(model, part, optimizers):
                for name in part:
                    put(name, found.pop(name, None))
                broadcast_layers_(
                    model, {name: solutions.owner[name] for name in part}, optimizers, processes
                )
        if put_away is not None:
            put_away(turn)
    return reached


def _cut(
    solutions: Solutions,
    turn: Iterable[str],
    ranks: Mapping[str, int],
    weights: dict[str, Callable[[], Tensor]],
    found: dict[str, Found],
) -> dict[str, tuple[float, float]]:
    """Put the factors of this process's layers of a turn into ``found``, and return the errors."""
    for name in solutions.own.keys() & set(turn):
        one = solutions.own.pop(name)
        if name in weights:
            one = solutions.solve(name, weights.pop(name)())
        assert one.truncation is not None, "it has been left dense"
        found[name] = (one.truncation.factors(ranks[name]), one.metric)
    return {name: (one.error, one.lost) for name, (one, _) in found.items()}


@torch.no_grad()
def broadcast_layers_(
    model: nn.Module,
    owner: Mapping[str, int],
    optimizers: Iterable[Optimizer],
    processes: Processes,
) -> None:
    """Broadcast tensors and optimizer state of layers from the processes that solved them.

    Args:
        model: of the same structure in all processes.
        owner: layer name to the process whose values count.
        optimizers: with state of the same kinds in all processes.
        processes: the processes.
    """
    if processes.size == 1:
        return
    held = tuple(optimizers)
    for source in range(processes.size):
        tensors: list[Tensor] = []
        for name in (name for name, whose in owner.items() if whose == source):
            layer = model.get_submodule(name)
            for parameter in layer.parameters():
                tensors.append(parameter)
                tensors += _state(held, parameter)
            tensors += layer.buffers()
        processes.broadcast_(tensors, source)


def _state(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for optimizer in optimizers:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        found += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
    return found
