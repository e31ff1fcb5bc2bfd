"""Ranks and narrowed blocks in one budget: which blocks are narrowed, and to what."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lrcompress.budget import Candidate, allocate, cost
from lrcompress.errors import SettingError
from lrcompress.linalg import double

_STEPS = 48  # of the bisection, over 30 decades

Sizes = dict[str, int | None]


def allocate_with_blocks(
    layers: Sequence[Candidate],
    blocks: Mapping[str, tuple[Candidate, Collection[str]]],
    keep: float | None,
    align: int = 1,
) -> tuple[Sizes, Sizes]:
    """Return a rank for every layer, and how many inner features the narrowed blocks keep.

    Minimises the sum of predicted losses under the budget, over ranks, over which blocks are
    narrowed in place of the ranks of their layers, and over their widths. By the Lagrangian: at a
    price ``λ`` of a parameter a block is narrowed if ``min_k(loss_k + λ cost_k)`` is less than
    ``Σ min_r(loss_r + λ cost_r)`` over its layers; the least ``λ`` that fits is found by bisection.
    Where that leaves a gap, the blocks on either side of it are tried, and all and none; for each
    choice :func:`~lrcompress.budget.allocate` shares out the budget, and the least loss counts.

    Args:
        layers: the targeted layers, but for those of blocks that are narrowed already.
        blocks: by name: the block as a candidate, whose ranks are widths, and the names of its
            layers among ``layers``; none of a block that is narrowed already, and stays so.
        keep: share of the parameters of layers and such blocks that remains.
        align: what ranks and widths are multiples of.

    Returns:
        Layer name to rank, None where it stays dense; and name of a narrowed block to the width.
        Layers of narrowed blocks are in neither.

    Raises:
        SettingError: as of ``allocate``, if no choice fits.

    Cost:
        ``O(48 R)`` with ``R`` the sum of all ranks and widths, and four times that of ``allocate``.
    """
    known = {one.name: one for one in layers}
    blocks = {
        name: (one, parts)
        for name, (one, parts) in blocks.items()
        if all(_is_free(known[part]) for part in parts)
    }
    must = frozenset(name for name, (_, parts) in blocks.items() if not parts)
    if keep is None or len(must) == len(blocks):
        return _shared_out(layers, blocks, must, keep, align)
    found: list[tuple[float, int, tuple[Sizes, Sizes]]] = []
    refused: list[SettingError] = []
    for chosen in dict.fromkeys(one | must for one in _choices(layers, blocks, keep, align)):
        try:
            sizes = _shared_out(layers, blocks, chosen, keep, align)
        except SettingError as error:
            refused.append(error)
            continue
        found.append((_loss(sizes, known, blocks), len(found), sizes))
    if not found:
        raise refused[0]
    return min(found)[2]


def _is_free(one: Candidate) -> bool:
    return one.rank is None and one.keep is None


def _shared_out(
    layers: Sequence[Candidate],
    blocks: Mapping[str, tuple[Candidate, Collection[str]]],
    chosen: Collection[str],
    keep: float | None,
    align: int,
) -> tuple[Sizes, Sizes]:
    """Return ranks and widths where the blocks that are narrowed are ``chosen``."""
    gone = {part for name in chosen for part in blocks[name][1]}
    rest = [one for one in layers if one.name not in gone]
    narrow = [blocks[name][0] for name in chosen]
    sizes = allocate([*rest, *narrow], keep, "global", align)
    return {one.name: sizes[one.name] for one in rest}, {x.name: sizes[x.name] for x in narrow}


def _loss(
    sizes: tuple[Sizes, Sizes],
    layers: Mapping[str, Candidate],
    blocks: Mapping[str, tuple[Candidate, Collection[str]]],
) -> float:
    ranks, widths = sizes
    every = [(layers[name], rank) for name, rank in ranks.items()]
    every += [(blocks[name][0], width) for name, width in widths.items()]
    return sum(0.0 if rank is None else float(_tail(one, rank)) for one, rank in every)


def _tail(one: Candidate, rank: int) -> Tensor:
    assert one.energies is not None
    return double(one.energies)[rank:].sum()


def _choices(
    layers: Sequence[Candidate],
    blocks: Mapping[str, tuple[Candidate, Collection[str]]],
    keep: float,
    align: int,
) -> list[frozenset[str]]:
    """Return which blocks to narrow: at the least price that fits, just below it, all and none."""
    total = sum(one.dense for one in layers) + sum(x.dense for x, y in blocks.values() if not y)
    fixed = [one for one in layers if not _is_free(one)]
    options = {one.name: _options(one, align) for one in layers if _is_free(one)}
    widths = {name: _options(one, align) for name, (one, _) in blocks.items()}
    budget = keep * total
    own = allocate(fixed, None)
    spent = sum(cost(one, own[one.name]) for one in fixed)

    def at(price: float) -> tuple[frozenset[str], float]:
        best = {name: _best(*option, price) for name, option in options.items()}
        taken, used = set(), float(spent)
        for name, (_, members) in blocks.items():
            value, size = _best(*widths[name], price)
            others = [best.pop(part) for part in members if part in best]
            if not others or value < sum(value for value, _ in others):
                taken.add(name)
                used += size
            else:
                used += sum(size for _, size in others)
        return frozenset(taken), used + sum(size for _, size in best.values())

    most = max((float(loss[0] - loss[-1]) for _, loss in (options | widths).values()), default=1.0)
    low, high = math.log(max(most, 1e-300)) - 70, math.log(max(most, 1e-300)) + 1
    below = above = frozenset[str]()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen, used = at(math.exp(middle))
        if used > budget:
            low, below = middle, chosen
        else:
            high, above = middle, chosen
    return [above, below, frozenset(), frozenset(blocks)]


def _options(one: Candidate, align: int) -> tuple[Tensor, Tensor]:
    """Return parameters and loss of the ranks that a candidate may have, rising."""
    assert one.energies is not None
    tails = double(one.energies).flip(0).cumsum(0).flip(0)
    tails = torch.cat([tails, tails.new_zeros(one.useful + 2)])[: one.useful + 2].cpu()
    tails[one.useful + 1] = 0
    grid = [r for r in range(one.least, one.top + 1) if r % align == 0 or r in (one.least, one.top)]
    costs = torch.tensor([cost(one, rank) for rank in grid], dtype=torch.float64)
    return costs, tails[torch.tensor(grid)]


def _best(costs: Tensor, losses: Tensor, price: float) -> tuple[float, float]:
    """Return the least of loss and price together, and the parameters there."""
    values = losses + price * costs
    place = int(values.argmin())
    return float(values[place]), float(costs[place])
