"""Rank allocation: a budget is shared by layers according to error curves.

Balanced factors of rank r take ``r·(out + in)`` parameters, pivoted rows ``r·(out + in − r)``, a
layer left dense ``out·in``. ``keep`` is the share of the targeted layers' parameters that remains,
over all of them together. Where candidates bring prices of their own, such as measured time, these
take the place of parameters.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from lrcompress.errors import SettingError, share_hint
from lrcompress.linalg import double

Key = TypeVar("Key")

ALLOCATIONS = ("uniform", "global")


@dataclass(frozen=True)
class Candidate:
    """A layer as rank allocation sees it: its size, error curve and bounds.

    Attributes:
        name: of the layer.
        out_features: its rows.
        in_features: its columns.
        energies: ``(min(out, in),)`` descending; the predicted loss that each further rank
            saves. Only global allocation reads it.
        rank: a rank that is fixed in advance, or None.
        keep: a share of this layer that is fixed in advance, or None.
        lowest: the least rank it may get.
        highest: the greatest rank it may get; at ``dense`` parameters it is left dense.
        unit: parameters one rank costs; by default ``out + in``, those of a column and a row.
        most: the greatest rank there is; by default the smaller of the two.
        costs: parameters at every rank from 0 on, rising, where they are no multiples of a unit,
            as :func:`pivoted_costs` returns them.
        whole: parameters of the layer in the architecture, where it has fewer rows or columns by
            now; 0 where it has all.
        price: of the layer without factors, where ``costs`` and ``whole`` are no parameters.
    """

    name: str
    out_features: int
    in_features: int
    energies: Tensor | None = None
    rank: int | None = None
    keep: float | None = None
    lowest: int = 1
    highest: int | None = None
    unit: int = 0
    most: int = 0
    costs: Sequence[int] = ()
    whole: int = 0
    price: int = 0

    def __post_init__(self) -> None:
        unit = self.unit or self.out_features + self.in_features
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "most", self.most or min(self.out_features, self.in_features))

    @property
    def dense(self) -> int:
        """Parameters of the layer as it is without factors, or its price."""
        return self.price or self.out_features * self.in_features

    @property
    def before(self) -> int:
        """Parameters that shares are of: those of the layer in the architecture."""
        return self.whole or self.dense

    @property
    def useful(self) -> int:
        """The greatest rank whose factors are smaller than the weight; 0 if there is none."""
        return bisect_left(self.prices, self.dense) - 1

    @property
    def prices(self) -> Sequence[int]:
        """The parameters at every rank from 0 on: ``costs``, or else multiples of ``unit``."""
        return self.costs or range(0, self.dense + 2 * self.unit, self.unit)

    @property
    def top(self) -> int:
        """The greatest rank it may get; ``useful + 1`` stands for dense."""
        dense = self.useful + 1
        return dense if self.highest is None or not self.useful else min(self.useful, self.highest)

    @property
    def least(self) -> int:
        """The least rank it may get; dense for a layer that no factors make smaller."""
        return min(self.lowest, self.top)


def check_keep(keep: float, name: str = "keep") -> float:
    """Return ``keep`` as a float if it is a valid share of parameters.

    Args:
        keep: parameters that remain / parameters before.
        name: of the argument, for the error message.

    Raises:
        SettingError: unless ``0 < keep ≤ 1``.

    Example:
        >>> check_keep(0.3)
        0.3
    """
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise SettingError(
            f"{name} must be above 0 and at most 1 (parameters that remain / parameters before), "
            f"got {keep!r}{share_hint(keep)}"
        )
    return float(keep)


def cost(candidate: Candidate, rank: int | None) -> int:
    """Return the parameters of a layer at ``rank``; dense for None or a rank that saves none.

    Example:
        >>> [cost(Candidate("layer", 4, 6), rank) for rank in (1, 2, 3, None)]
        [10, 20, 24, 24]
    """
    return candidate.dense if rank is None else min(_price(candidate, rank), candidate.dense)


def _price(candidate: Candidate, rank: int) -> int:
    """Return the parameters of factors of a rank, be they more than those of the dense layer."""
    prices = candidate.prices
    return prices[rank] if rank < len(prices) else candidate.dense


def pivoted_costs(out_features: int, in_features: int) -> tuple[int, ...]:
    """Return the parameters of pivoted rows at every rank from 0 to full: ``r·(out + in − r)``.

    At full rank they are those of the dense layer.

    Example:
        >>> pivoted_costs(3, 4)
        (0, 6, 10, 12)
    """
    both = out_features + in_features
    return tuple(r * (both - r) for r in range(min(out_features, in_features) + 1))


def _rank_within(prices: Sequence[int], parameters: float) -> float:
    """Return the rank that so many parameters buy, with the share of the next one."""
    if isinstance(prices, range):
        return parameters / prices.step
    rank = bisect_right(prices, parameters + 1e-6) - 1
    if rank + 1 == len(prices):
        return float(rank)
    return rank + max(0.0, parameters - prices[rank]) / (prices[rank + 1] - prices[rank])


def allocate(
    candidates: Sequence[Candidate],
    keep: float | None,
    allocation: str = "uniform",
    align: int = 1,
) -> dict[str, int | None]:
    """Return a rank for every layer, None where it stays dense.

    Uniform: every layer keeps the same share of its own parameters. Global: minimises
    ``Σ_l Σ_{j>r_l} energies_l[j]`` under ``Σ_l cost_l ≤ keep · Σ_l dense_l`` by taking, over
    the convex hulls of the layers' (parameters, loss) pairs, what saves most per parameter; a
    hull ends in the dense layer, which loses nothing. Ranks from ``align`` on are multiples of it
    as far as that leaves no budget unused; the remainder, smaller than one rank, is all that is
    lost.

    Args:
        candidates: the targeted layers.
        keep: share of their parameters that remains; None if every layer has its own.
        allocation: ``"uniform"`` or ``"global"``.
        align: what ranks are multiples of.

    Returns:
        Layer name to rank, in the order of ``candidates``.

    Raises:
        SettingError: if ``keep`` is missing, out of range or cannot be met (the layers' own ranks
            or least ranks take more than it leaves), or a rank of a layer is out of range.

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
    total = sum(c.before for c in candidates)
    spent = sum(cost(c, fixed[c.name]) for c in candidates if c.name in fixed)
    budget = math.floor(check_keep(keep) * total + 1e-6) - spent
    least = sum(cost(c, c.least) for c in free)
    if budget < least:
        raise SettingError(
            f"keep={keep:g} leaves {budget + spent:,} of {total:,} parameters, but at the least "
            f"ranks that layers may have they take {least + spent:,}; the least keep is "
            f"{(least + spent) / total:.4f}"
        )
    spread = _global if allocation == "global" else _uniform
    spent_on = spread(free, budget, align)
    ranks = fixed | {c.name: _dense_above(c, spent_on[c.name]) for c in free}
    return {c.name: ranks[c.name] for c in candidates}


