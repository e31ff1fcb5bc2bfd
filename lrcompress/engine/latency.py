"""Sizes chosen by the time that the whole model takes, in place of its parameters.

The time of a layer at every rank, and of a feed-forward block at every width, is measured and takes
the place of parameters in the budget. What the layers may take together follows from the time of
the whole model; it is measured with the sizes in place, and put right by what that shows.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.bench.latency_ranks import RankChoice
from lrcompress.bench.layer_times import UNIT, LayerTimes
from lrcompress.bench.timing import now, ratio
from lrcompress.budget import Candidate, allocate, cost
from lrcompress.distributed import Processes
from lrcompress.engine.block_budget import RankedWidth, allocate_with_blocks
from lrcompress.engine.block_runs import evaluating, standing_in
from lrcompress.engine.passes import Passes, random_state_kept
from lrcompress.engine.solved_model import Sizes, SolvedModel
from lrcompress.errors import ObservationError, SettingError
from lrcompress.report.record import PointRecord
from lrcompress.report.trials import LatencyRecord, LatencyTrial
from lrcompress.statistics.batches import batch_shape, resized_batch
from lrcompress.statistics.views import view

_AIM = 0.985  # of the time asked for, which noise is to leave within it
_NEAR = 0.96  # of the time asked for, that is near enough; what is asked for is, of a near miss
_TRIALS = 6
_ROUNDS = 9
_HALVINGS = 12  # of a share of time, until it is possible or small enough

T = TypeVar("T")
Tell = Callable[[str], object]


def choose_and_install_(
    solved: SolvedModel,
    optimizers: Sequence[Optimizer] = (),
    step: int | None = None,
    passes: Passes | None = None,
    tell: Tell = str,
) -> PointRecord:
    """Choose sizes by the settings' ``keep``, ``latency`` or both, and replace the layers.

    Where ``latency`` cannot be reached, the layers stay as they are, with a warning.

    Arguments and errors are those of :meth:`SolvedModel.install_` and :func:`choose_by_latency`.
    """
    if solved.settings.latency is None:
        return solved.install_(solved.choose(), optimizers, step, passes)
    sizes, found = choose_by_latency(solved, passes, tell)
    if sizes is None and solved.processes.index == 0:
        warnings.warn(f"lrcompress: {found.note}", stacklevel=2)
    record = solved.install_(sizes, optimizers, step, passes)
    record.latency = found
    record.note = "; ".join(filter(None, (found.note, record.note)))
    return record


@torch.no_grad()
def choose_by_latency(
    solved: SolvedModel, passes: Passes | None, tell: Tell = str
) -> tuple[Sizes | None, LatencyRecord]:
    """Return the sizes with which the whole model takes ``latency`` of the time it takes now.

    They minimise the predicted loss, or keep the same share of every layer's time where the
    allocation is uniform, under a budget of measured time: of the layers, and of a pass of the
    model in evaluation mode, eager, without gradients, in the context of the passes. Where they
    take more than ``keep`` of the parameters, the budget is less.

    Args:
        solved: the model, as it is.
        passes: of the model, on whose first batch it is measured.
        tell: is told of each trial.

    Returns:
        The sizes, and what was measured. Where even the least that are possible take longer, those
        that are fastest, if the miss is small; else None, for the layers to stay as they are.

    Raises:
        SettingError: if there are no passes, parameters are sharded, or ``keep`` cannot be met.
        ObservationError: if there is no batch, or no tensor in it.

    Cost:
        Up to eight trials of 20 passes of the model; of each size of layer some 40 passes.
    """
    if passes is None:
        raise SettingError("latency is measured on a batch that the model reads, and there is none")
    check_unsharded(solved.processes)
    with random_state_kept(solved.model):
        return _chosen(solved, passes, tell)


def _chosen(solved: SolvedModel, passes: Passes, tell: Tell) -> tuple[Sizes | None, LatencyRecord]:
    whole = _Whole(replace(solved, train_balanced=False), passes)
    asked = solved.settings.latency
    assert asked is not None
    trials: list[tuple[Sizes, LatencyTrial]] = []

    def tried(sizes: Sizes) -> float:
        trials.append((sizes, LatencyTrial(solved.kept(sizes), whole.measured(sizes))))
        tell(
            f"latency: {trials[-1][1].measured:.3f} of the time before with "
            f"{trials[-1][1].kept:.3f} of the parameters, {asked:g} asked"
        )
        return trials[-1][1].measured

    enough = solved.settings.keep is not None and tried(solved.choose()) <= asked
    if not enough:
        rows = whole.rows()
        budget = solved.processes.run_on_first(lambda: _priced(solved, whole, rows))
        _search(solved, budget, asked, tried)
    within = [x for x in trials if x[1].measured <= asked]
    fastest = min(trials, key=lambda x: x[1].measured)
    sizes, best = max(within, key=lambda x: x[1].measured) if within else fastest
    given = best.measured, whole.shape, whole.seconds, tuple(one for _, one in trials)
    taken = best.measured * _NEAR <= asked
    return sizes if taken else None, LatencyRecord(asked, *given, taken=taken)


def _search(
    solved: SolvedModel, budget: "_Budget", asked: float, tried: Callable[[Sizes], float]
) -> None:
    """Try shares of the layers' time until the whole model takes nearly what was asked.

    Where none takes as little as that, the least sizes are tried at last.
    """
    low, high = 0.0, 1.0  # shares that are known to be too small, and too large
    share = budget.share_for(_AIM * asked)
    known: dict[object, float] = {}
    for _ in range(2 * _TRIALS):
        sizes, share, capped = budget.sizes(solved, share)
        if sizes.key not in known:
            if len(known) == _TRIALS:
                break
            known[sizes.key] = tried(sizes)
        measured = known[sizes.key]
        if _NEAR * asked <= measured <= asked or (capped and measured <= asked):
            return
        if measured > asked:
            high = min(high, share)
        else:
            low = max(low, share)
        share += (_AIM * asked - measured) / budget.part
        if not low < share < high:
            share = (low + high) / 2
    least, *_ = budget.sizes(solved, 0.0)
    if min(known.values()) > asked and least.key not in known:
        tried(least)


def check_unsharded(processes: Processes) -> None:
    """Check that parameters are whole.

    Raises:
        SettingError: if each process has only a part of them.
    """
    if processes.sharded:
        raise SettingError(
            "latency puts layers in and takes them out again, of which each process has only a "
            "part under FSDP2; give keep in its place, or use strategy='ddp'"
        )


class _Whole:
    """The whole model, as it is now and with other sizes, measured on a batch.

    Args:
        solved: whose layers get the sizes, in the form that they are stored in.
        passes: of the model.
    """

    def __init__(self, solved: SolvedModel, passes: Passes) -> None:
        self.solved, self.passes = solved, passes
        self.batch: Any = None
        shape = solved.settings.latency_shape

        def start() -> tuple[int, ...]:
            batch = next(iter(passes.batches), None)
            if batch is None:
                raise ObservationError("latency: there is no batch to measure the model on")
            self.batch = batch if shape is None else resized_batch(batch, *shape)
            return batch_shape(self.batch)

        self.shape = self._everywhere(start)
        self.seconds, _ = self._in_turns({})

    def measured(self, sizes: Sizes) -> float:
        """Return the time with the sizes in place / the time without them, by calls in turns."""
        names, model = self.solved.names, self.solved.model
        with self.solved.on_trial(sizes):
            layers = {name: model.get_submodule(name) for name in names}
        return self._in_turns(layers)[1]

    def rows(self) -> dict[str, int]:
        """Return how many vectors each targeted layer reads in a pass, as far as it is called."""
        model, found = self.solved.model, dict.fromkeys(self.solved.names, 0)

        def count(name: str, inputs: int, _: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                found[name] += args[0].numel() // inputs

        with ExitStack() as hooks:
            for name in self.solved.names:
                layer = model.get_submodule(name)
                hook = partial(count, name, view(layer).shape[1])
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            self._everywhere(self._run)
        return {name: rows for name, rows in found.items() if rows}

    def _in_turns(self, layers: Mapping[str, nn.Module]) -> tuple[float, float]:
        """Return the seconds of a pass, and the time with other layers in place / that without."""

        def work() -> tuple[float, float]:
            pairs = [(self._timed({}), self._timed(layers)) for _ in range(_ROUNDS + 1)][1:]
            before = [before for before, _ in pairs]  # the first round was to warm up
            return median(before), ratio([after for _, after in pairs], before)

        return self._everywhere(work)

    def _everywhere(self, work: Callable[[], T]) -> T:
        """Return what the first process found; all do the same, for passes may communicate."""
        with evaluating(self.solved.model):
            return self.solved.processes.run_on_all(work)[0]

    def _timed(self, layers: Mapping[str, nn.Module]) -> float:
        with standing_in(self.solved.model, layers):
            start = now()
            self._run()
            return now() - start

    def _run(self) -> None:
        with self.passes.context():
            self.passes.run_alike(self.solved.model, self.batch)


@dataclass(frozen=True)
class _Budget:
    """Layers and blocks whose costs are times, and what they take of the model's.

    Attributes:
        layers: as candidates.
        blocks: as :func:`allocate_with_blocks` takes them.
        ranked: as it takes them.
        part: time of the layers that shares are of / that of the whole model.
        rest: time of the whole model without the targeted layers / that with them.
    """

    layers: Sequence[Candidate]
    blocks: dict[str, tuple[Candidate, tuple[str, ...]]]
    ranked: dict[str, list[RankedWidth]]
    part: float
    rest: float

    def share_for(self, asked: float) -> float:
        """Return the share of the layers' time with which the model takes ``asked`` of its own."""
        return min(1.0, max(0.0, (asked - self.rest) / self.part))

    def sizes(self, solved: SolvedModel, share: float) -> tuple[Sizes, float, bool]:
        """Return sizes for a share of the layers' time, their share, and if ``keep`` cut them.

        Where a share is too little for any sizes, the least that is not takes its place.
        """
        given = solved.processes.run_on_first(lambda: self._sizes(solved, share))
        sizes, share, capped = given
        return solved.choose() if sizes is None else sizes, share, capped

    def _sizes(self, solved: SolvedModel, share: float) -> tuple[Sizes | None, float, bool]:
        settings, keep = solved.settings, solved.settings.keep

        def at(share: float) -> Sizes | None:
            return self._allocated(share, settings.spread, settings.align)

        def too_large(sizes: Sizes | None) -> bool:
            return sizes is not None and keep is not None and solved.kept(sizes) > keep + 1e-9

        sizes = at(share)
        if sizes is None:
            _, share = _edge(lambda x: at(x) is not None, share, 1.0)
            sizes = at(share)
        if not too_large(sizes):
            return sizes, share, False
        share, _ = _edge(lambda x: too_large(at(x)), 0.0, share)
        return at(share), share, True

    def _allocated(self, share: float, spread: str, align: int) -> Sizes | None:
        """Return the sizes for a share of the layers' time; None where that is too little."""
        if not share:
            return None
        try:
            if not self.blocks:
                return Sizes(RankChoice(allocate(self.layers, share, spread, align)), {})
            given = self.layers, self.blocks, share, align, self.ranked
            ranks, widths = allocate_with_blocks(*given)
            return Sizes(RankChoice(ranks), widths)
        except SettingError:
            return None


