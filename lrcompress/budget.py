"""Which rank each layer gets: error curves and costs in, ranks out.

A rank costs ``out + in`` parameters, a layer left dense ``out·in``. ``keep`` is the share of
the targeted layers' parameters that remains, over all of them together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lrcompress.errors import SettingError

ALLOCATIONS = ("uniform", "global")


@dataclass(frozen=True)
class Candidate:
    """A layer that asks for a share of the budget.

    Attributes:
        name: of the layer.
        out_features: its rows.
        in_features: its columns.
        energies: ``(min(out, in),)`` descending; what each further rank saves, in the currency
            of the budget (predicted loss). Only global allocation reads it.
        rank: a rank that is fixed in advance, or None.
        keep: a share of this layer that is fixed in advance, or None.
        lowest: the least rank it may get.
        highest: the greatest rank it may get; at ``dense`` parameters it is left dense.
    """

    name: str
    out_features: int
    in_features: int
    energies: Tensor | None = None
    rank: int | None = None
    keep: float | None = None
    lowest: int = 1
    highest: int | None = None

    @property
    def unit(self) -> int:
        """Parameters one rank costs."""
        return self.out_features + self.in_features

    @property
    def dense(self) -> int:
        """Parameters of the layer as it was."""
        return self.out_features * self.in_features

    @property
    def useful(self) -> int:
        """The greatest rank whose factors are smaller than the weight; 0 if there is none."""
        return (self.dense - 1) // self.unit

    @property
    def ceiling(self) -> int:
        """The greatest rank the budget may give."""
        return self.useful if self.highest is None else min(self.useful, self.highest)


def check_keep(keep: float, name: str = "keep") -> float:
    """Return ``keep`` if it is a share of parameters that may remain.

    Raises:
        SettingError: unless ``0 < keep ≤ 1``.

    Example:
        >>> check_keep(0.3)
        0.3
    """
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise SettingError(
            f"{name} must be above 0 and at most 1 (parameters that remain / parameters before), "
            f"got {keep!r}" + (f"; did you mean {keep / 100:g}?" if _percent(keep) else "")
        )
    return float(keep)


def _percent(keep: object) -> bool:
    return isinstance(keep, int | float) and 1 < keep <= 100


def cost(candidate: Candidate, rank: int | None) -> int:
    """Return the parameters of a layer at ``rank``; None is dense.

    Example:
        >>> cost(Candidate("layer", 4, 6), rank=2), cost(Candidate("layer", 4, 6), rank=None)
        (20, 24)
    """
    return candidate.dense if rank is None else rank * candidate.unit


def allocate(
    candidates: Sequence[Candidate],
    keep: float | None,
    allocation: str = "uniform",
    align: int = 1,
) -> dict[str, int | None]:
    """Return a rank for every layer, None where it stays dense.

    Uniform: every layer keeps the same share of its own parameters. Global: minimises
    ``Σ_l Σ_{j>r_l} energies_l[j]`` under ``Σ_l cost_l ≤ keep · Σ_l dense_l`` by taking, over
    the convex hulls of the layers' curves, what saves most per parameter; a hull ends in the
    dense layer, which loses nothing. Ranks are multiples of ``align`` as far as that leaves no
    budget unused; the remainder, smaller than one rank, is all that is lost.

    Args:
        candidates: the targeted layers.
        keep: share of their parameters that remains; None if every layer has its own.
        allocation: ``"uniform"`` or ``"global"``.
        align: what ranks are multiples of.

    Raises:
        SettingError: if ``keep`` is out of range or cannot be met: the layers' own ranks or
            least ranks take more than it leaves.

    Cost:
        ``O(R log R)`` with ``R`` the sum of all possible ranks.
    """
    fixed = {c.name: _fixed_rank(c) for c in candidates if c.rank is not None or c.keep is not None}
    free = [c for c in candidates if c.name not in fixed]
    if keep is None and free:
        raise SettingError(
            f"keep is missing: {len(free)} of {len(candidates)} layers have no rank or keep of "
            f"their own, first {free[0].name!r}"
        )
    if not free:
        return {c.name: fixed[c.name] for c in candidates}
    assert keep is not None
    total = sum(c.dense for c in candidates)
    spent = sum(cost(c, fixed[c.name]) for c in candidates if c.name in fixed)
    budget = math.floor(check_keep(keep) * total + 1e-6) - spent
    least = sum(_least(c) for c in free)
    if budget < least:
        raise SettingError(
            f"keep={keep:g} leaves {budget + spent:,} of {total:,} parameters, but the layers' "
            f"own and least ranks take {least + spent:,}; the least keep is "
            f"{(least + spent) / total:.4f}"
        )
    spread = _global if allocation == "global" else _uniform
    ranks: dict[str, int | None] = spread(free, budget, align)
    ranks |= fixed
    return {c.name: ranks[c.name] for c in candidates}


def _fixed_rank(candidate: Candidate) -> int | None:
    most = min(candidate.out_features, candidate.in_features)
    if candidate.rank is not None:
        if not 1 <= candidate.rank <= most:
            raise SettingError(
                f"rank of layer {candidate.name!r} must be from 1 to {most}, got {candidate.rank}"
            )
        return candidate.rank if candidate.rank <= candidate.useful else None
    share = check_keep(candidate.keep or 0, f"keep of layer {candidate.name!r}")
    rank = int(share * candidate.dense / candidate.unit + 1e-9)
    return max(1, rank) if share < 1 and candidate.useful else None


def _least(candidate: Candidate) -> int:
    return candidate.unit * _least_rank(candidate) or candidate.dense


def _least_rank(candidate: Candidate) -> int:
    return min(candidate.lowest, candidate.ceiling)


def _uniform(free: Sequence[Candidate], budget: int, align: int) -> dict[str, int | None]:
    ranks: dict[str, int | None] = {}
    open_ = list(free)
    left = budget
    while open_:  # layers at a bound pay for it first, the others share what is left
        share = left / sum(c.dense for c in open_)
        if share >= 1:
            return ranks | {c.name: None for c in open_}
        wanted = {c.name: share * c.dense / c.unit for c in open_}
        bound = [c for c in open_ if not _least_rank(c) <= wanted[c.name] <= c.ceiling]
        if not bound:
            break
        for candidate in bound:
            ranks[candidate.name] = _clamp(candidate, int(wanted[candidate.name]))
            left -= cost(candidate, ranks[candidate.name])
        open_ = [c for c in open_ if c.name not in ranks]
    ranks |= {c.name: _clamp(c, int(wanted[c.name] + 1e-9) // align * align) for c in open_}
    # What rounding down left over goes to those that lost most by it.
    open_.sort(key=lambda c: (ranks[c.name] or 0) - wanted[c.name])
    return _fill([*open_, *(c for c in free if c not in open_)], ranks, budget, align)


def _global(free: Sequence[Candidate], budget: int, align: int) -> dict[str, int | None]:
    ranks: dict[str, int | None] = {c.name: _clamp(c, 0) for c in free}
    left = budget - sum(cost(c, ranks[c.name]) for c in free)
    moves = [move for c in free if ranks[c.name] is not None for move in _hull(c, align)]
    moves.sort(key=lambda move: -move[0])  # stable: a layer's own moves stay in order
    closed: set[str] = set()
    for _, candidate, rank in moves:
        name = candidate.name
        extra = cost(candidate, rank) - cost(candidate, ranks[name])
        if name in closed or extra > left:
            closed.add(name)  # what comes after builds on this one
            continue
        ranks[name], left = rank, left - extra
    by_gain = sorted(free, key=lambda c: -_next_gain(c, ranks[c.name]))
    return _fill(by_gain, ranks, budget, align)


def _next_gain(candidate: Candidate, rank: int | None) -> float:
    if rank is None or rank >= candidate.ceiling or candidate.energies is None:
        return 0.0
    return float(candidate.energies[rank]) / candidate.unit


def _hull(candidate: Candidate, align: int) -> list[tuple[float, Candidate, int | None]]:
    """Return the moves ``(saved per parameter, layer, to rank)`` along the lower convex hull."""
    assert candidate.energies is not None
    energies = candidate.energies.double().tolist()
    tails = [0.0]
    for energy in reversed(energies):
        tails.append(tails[-1] + energy)
    tails.reverse()  # tails[r] is lost at rank r
    start = _least_rank(candidate)
    grid = [start, *range((start // align + 1) * align, candidate.ceiling + 1, align)]
    corners: list[tuple[int, float, int | None]] = [
        (rank * candidate.unit, tails[rank], rank) for rank in grid
    ]
    if candidate.highest is None:
        corners.append((candidate.dense, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for corner in corners:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], corner):
            hull.pop()
        hull.append(corner)
    return [
        (_slope(before, after), candidate, after[2])
        for before, after in zip(hull, hull[1:], strict=False)
    ]


def _slope(before: tuple[int, float, int | None], after: tuple[int, float, int | None]) -> float:
    return (before[1] - after[1]) / (after[0] - before[0])


def _clamp(candidate: Candidate, rank: int) -> int | None:
    """Return the rank within its bounds, or None for a layer that no factors make smaller."""
    if not candidate.ceiling:
        return None
    return max(_least_rank(candidate), min(rank, candidate.ceiling))


def _fill(
    order: Sequence[Candidate], ranks: dict[str, int | None], budget: int, align: int
) -> dict[str, int | None]:
    """Spend what is left, first in whole multiples of ``align``, then rank by rank."""
    left = budget - sum(cost(c, ranks[c.name]) for c in order)
    for step in dict.fromkeys((align, 1)):
        grown = True
        while grown:
            grown = False
            for candidate in order:
                rank = ranks[candidate.name]
                if rank is None or rank + step > candidate.ceiling or step * candidate.unit > left:
                    continue
                ranks[candidate.name], left = rank + step, left - step * candidate.unit
                grown = True
                if step < align:
                    break
    return ranks


def match_bounds(
    keep_range: tuple[float, float], out_features: int, in_features: int
) -> tuple[int, int | None]:
    """Return the ranks that a least and a greatest keep per layer stand for.

    Example:
        >>> match_bounds((0.1, 0.5), out_features=100, in_features=100)
        (5, 25)
    """
    least, greatest = keep_range
    scale = out_features * in_features / (out_features + in_features)
    lowest = max(1, math.ceil(least * scale - 1e-9))
    return lowest, None if greatest >= 1 else max(1, int(greatest * scale + 1e-9))


def shares(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> float:
    """Return the keep that ``ranks`` amount to over all ``candidates``."""
    return sum(cost(c, ranks[c.name]) for c in candidates) / sum(c.dense for c in candidates)