def _dense_above(candidate: Candidate, rank: int) -> int | None:
    return rank if rank <= candidate.useful else None


def _fixed_rank(candidate: Candidate) -> int | None:
    if candidate.rank is not None:
        if not 1 <= candidate.rank <= candidate.most:
            raise SettingError(
                f"rank of layer {candidate.name!r} must be from 1 to {candidate.most}, got "
                f"{candidate.rank}"
            )
        return _dense_above(candidate, candidate.rank)
    share = check_keep(candidate.keep or 0, f"keep of layer {candidate.name!r}")
    rank = int(_rank_within(candidate.prices, share * candidate.before) + 1e-9)
    return max(1, rank) if share < 1 and candidate.useful else None


def _uniform(free: Sequence[Candidate], budget: int, align: int) -> dict[str, int]:
    ranks: dict[str, int] = {}
    open_, left = list(free), budget
    share = 0.0
    while open_:  # layers at a bound pay for it first, the others share what is left
        share = left / sum(c.before for c in open_)
        dear = [c for c in open_ if cost(c, c.least) > share * c.before]
        full = [c for c in open_ if cost(c, c.top) < share * c.before]
        over = sum(cost(c, c.least) - share * c.before for c in dear)
        under = sum(share * c.before - cost(c, c.top) for c in full)
        # Only one side at a time: what the one takes may open the other again.
        bound = {c.name: c.least for c in dear} if over >= under else {c.name: c.top for c in full}
        if not bound:
            break
        left -= sum(cost(c, bound[c.name]) for c in open_ if c.name in bound)
        ranks |= bound
        open_ = [c for c in open_ if c.name not in bound]
    fair = {c.name: _rank_within(c.prices, share * c.before) for c in free}
    for c in open_:
        whole = int(fair[c.name] + 1e-9)
        rounded = whole // align * align or whole
        ranks[c.name] = max(c.least, min(rounded, c.top))
    # What rounding down left over goes to those that lost most by it.
    return _fill(free, ranks, budget, align, lambda c, rank: fair[c.name] - rank)


