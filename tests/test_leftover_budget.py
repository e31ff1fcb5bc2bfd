"""Who gets what is left of a budget, and by which steps; beside ``test_budget.py``."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from lrcompress.budget import (
    Candidate,
    _hull,
    _rank_within,
    _tails,
    allocate,
    check_keep,
    cost,
    match_bounds,
    pivoted_costs,
)
from lrcompress.errors import SettingError


def falling(chance: random.Random, count: int) -> torch.Tensor:
    values = sorted((chance.random() ** 3 for _ in range(count)), reverse=True)
    return torch.tensor(values, dtype=torch.float64)


def test_a_rank_beyond_all_costs_what_the_dense_layer_does() -> None:
    for c in (Candidate("a", 4, 6), Candidate("a", 4, 6, costs=pivoted_costs(4, 6))):
        assert [cost(c, rank) for rank in range(4, 60)] == [24] * 56


def test_a_keep_is_called_so_where_it_has_no_other_name() -> None:
    with pytest.raises(SettingError, match=r"^keep must be above 0"):
        check_keep(2)


def test_parameters_between_two_ranks_buy_a_share_of_the_next() -> None:
    costs = pivoted_costs(9, 14)
    for rank, (price, more) in enumerate(pairwise(costs)):
        for share in (0.0, 0.25, 0.9):
            bought = price + share * (more - price)
            assert _rank_within(costs, bought) == pytest.approx(rank + share)
    assert _rank_within(costs, costs[-1] + 5) == 9
    assert _rank_within(range(0, 100, 10), 35) == 3.5


@pytest.mark.parametrize("seed", range(8))
def test_uniform_rounds_up_the_layers_that_lost_most_by_rounding_down(seed: int) -> None:
    chance = random.Random(seed)
    rows = chance.sample(range(10, 90), 7)  # all with ranks of one price
    layers = [Candidate(f"{out}", out, 100 - out) for out in rows]
    fair = {c.name: 0.4 * c.dense / 100 for c in layers}
    ranks = allocate(layers, 0.4, "uniform")
    up = {name: fair[name] % 1 for name, rank in ranks.items() if rank == int(fair[name]) + 1}
    down = {name: fair[name] % 1 for name, rank in ranks.items() if rank == int(fair[name])}
    assert up.keys() | down.keys() == ranks.keys()
    assert len(up) == int(sum(fair.values()) + 1e-9) - sum(map(int, fair.values()))
    assert min(up.values(), default=1) >= max(down.values(), default=0)


def test_a_whole_step_goes_to_the_layer_that_lost_most_though_another_is_no_multiple() -> None:
    layers = [Candidate("small", 16, 184), Candidate("large", 39, 161)]  # fair: 7.36 and 15.70
    for order in (layers, layers[::-1]):
        assert allocate(order, 0.5, align=8) == {"small": 7, "large": 16}


def test_global_gives_the_last_rank_to_the_layer_whose_next_one_is_worth_most() -> None:
    """Worth is what is saved for each parameter; multiples of ``align`` are taken before."""
    seen = 0
    for seed in range(400):
        chance = random.Random(seed)
        layers = []
        for i in range(3):
            out, in_ = chance.randint(20, 60), chance.randint(20, 60)
            costs = pivoted_costs(out, in_) if chance.random() < 0.5 else ()
            layers.append(Candidate(f"{i}", out, in_, falling(chance, min(out, in_)), costs=costs))
        keep = chance.uniform(0.2, 0.8)
        ranks: dict[str, Any] = allocate(layers, keep, "global", 4)
        if None in ranks.values():
            continue
        off = [c for c in layers if ranks[c.name] % 4]
        if len(off) != 1 or ranks[off[0].name] % 4 != 1 or ranks[off[0].name] < 4:
            continue
        (last,) = off
        before = ranks | {last.name: ranks[last.name] - 1}
        left = keep * sum(c.dense for c in layers) - sum(cost(c, before[c.name]) for c in layers)
        worth = {}
        for c in layers:
            rank = before[c.name]
            price = cost(c, rank + 1) - cost(c, rank)
            if price <= left and rank < c.useful:
                assert c.energies is not None
                worth[c.name] = float(c.energies[rank]) / price
        assert worth[last.name] == max(worth.values()), seed
        seen += len(worth) > 1
    assert seen > 20


def test_the_price_of_the_next_rank_is_its_own_and_not_that_of_two() -> None:
    """At rank 4 of 6 pivoted rows the next rank takes 3 parameters, and the one after it 1."""
    energies = torch.tensor([1e3] * 4 + [1.0, 0.5]), torch.tensor([1e5] * 8 + [16.0] + [1.0] * 11)
    layers = [
        Candidate("pivoted", 6, 6, energies[0], costs=pivoted_costs(6, 6), highest=5),
        Candidate("balanced", 20, 20, energies[1], highest=9),
    ]
    keep = (32 + 8 * 40 + 40) / 436  # of the last 40, saved 16 / 40 or 1 / 3
    assert allocate(layers, keep, "global", align=4) == {"pivoted": 4, "balanced": 9}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("align", [1, 3])
def test_steps_go_along_the_lower_convex_hull_of_price_and_loss(seed: int, align: int) -> None:
    chance = random.Random(seed)
    out, in_ = chance.randint(8, 30), chance.randint(8, 30)
    costs = pivoted_costs(out, in_) if seed % 2 else ()
    energies = falling(chance, min(out, in_)) if seed % 3 else torch.ones(min(out, in_))
    c = Candidate("a", out, in_, energies, costs=costs)
    tails, start = _tails(c), chance.randint(1, 4)
    steps = _hull(c, tails, start, c.top, align)
    slopes, corners = [slope for slope, _ in steps], [start, *(rank for _, rank in steps)]
    assert corners[-1] == c.top
    assert all(one >= other for one, other in pairwise(slopes))
    for slope, (first, last) in zip(slopes, pairwise(corners), strict=True):
        assert slope == pytest.approx(
            (tails[first] - tails[last]) / (cost(c, last) - cost(c, first))
        )
        for rank in range(first + 1, last):
            if rank % align == 0:
                line = tails[first] - slope * (cost(c, rank) - cost(c, first))
                assert tails[rank] >= line - 1e-9


def test_bounds_may_be_of_ranks_at_another_price_and_of_a_layer_that_was_larger() -> None:
    assert match_bounds((0.1, 0.5), 100, 100) == (5, 25)
    assert match_bounds((0.1, 0.5), 100, 100, unit=100) == (10, 50)
    assert match_bounds((0.1, 0.5), 100, 100, whole=20_000) == (10, 50)
    costs = tuple(range(0, 10_001, 50))
    assert match_bounds((0.1, 0.5), 100, 100, costs=costs) == (20, 100)