def _edge(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return where a condition that holds at ``high`` begins to: just below it and just above."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def _priced(solved: SolvedModel, whole: _Whole, rows: Mapping[str, int]) -> _Budget:
    """Measure the layers and blocks at all their sizes."""
    settings, narrowing = solved.settings, solved.narrowing
    times, align = LayerTimes(solved.model, rows, whole.passes.context), settings.align
    asked = {one.name: one for one in solved.asked}
    timed = solved.track([*asked], "timing")
    layers = [_with_own_rank(asked[name], times, align) for name in timed]
    blocks = {}
    for down, (one, parts) in narrowing.candidates(settings.keep_range).items():
        names = narrowing.blocks[down].names
        shapes = {name: view(solved.model.get_submodule(name)).shape for name in names}
        sides = [(name, out if name == down else in_) for name, (out, in_) in shapes.items()]
        features, _ = narrowing.features(down)
        blocks[down] = times.priced_block(one, sides, features, align), parts
    ranked = {
        down: [replace(x, layers=[times.priced(y, align) for y in x.layers]) for x in widths]
        for down, widths in narrowing.ranked_widths(settings.keep_range).items()
    }
    standing = solved.standing.choice.ranks
    alone = [one for one, parts in blocks.values() if not parts]
    taken = sum(cost(one, standing[one.name]) for one in layers) + sum(x.dense for x in alone)
    total = sum(one.before for one in (*layers, *alone))
    seconds = whole.seconds / UNIT
    return _Budget(layers, blocks, ranked, total / seconds, max(0.0, 1 - taken / seconds))


def _with_own_rank(one: Candidate, times: LayerTimes, align: int) -> Candidate:
    """Return a layer with times for costs; a rank or a keep of its own means the same rank."""
    if one.rank is None and one.keep is None:
        return times.priced(one, align)
    rank = allocate([one], None)[one.name]
    found = times.priced(replace(one, rank=rank, keep=1.0 if rank is None else None), align)
    if rank is None:
        return found
    return replace(found, price=max(found.price, found.costs[rank] + 1))