def _global(free: Sequence[Candidate], budget: int, align: int) -> dict[str, int]:
    ranks = {c.name: c.least for c in free}
    left = budget - sum(cost(c, c.least) for c in free)
    tails = {c.name: _tails(c) for c in free}
    hulls = [_hull(c, tails[c.name], c.least, c.top, align) for c in free]
    queue = [(-hull[0][0], i) for i, hull in enumerate(hulls) if hull]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        candidate, rank = free[i], hulls[i].pop(0)[1]
        now = ranks[candidate.name]
        extra = cost(candidate, rank) - cost(candidate, now)
        if extra <= left:
            ranks[candidate.name], left = rank, left - extra
        elif rank > candidate.useful:  # too dear to stay dense: what are its factors worth then?
            hulls[i] = _hull(candidate, tails[candidate.name], now, candidate.useful, align)
        elif candidate.costs:  # of a step over many ranks, some may be had
            most = int(_rank_within(candidate.costs, _price(candidate, now) + left))
            hulls[i] = _hull(candidate, tails[candidate.name], now, most, align)
        else:
            hulls[i] = []  # what comes after builds on this one
        if hulls[i]:
            heapq.heappush(queue, (-hulls[i][0][0], i))

    def worth(c: Candidate, rank: int) -> float:
        saved = tails[c.name][rank] - tails[c.name][rank + 1]
        return saved / (_price(c, rank + 1) - _price(c, rank))

    return _fill(free, ranks, budget, align, worth)


def _tails(candidate: Candidate) -> list[float]:
    """Return what is lost at each rank from 0 on, up to the one that stands for dense."""
    assert candidate.energies is not None
    tails = [0.0]
    for energy in reversed(double(candidate.energies).tolist()):
        tails.append(tails[-1] + energy)
    return [*tails[::-1][: candidate.useful + 1], 0.0]


