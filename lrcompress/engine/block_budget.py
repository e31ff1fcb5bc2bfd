"""Ranks and narrowed blocks in one budget: which blocks are narrowed, and to what."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lrcompress.budget import Candidate, allocate, cost
from lrcompress.errors import SettingError
from lrcompress.linalg import double

_STEPS = 48  # of the bisection, over 30 decades

Sizes = dict[str, int | None]
Blocks = Mapping[str, tuple[Candidate, Collection[str]]]


@dataclass(frozen=True)
class RankedWidth:
    """A width of a narrowed block at which what is left of its layers may have low rank.

    Attributes:
        width: inner features that are left.
        loss: of narrowing alone, in the units of the candidates' energies.
        layers: of the block, as they are then; by their ranks they lose more.
    """

    width: int
    loss: float
    layers: Sequence[Candidate]


# The blocks that are narrowed: None for any width, with dense layers.
Choice = Mapping[str, RankedWidth | None]


def allocate_with_blocks(
    layers: Sequence[Candidate],
    blocks: Blocks,
    keep: float | None,
    align: int = 1,
    ranked: Mapping[str, Sequence[RankedWidth]] = MappingProxyType({}),
) -> tuple[Sizes, Sizes]:
    """Return a rank for every layer, and how many inner features the narrowed blocks keep.

    Minimises the sum of predicted losses under the budget, over ranks, over which blocks are
    narrowed in place of the ranks of their layers, over their widths, and at some widths over the
    ranks of what is left of their layers. By the Lagrangian: at a price ``λ`` of a parameter a
    block is narrowed if ``min_k(loss_k + λ cost_k)``, or ``min_k(loss_k + Σ min_r(loss_kr + λ
    cost_kr))``, is less than ``Σ min_r(loss_r + λ cost_r)`` over its layers; the least ``λ`` that
    fits is found by bisection. Where that leaves a gap, the choices on either side of it are tried,
    with such ranks and without, and all and none; for each :func:`~lrcompress.budget.allocate`
    shares out the budget, and the least loss counts.

    Args:
        layers: the targeted layers, but for those of blocks that are narrowed already.
        blocks: by name: the block as a candidate, whose ranks are widths, and the names of its
            layers among ``layers``; none of a block that is narrowed already, and stays so.
        keep: share of the parameters of layers and such blocks that remains.
        align: what ranks and widths are multiples of.
        ranked: widths of blocks at which their layers may have low rank, by name.

    Returns:
        Layer name to rank, None where it stays dense; and name of a narrowed block to the width.
        Layers of narrowed blocks are in neither, but for those that were chosen from ``ranked``.

    Raises:
        SettingError: as of ``allocate``, if no choice fits.

    Cost:
        ``O(48 R)`` with ``R`` the sum of all ranks and widths; eight times ``allocate``.
    """
    known = {one.name: one for one in layers}
    blocks = {
        name: (one, parts)
        for name, (one, parts) in blocks.items()
        if all(_is_free(known[part]) for part in parts)
    }
    ranked = {name: ranked[name] for name in blocks if ranked.get(name)}
    must: Choice = {name: None for name, (_, parts) in blocks.items() if not parts}
    if keep is None or (len(must) == len(blocks) and not ranked):
        return _shared_out(layers, blocks, must, keep, align)[1:]
    found: list[tuple[float, int, tuple[Sizes, Sizes]]] = []
    refused: list[SettingError] = []
    choices = _choices(layers, blocks, {}, keep, align)
    choices += _choices(layers, blocks, ranked, keep, align) if ranked else []
    for chosen in choices:
        try:
            loss, *sizes = _shared_out(layers, blocks, {**must, **chosen}, keep, align)
        except SettingError as error:
            refused.append(error)
            continue
        found.append((loss, len(found), (sizes[0], sizes[1])))
    if not found:
        raise refused[0]
    return min(found)[2]


def _is_free(one: Candidate) -> bool:
    return one.rank is None and one.keep is None


def _shared_out(
    layers: Sequence[Candidate], blocks: Blocks, chosen: Choice, keep: float | None, align: int
) -> tuple[float, Sizes, Sizes]:
    """Return what is lost where the blocks that are narrowed are ``chosen``, ranks and widths."""
    gone = {part for name in chosen for part in blocks[name][1]}
    ranked = {name: one for name, one in chosen.items() if one is not None}
    rest = [one for one in layers if one.name not in gone]
    rest += [layer for one in ranked.values() for layer in one.layers]
    narrow = [blocks[name][0] for name in chosen if name not in ranked]
    sizes = allocate([*rest, *narrow], keep, "global", align)
    lost = sum(
        _tail(one, rank) for one in (*rest, *narrow) if (rank := sizes[one.name]) is not None
    )
    lost += sum(one.loss for one in ranked.values())
    widths = {name: one.width if one else sizes[name] for name, one in chosen.items()}
    return lost, {one.name: sizes[one.name] for one in rest}, widths


def _tail(one: Candidate, rank: int) -> float:
    assert one.energies is not None
    return float(double(one.energies)[rank:].sum())


def _choices(
    layers: Sequence[Candidate],
    blocks: Blocks,
    ranked: Mapping[str, Sequence[RankedWidth]],
    keep: float,
    align: int,
) -> list[Choice]:
    """Return which blocks to narrow: at the least price that fits, just below it, all and none."""
    total = sum(one.before for one in layers) + sum(x.before for x, y in blocks.values() if not y)
    fixed = [one for one in layers if not _is_free(one)]
    options = {one.name: _Options.of([one], align) for one in layers if _is_free(one)}
    forms = {name: _forms(one, ranked.get(name, ()), align) for name, (one, _) in blocks.items()}
    budget = keep * total
    own = allocate(fixed, None)
    spent = sum(cost(one, own[one.name]) for one in fixed)

    def at(price: float) -> tuple[Choice, float]:
        best = {name: option.best(price) for name, option in options.items()}
        taken: dict[str, RankedWidth | None] = {}
        used = float(spent)
        for name, (_, members) in blocks.items():
            found = [(option.best(price), form) for form, option in forms[name]]
            (value, size), form = min(found, key=lambda x: x[0])
            others = [best.pop(part) for part in members if part in best]
            if not others or value < sum(value for value, _ in others):
                taken[name] = form
                used += size
            else:
                used += sum(size for _, size in others)
        return taken, used + sum(size for _, size in best.values())

    every = [*options.values(), *(form[0][1] for form in forms.values())]
    most = max((option.span for option in every), default=1.0)
    low, high = math.log(max(most, 1e-300)) - 70, math.log(max(most, 1e-300)) + 1
    below: Choice = {}
    above: Choice = {}
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen, used = at(math.exp(middle))
        if used > budget:
            low, below = middle, chosen
        else:
            high, above = middle, chosen
    return [above, below, {}, dict.fromkeys(blocks)]


@dataclass(frozen=True)
class _Options:
    """Parameters and losses of the sizes that some candidates may have, rising."""

    sizes: Sequence[tuple[Tensor, Tensor]]
    loss: float = 0.0

    @classmethod
    def of(cls, candidates: Sequence[Candidate], align: int, loss: float = 0.0) -> "_Options":
        return cls([_sizes(one, align) for one in candidates], loss)

    @property
    def span(self) -> float:
        return max(float(losses[0] - losses[-1]) for _, losses in self.sizes)

    def best(self, price: float) -> tuple[float, float]:
        """Return the least of loss and price together, and the parameters there."""
        value, used = self.loss, 0.0
        for costs, losses in self.sizes:
            values = losses + price * costs
            place = int(values.argmin())
            value, used = value + float(values[place]), used + float(costs[place])
        return value, used


def _forms(
    one: Candidate, ranked: Sequence[RankedWidth], align: int
) -> list[tuple[RankedWidth | None, _Options]]:
    """Return the ways to narrow a block, that with dense layers first."""
    dense: list[tuple[RankedWidth | None, _Options]] = [(None, _Options.of([one], align))]
    return [*dense, *((x, _Options.of(x.layers, align, x.loss)) for x in ranked)]


def _sizes(one: Candidate, align: int) -> tuple[Tensor, Tensor]:
    """Return parameters and loss of the ranks that a candidate may have, rising."""
    assert one.energies is not None
    tails = double(one.energies).flip(0).cumsum(0).flip(0)
    tails = torch.cat([tails, tails.new_zeros(one.useful + 2)])[: one.useful + 2].cpu()
    tails[one.useful + 1] = 0
    grid = [r for r in range(one.least, one.top + 1) if r % align == 0 or r in (one.least, one.top)]
    costs = torch.tensor([cost(one, rank) for rank in grid], dtype=torch.float64)
    return costs, tails[torch.tensor(grid)]
