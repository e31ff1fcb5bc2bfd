"""Ranks and widths in one budget, against brute force over all of them."""

import itertools
import math

import pytest
import torch

from lrcompress.budget import Candidate, allocate, cost
from lrcompress.engine.block_budget import RankedWidth, allocate_with_blocks
from lrcompress.errors import SettingError

Blocks = dict[str, tuple[Candidate, tuple[str, ...]]]


def candidate(name: str, out: int, n: int, *, unit: int = 0, **more: int) -> Candidate:
    most = n if unit else min(out, n)
    energies = torch.rand(most, dtype=torch.float64).sort(descending=True).values ** 3
    return Candidate(name, out, n, energies, unit=unit, most=most, **more)


def problem(seed: int, blocks: int = 2, width: int = 4, inner: int = 6) -> tuple[list, Blocks]:
    torch.manual_seed(seed)
    layers, found = [candidate("attention", width, width)], {}
    for i in range(blocks):
        names = (f"up{i}", f"down{i}")
        layers += [candidate(names[0], inner, width), candidate(names[1], width, inner)]
        block = candidate(names[1], 2 * width, inner, unit=2 * width)
        found[names[1]] = block, names
    return layers, found


def tail(one: Candidate, size: int) -> float:
    return 0.0 if size > one.useful else float(one.energies[size:].sum())


def brute_force(layers: list[Candidate], blocks: Blocks, keep: float) -> float:
    total = sum(one.dense for one in layers)
    least = math.inf
    for chosen in itertools.product([False, True], repeat=len(blocks)):
        narrow = [name for name, yes in zip(blocks, chosen, strict=True) if yes]
        gone = {part for name in narrow for part in blocks[name][1]}
        every = [x for x in layers if x.name not in gone] + [blocks[name][0] for name in narrow]
        least = min(least, least_loss(every, keep * total))
    return least


def loss_of(found: tuple, layers: list[Candidate], blocks: Blocks) -> float:
    ranks, widths = found
    known = {one.name: one for one in layers}
    every = [(known[name], rank) for name, rank in ranks.items()]
    every += [(blocks[name][0], width) for name, width in widths.items()]
    return sum(0.0 if size is None else tail(one, size) for one, size in every)


def spent_by(found: tuple, layers: list[Candidate], blocks: Blocks) -> int:
    ranks, widths = found
    known = {one.name: one for one in layers}
    return sum(cost(known[name], rank) for name, rank in ranks.items()) + sum(
        cost(blocks[name][0], width) for name, width in widths.items()
    )


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_is_near_brute_force_over_all_choices_ranks_and_widths(keep: float) -> None:
    ratios = []
    for seed in range(12):
        layers, blocks = problem(seed)
        found = allocate_with_blocks(layers, blocks, keep)
        total = sum(one.dense for one in layers)
        assert spent_by(found, layers, blocks) <= keep * total
        for name in found[1]:
            assert not set(blocks[name][1]) & found[0].keys()
        best = brute_force(layers, blocks, keep)
        ratios.append(loss_of(found, layers, blocks) / best)
        assert ratios[-1] >= 1 - 1e-9
    assert sorted(ratios)[6] < 1.15  # the lumps are large here: a rank takes a tenth of a layer
    assert max(ratios) < 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_never_loses_more_than_ranks_alone_or_widths_alone(keep: float, seed: int) -> None:
    layers, blocks = problem(seed, blocks=4, width=12, inner=40)
    mixed = loss_of(allocate_with_blocks(layers, blocks, keep), layers, blocks)
    mixed *= 1 - 1e-12  # equal choices are summed in another order
    ranks = allocate(layers, keep, "global")
    assert mixed <= loss_of((ranks, {}), layers, blocks)
    narrow = allocate([layers[0], *(one for one, _ in blocks.values())], keep, "global")
    widths = {name: narrow[name] for name in blocks}
    assert mixed <= loss_of(({"attention": narrow["attention"]}, widths), layers, blocks)


def test_a_block_is_narrowed_where_that_is_cheaper_and_only_there() -> None:
    layers, blocks = problem(0, width=12, inner=40)
    cheap, dear = ((candidate(one.name, 24, 40, unit=24), parts) for one, parts in blocks.values())
    cheap[0].energies.mul_(1e-6)
    dear[0].energies.mul_(1e6)
    _, widths = allocate_with_blocks(layers, {"down0": cheap, "down1": dear}, 0.5, align=4)
    assert [*widths] == ["down0"]


def test_layers_with_sizes_of_their_own_are_not_narrowed() -> None:
    layers, blocks = problem(0, width=12, inner=40)
    for one, _ in blocks.values():
        one.energies.mul_(1e-6)
    layers[1] = Candidate("up0", 40, 12, layers[1].energies, rank=3)
    ranks, widths = allocate_with_blocks(layers, blocks, 0.5)
    assert ranks["up0"] == 3
    assert [*widths] == ["down1"]


def test_blocks_that_are_narrow_stay_so_and_only_become_narrower() -> None:
    torch.manual_seed(0)
    layers = [candidate("attention", 12, 12)]
    block = candidate("down", 24, 40, unit=24, highest=20)
    block.energies[20:] = 0
    for keep in (0.2, 0.3, 0.9):
        ranks, widths = allocate_with_blocks(layers, {"down": (block, ())}, keep)
        assert widths["down"] <= 20
        total = 12 * 12 + 24 * 40
        assert spent_by((ranks, widths), layers, {"down": (block, ())}) <= keep * total
    assert (ranks["attention"], widths["down"]) == (None, 20)