def _hull(
    candidate: Candidate, tails: Sequence[float], start: int, top: int, align: int
) -> list[tuple[float, int]]:
    """Return the steps ``(saved per parameter, to rank)`` along the lower convex hull."""
    grid = range((start // align + 1) * align, min(top, candidate.useful) + 1, align)
    hull: list[tuple[int, int]] = []  # (parameters, rank)
    for rank in dict.fromkeys((start, *grid, top if top > candidate.useful else start)):
        corner = (cost(candidate, rank), rank)
        while len(hull) > 1 and _slope(tails, *hull[-2:]) <= _slope(tails, hull[-1], corner):
            hull.pop()
        hull.append(corner)
    return [(_slope(tails, before, after), after[1]) for before, after in pairwise(hull)]


def _slope(tails: Sequence[float], before: tuple[int, int], after: tuple[int, int]) -> float:
    return (tails[before[1]] - tails[after[1]]) / (after[0] - before[0])


def _fill(
    free: Sequence[Candidate],
    ranks: dict[str, int],
    budget: int,
    align: int,
    worth: Callable[[Candidate, int], float],
) -> dict[str, int]:
    """Spend the rest of the budget, first up to multiples of ``align``, then rank by rank.

    Each time the layer with the greatest worth of its next rank gets it; single ranks go first to
    layers whose rank is no multiple already.
    """
    left = budget - sum(cost(c, ranks[c.name]) for c in free)
    for step in dict.fromkeys((align, 1)):
        while True:
            grown = [(c, ranks[c.name], _grown(c, ranks[c.name], step)) for c in free]
            fits = [x for x in grown if 0 < cost(x[0], x[2]) - cost(x[0], x[1]) <= left]
            if not fits:
                break
            c, rank, more = max(
                fits, key=lambda x: (step < align and x[1] % align > 0, worth(x[0], x[1]))
            )
            left -= cost(c, more) - cost(c, rank)
            ranks[c.name] = more
    return ranks


def _grown(candidate: Candidate, rank: int, step: int) -> int:
    """Return the next multiple of ``step`` if bounds allow it, else the same rank."""
    more = (rank // step + 1) * step
    return more if more <= min(candidate.top, candidate.useful + (step == 1)) else rank


def match_bounds(
    keep_range: tuple[float, float],
    out_features: int,
    in_features: int,
    unit: int | None = None,
    costs: Sequence[int] = (),
    whole: int = 0,
) -> tuple[int, int | None]:
    """Return the least and the greatest rank for a range of keep per layer.

    Args:
        keep_range: least and greatest keep.
        out_features: rows of the weight.
        in_features: columns of the weight.
        unit: parameters one rank costs; None is ``out + in``.
        costs: as of :class:`Candidate`.
        whole: as of :class:`Candidate`.

    Returns:
        The two ranks; the second is None where a layer may stay dense.

    Example:
        >>> match_bounds((0.1, 0.5), out_features=100, in_features=100)
        (5, 25)
    """
    layer = Candidate("", out_features, in_features, unit=unit or 0, costs=costs, whole=whole)
    least, greatest = (_rank_within(layer.prices, keep * layer.before) for keep in keep_range)
    lowest = max(1, math.ceil(least - 1e-9))
    return lowest, None if keep_range[1] >= 1 else max(1, int(greatest + 1e-9))


def kept_share(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> float:
    """Return the keep over all ``candidates`` that ``ranks`` result in."""
    return sum(cost(c, ranks[c.name]) for c in candidates) / sum(c.before for c in candidates)


def kept_units(
    scores: Mapping[Key, Tensor], prices: Mapping[Key, int], budget: float
) -> dict[Key, Tensor]:
    """Return which units stay: the best of all layers whose parameters fit one budget.

    Units are taken in falling order of their scores, equal ones in the order of the layers,
    until the next one would exceed the budget. A score of ``inf`` comes first whatever it
    costs; one of ``-inf`` is never taken.

    Args:
        scores: ``(units,)`` of every layer, per parameter.
        prices: parameters of each unit of a layer.
        budget: parameters that may stay.

    Returns:
        ``(units,)`` bool of every layer.

    Cost:
        One sort of all units; where all cost the same, one selection, in linear time, after one
        wait for the device.

    Example:
        >>> scores = {"a": torch.tensor([0.5, 2.0]), "b": torch.tensor([1.0])}
        >>> kept = kept_units(scores, {"a": 10, "b": 5}, 16)
        >>> {name: units.tolist() for name, units in kept.items()}
        {'a': [False, True], 'b': [True]}
    """
    device = next((score.device for score in scores.values()), None)  # of several, the first
    flat = torch.cat([score.to(device) for score in scores.values()])
    sizes = [len(score) for score in scores.values()]
    asked = {prices[name] for name, size in zip(scores, sizes, strict=True) if size}
    whole = math.floor(budget)  # a float would be compared in float32, exact to 2²⁴ only
    if len(asked) > 1:
        order = flat.argsort(descending=True, stable=True)
        each = [torch.full((size,), prices[n]) for n, size in zip(scores, sizes, strict=True)]
        price = torch.cat(each).to(flat.device)
        fits = (price[order].cumsum(0) <= whole) | (flat[order] == math.inf)
        kept = torch.zeros_like(fits)
        kept[order] = fits & (flat[order] > -math.inf)
    else:
        kept = _best(flat, whole // max(asked, default=1))
    parts = zip(scores.items(), torch.split(kept, sizes), strict=True)
    return {name: part.to(score.device) for (name, score), part in parts}


def _best(flat: Tensor, count: int) -> Tensor:
    first, able = torch.stack([(flat == math.inf).sum(), (flat > -math.inf).sum()]).tolist()
    count = min(able, max(first, count))
    if not count:
        return torch.zeros_like(flat, dtype=torch.bool)
    least = flat.topk(count, sorted=False).values.min()
    equal = flat == least  # topk takes any of them
    above = flat > least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))
