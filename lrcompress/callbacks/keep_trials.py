"""Shares of parameters that a search tries at a point, and what validation says of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lrcompress.engine.solved_model import Sizes, SolvedModel
from lrcompress.errors import SettingError
from lrcompress.keep_search import Target, grid_below, smallest_within
from lrcompress.report.trials import SearchRecord, TrialRecord

Figures = dict[str, float]
# Figures of sizes, None for those that stand, on a share of the validation data.
Measure = Callable[[Sizes | None, float], Figures]


@dataclass
class KeepTrials:
    """The trials of one point.

    Attributes:
        solved: the model as it is.
        target: what may be lost in the end.
        allowed: what may be lost here.
        monitor: name of the metric.
        standing: figures of the model as it is, on all validation data.
        measure: what sizes give.
        tried: ``keep`` to figures on all data; those of before, if the model was the same, and
            of these trials.
        most: passes over the validation data at most.
        tell: is told of each trial.
        trials: in their order.
    """

    solved: SolvedModel
    target: Target
    allowed: float
    monitor: str
    standing: Figures
    measure: Measure
    tried: dict[float, Figures]
    most: int
    tell: Callable[[TrialRecord], object] = str
    trials: list[TrialRecord] = field(default_factory=list)
    _lost: dict[tuple[object, float], float] = field(default_factory=dict, init=False)
    _asked: dict[object, float] = field(default_factory=dict, init=False)
    _worse: float = field(default=0.0, init=False)  # the present model, on a share of the data

    def search(self, share: float = 1.0) -> float | None:
        """Return the least keep that is within, of hundredths below the present one.

        Args:
            share: of the validation data, on which bisection begins where it is less than 1. From
                what that finds it goes on with all data, so the result was within on all.

        Returns:
            None where none was within, or what was is the model as it is.
        """
        grid = grid_below(self.solved.kept(self.solved.standing))
        now, guess = self.solved.standing.key, None
        lost = self.target.lost(self.standing[self.monitor])
        self._lost = {(now, 1.0): lost, (now, share): lost}
        if share < 1 and grid:
            part = self.measure(None, share)[self.monitor]
            self._worse = self.target.lost(part) - lost
            guess = self._least(grid, share)
        found = self._least(grid, 1.0, guess)
        key = self.solved.choose(grid[found]).key if found < len(grid) else now
        return None if key == now else self._asked[key]

    def _least(self, grid: Sequence[float], share: float, guess: int | None = None) -> int:
        def possible(number: int) -> bool:
            try:
                self.solved.choose(grid[number])
            except SettingError:  # less than layers take at least
                return False
            return True

        def may_try() -> bool:
            return sum(trial.share for trial in self.trials) < self.most

        def within(number: int) -> bool:
            return self._is_within(grid[number], share)

        return smallest_within(len(grid), possible, within, may_try, guess)

    def _is_within(self, keep: float, share: float) -> bool:
        """Return whether a keep is within; sizes are tried once, whatever keeps amount to them."""
        sizes = self.solved.choose(keep)
        known = (sizes.key, share)
        if known not in self._lost:
            value = self._figures(keep, sizes, share)[self.monitor]
            lost = self.target.lost(value) - (0.0 if share == 1 else self._worse)
            self._lost[known] = lost
            within = self.target.is_within(lost, self.allowed)
            kept = self.solved.kept(sizes)
            self.trials.append(TrialRecord(keep, kept, finite(value), finite(lost), within, share))
            self.tell(self.trials[-1])
        return self.target.is_within(self._lost[known], self.allowed)

    def _figures(self, keep: float, sizes: Sizes, share: float) -> Figures:
        if share < 1:
            return self.measure(sizes, share)
        self._asked[sizes.key] = keep
        if keep not in self.tried:
            self.tried[keep] = self.measure(sizes, 1.0)
        return self.tried[keep]


def why_none(record: SearchRecord, standing: Sizes, *, stuck: bool) -> str:
    """Return in words why nothing smaller was found: what lost least, or that none was possible.

    Args:
        record: of the search.
        standing: the sizes that the layers had, and have.
        stuck: whether nothing was tried, for too much was lost already.
    """
    known = [x for x in record.trials if x.lost is not None]
    if known:
        best = min(known, key=lambda x: x.lost or 0.0)
        return (
            f"the best of {len(record.trials)} tried, keep={best.keep:g}, loses "
            f"{number(best.lost)} of {record.monitor}, and {record.allowed:.6g} is allowed"
        )
    if stuck:
        return "too much was lost before, and there is no state to go back to"
    if record.trials:
        return "none of those tried gave a finite figure"
    ranks = standing.choice.ranks.values()
    if standing.widths or None in ranks:
        return "none is possible, with the ranks=, keeps= and keep_range= that layers may have"
    return "none is possible, for all layers are at their least rank already"


def number(value: float | None) -> str:
    """Return a figure in words."""
    return "not finite" if value is None else f"{value:.6g}"


def finite(value: float) -> float | None:
    """Return the value, or None where it is not finite."""
    return value if math.isfinite(value) else None