def test_says_what_cannot_be_met_in_either_way() -> None:
    layers, blocks = problem(0)
    with pytest.raises(SettingError, match=r"keep=0.01 leaves .*; the least keep is"):
        allocate_with_blocks(layers, blocks, 0.01)


def test_without_blocks_it_is_the_allocation_of_ranks() -> None:
    layers, _ = problem(0, width=12, inner=40)
    assert allocate_with_blocks(layers, {}, 0.5, 4) == (allocate(layers, 0.5, "global", 4), {})


# Low rank on top of narrowed blocks


def ranked_problem(seed: int, inner: int = 6) -> tuple[list, Blocks, dict[str, list[RankedWidth]]]:
    """Layers whose narrowed forms are worth as much as what is left of them."""
    layers, blocks = problem(seed, inner=inner)
    ranked = {}
    for name, (block, parts) in blocks.items():
        widths = []
        for width in range(2, inner, 2):
            left = []
            for part in parts:
                one = next(x for x in layers if x.name == part)
                out, n = (one.out_features, width) if part == name else (width, one.in_features)
                energies = one.energies[: min(out, n)] * width / inner
                left.append(Candidate(part, out, n, energies, whole=one.dense))
            widths.append(RankedWidth(width, tail(block, width), left))
        ranked[name] = widths
    return layers, blocks, ranked


def forms(layers: list[Candidate], blocks: Blocks, ranked: dict) -> list[tuple]:
    """Return what is lost anyway, and the candidates, of every choice of a form for each block."""
    options = []
    for name, (block, parts) in blocks.items():
        own = [(0.0, [x for x in layers if x.name in parts]), (0.0, [block])]
        options.append(own + [(x.loss, [*x.layers]) for x in ranked[name]])
    inside = {part for _, parts in blocks.values() for part in parts}
    rest = [x for x in layers if x.name not in inside]
    every = itertools.product(*options)
    return [(sum(x for x, _ in one), rest + [y for _, x in one for y in x]) for one in every]


def least_loss(candidates: list[Candidate], budget: float) -> float:
    best = {0: 0.0}  # parameters to the least loss, one candidate after the other
    for one in candidates:
        step: dict[int, float] = {}
        for spent, loss in best.items():
            for size in range(one.least, one.top + 1):
                place = spent + cost(one, size)
                step[place] = min(step.get(place, math.inf), loss + tail(one, size))
        best = step
    return min((loss for spent, loss in best.items() if spent <= budget), default=math.inf)


def outcome(found: tuple, layers: list[Candidate], blocks: Blocks, ranked: dict) -> tuple:
    """Return the loss and the parameters of the sizes that were found."""
    ranks, widths = found
    known, loss = {x.name: x for x in layers}, 0.0
    sizes = []
    for name, width in widths.items():
        low_rank = [x for x in ranked[name] if x.width == width and {*blocks[name][1]} <= {*ranks}]
        sizes += [] if low_rank else [(blocks[name][0], width)]
        loss += sum(x.loss for x in low_rank)
        known |= {y.name: y for x in low_rank for y in x.layers}
    sizes += [(known[name], rank) for name, rank in ranks.items()]
    loss += sum(0.0 if size is None else tail(one, size) for one, size in sizes)
    return loss, sum(cost(one, size) for one, size in sizes)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_low_rank_on_top_is_near_brute_force_over_widths_and_ranks(keep: float) -> None:
    ratios, on_top = [], 0
    for seed in range(12):
        layers, blocks, ranked = ranked_problem(seed)
        found = allocate_with_blocks(layers, blocks, keep, ranked=ranked)
        loss, spent = outcome(found, layers, blocks, ranked)
        budget = keep * sum(one.dense for one in layers)
        assert spent <= budget
        best = min(fixed + least_loss(x, budget) for fixed, x in forms(layers, blocks, ranked))
        ratios.append(loss / best)
        assert ratios[-1] >= 1 - 1e-9
        on_top += any(part in found[0] for name in found[1] for part in blocks[name][1])
    assert sorted(ratios)[6] < 1.15
    assert max(ratios) < 2
    assert on_top


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_low_rank_on_top_never_loses_more_than_without_it(keep: float, seed: int) -> None:
    layers, blocks, ranked = ranked_problem(seed, inner=40)
    without = loss_of(allocate_with_blocks(layers, blocks, keep), layers, blocks)
    found = allocate_with_blocks(layers, blocks, keep, ranked=ranked)
    assert outcome(found, layers, blocks, ranked)[0] <= without * (1 + 1e-12)


def test_a_narrow_block_gets_low_rank_without_becoming_narrower() -> None:
    torch.manual_seed(0)
    layers = [candidate("attention", 12, 12)]
    block = candidate("down", 24, 40, unit=24, highest=20)
    block.energies[:] = 1.0
    block.energies[20:] = 0
    left = [
        Candidate(name, *shape, 0.5 ** torch.arange(12.0), whole=480)
        for name, shape in (("up", (20, 12)), ("down", (12, 20)))
    ]
    ranked = {"down": [RankedWidth(20, 0.0, left)]}
    given = layers, {"down": (block, ())}
    ranks, widths = allocate_with_blocks(*given, 0.3, ranked=ranked)
    assert widths == {"down": 20}
    assert 0 < ranks["up"] < 12 > ranks["down"]
    total = 12 * 12 + 24 * 40
    assert (
        outcome((ranks, widths), layers, {"down": (block, ("up", "down"))}, ranked)[1]
        <= 0.3 * total
    )
