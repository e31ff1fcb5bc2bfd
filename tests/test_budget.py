"""Ranks against the budget they share, and against every other way to share it."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lrcompress.budget import (
    ALLOCATIONS,
    Candidate,
    allocate,
    check_keep,
    cost,
    kept_share,
    kept_units,
    match_bounds,
    pivoted_costs,
)
from lrcompress.errors import SettingError

each_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)
each_seed = pytest.mark.parametrize("seed", range(12))
PIVOTED = {"balanced": 0.0, "pivoted": 1.0, "mixed": 0.5}  # share of the layers
each_storage = pytest.mark.parametrize("pivoted", PIVOTED.values(), ids=PIVOTED)


def spectrum(size: int, decay: float) -> Tensor:
    falling = (torch.rand(size).double() + 0.1).cumsum(0).flip(0)
    return falling * torch.arange(1, size + 1).double() ** -decay


def layer(
    name: str,
    out: int,
    in_: int,
    decay: float = 1.0,
    *,
    pivoted: bool = False,
    **bounds: int | None,
) -> Candidate:
    costs = pivoted_costs(out, in_) if pivoted else ()
    curve = spectrum(min(out, in_), decay)
    return Candidate(name, out, in_, curve, costs=costs, **bounds)  # type: ignore[arg-type]


def random_layers(chance: random.Random, bounded: bool, pivoted: float) -> list[Candidate]:
    keep_range = (0.0, 1.0)
    if bounded:
        keep_range = (chance.choice([0.0, 0.05, 0.2]), chance.choice([0.4, 0.7, 1.0]))
    layers = []
    for i in range(chance.randint(1, 9)):
        out, in_ = (chance.choice([2, 7, 16, 40, 64, 100]) for _ in range(2))
        rows = chance.random() < pivoted
        costs = pivoted_costs(out, in_) if rows else ()
        lowest, highest = match_bounds(keep_range, out, in_, costs=costs)
        decay = chance.uniform(0, 2)
        bounds = {"lowest": lowest, "highest": highest}
        layers.append(layer(f"layer.{i}", out, in_, decay, pivoted=rows, **bounds))
    return layers


def spent(layers: list[Candidate], ranks: dict[str, int | None]) -> int:
    return sum(cost(c, ranks[c.name]) for c in layers)


def lost(layers: list[Candidate], ranks: dict[str, int | None]) -> float:
    total = 0.0
    for c in layers:
        rank = ranks[c.name]
        if rank is not None:
            assert c.energies is not None
            total += float(c.energies[rank:].sum())
    return total


@each_allocation
@each_seed
@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("bounded", [False, True])
@each_storage
def test_keep_is_met_to_within_one_rank_of_any_layer_that_could_grow(
    allocation: str, seed: int, align: int, bounded: bool, pivoted: float
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layers = random_layers(chance, bounded, pivoted)
    total = sum(c.dense for c in layers)
    for keep in (0.05, 0.3, 0.5, 0.77, 0.95, 1.0):
        try:
            ranks = allocate(layers, keep, allocation, align)
        except SettingError as error:
            least = float(str(error).rpartition(" ")[2])
            assert keep < least
            keep = min(1.0, least + 1e-4)
            ranks = allocate(layers, keep, allocation, align)
        assert list(ranks) == [c.name for c in layers]
        left = math.floor(keep * total + 1e-6) - spent(layers, ranks)
        assert left >= 0
        for c in layers:
            rank = ranks[c.name]
            if rank is None:
                assert c.highest is None or not c.useful
                continue
            assert c.least <= rank <= c.useful
            assert c.highest is None or rank <= c.highest
            if rank < c.top:
                assert left < cost(c, rank + 1) - cost(c, rank)


@each_allocation
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.62])
def test_wide_layers_get_aligned_ranks_but_for_what_takes_up_the_rest(
    allocation: str, keep: float
) -> None:
    torch.manual_seed(0)
    layers = [layer(f"{i}", 256, 256 * (1 + i % 2)) for i in range(12)]
    ranks = allocate(layers, keep, allocation, align=8)
    off = [rank for rank in ranks.values() if rank is not None and rank % 8]
    assert len(off) <= 2


@pytest.mark.parametrize("width", [8, 40])
def test_layers_too_narrow_to_align_share_as_if_nothing_were_asked(width: int) -> None:
    layers = [Candidate(f"{i}", width, width) for i in range(4)]
    keep = 0.5 if width == 8 else 0.25
    assert allocate(layers, keep, align=8) == allocate(layers, keep, align=1)


@each_seed
def test_uniform_leaves_no_layer_a_rank_short_of_its_share(seed: int) -> None:
    chance = random.Random(seed)
    layers = [
        layer(f"{i}", chance.randint(30, 90), chance.randint(30, 90))
        for i in range(chance.randint(2, 9))
    ]
    ranks = allocate(layers, 0.4, "uniform")
    for c in layers:
        rank = ranks[c.name]
        assert rank is not None
        assert cost(c, rank) > 0.4 * c.dense - c.unit


def even_share(layers: list[Candidate], budget: float) -> float:
    """The share of all that, cut to each layer's bounds, takes up the budget: by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        each = [min(max(share * c.dense, cost(c, c.least)), cost(c, c.top)) for c in layers]
        low, high = (share, high) if sum(each) <= budget else (low, share)
    return low


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.8])
def test_uniform_gives_each_layer_the_even_share_as_far_as_its_bounds_allow(
    seed: int, keep: float
) -> None:
    chance = random.Random(seed)
    layers = []
    for i in range(chance.randint(2, 7)):
        out, in_ = chance.randint(20, 90), chance.randint(20, 90)
        least, most = sorted(chance.choices([0.02, 0.1, 0.3, 0.5, 0.7, 1.0], k=2))
        lowest, highest = match_bounds((least, most), out, in_)
        layers.append(Candidate(f"{i}", out, in_, lowest=lowest, highest=highest))
    budget = keep * sum(c.dense for c in layers)
    if sum(cost(c, c.least) for c in layers) > budget:
        return
    share = even_share(layers, budget)
    for c, rank in zip(layers, allocate(layers, keep, "uniform").values(), strict=True):
        fair = min(max(share * c.dense, cost(c, c.least)), cost(c, c.top))
        assert cost(c, rank) > fair - c.unit


def test_uniform_lets_layers_at_a_bound_pay_first() -> None:
    # 2 × 1000 cannot go below rank 1, half of itself; 100 × 100 may have 15 at most
    layers = [
        Candidate("small", 2, 1000, lowest=1, highest=1),
        Candidate("large", 100, 100, lowest=1, highest=15),
    ]
    ranks = allocate(layers, 0.31, "uniform")
    assert ranks == {"small": 1, "large": 13}
    assert spent(layers, ranks) <= 0.31 * 12_000


def vectors(layers: list[Candidate]) -> list[dict[str, int | None]]:
    """Every allocation there is."""
    every = []
    for c in layers:
        ranks: list[int | None] = list(range(c.least, min(c.top, c.useful) + 1))
        every.append([*ranks, None] if c.top > c.useful else ranks)
    return [
        dict(zip((c.name for c in layers), ranks, strict=True))
        for ranks in itertools.product(*every)
    ]


@each_seed
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.7])
def test_global_is_the_best_of_all_allocations_to_within_a_rank(seed: int, keep: float) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layers = [
        layer(f"{i}", *chance.choices([9, 12, 20], k=2), chance.uniform(0.3, 2), highest=99)
        for i in range(3)
    ]
    budget = keep * sum(c.dense for c in layers)
    ranks = allocate(layers, keep, "global")
    assert spent(layers, ranks) <= budget
    slack = max(c.unit for c in layers)
    within = [lost(layers, v) for v in vectors(layers) if spent(layers, v) <= budget - slack]
    best = min(within, default=math.inf)
    assert lost(layers, ranks) <= best + 1e-9


@each_seed
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("pivoted", [(), (0,), (1, 2), (0, 1, 2)])
def test_global_with_dense_layers_is_near_the_best_of_all_allocations(
    seed: int, keep: float, pivoted: tuple[int, ...]
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [chance.choices([9, 12, 20], k=2) for _ in range(3)]
    layers = [
        layer(f"{i}", *both, chance.uniform(0, 1), pivoted=i in pivoted)
        for i, both in enumerate(sizes)
    ]
    budget = keep * sum(c.dense for c in layers)
    ranks = allocate(layers, keep, "global")
    best = min(lost(layers, v) for v in vectors(layers) if spent(layers, v) <= budget)
    assert best - 1e-9 <= lost(layers, ranks) <= 1.2 * best + 1e-9


def least_lost(layers: list[Candidate], budget: int) -> float:
    """What the best allocation loses, by dynamic programming over the parameters spent."""
    best = torch.zeros(budget + 1, dtype=torch.float64)
    for c in layers:
        assert c.energies is not None
        grown = torch.full_like(best, math.inf)
        every: list[int | None] = [*range(c.least, min(c.top, c.useful) + 1), None]
        for rank in every:
            loss, price = lost([c], {c.name: rank}), cost(c, rank)
            if price <= budget:
                grown[price:] = torch.minimum(grown[price:], best[: budget + 1 - price] + loss)
        best = grown
    return float(best[-1])


@each_seed
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.9])
@each_storage
def test_global_over_many_layers_is_near_the_least_loss_there_is(
    seed: int, keep: float, pivoted: float
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layers = random_layers(chance, False, pivoted) + [
        layer(
            f"more.{i}",
            *chance.choices([20, 25, 32], k=2),
            chance.uniform(0, 2),
            pivoted=pivoted == 1,
        )
        for i in range(4)
    ]
    layers = [c for c in layers if c.dense > 100]
    ranks = allocate(layers, keep, "global")
    best = least_lost(layers, math.floor(keep * sum(c.dense for c in layers) + 1e-6))
    assert best - 1e-9 <= lost(layers, ranks) <= 1.2 * best + 1e-9


def test_every_rank_of_pivoted_rows_is_smaller_than_the_dense_layer_but_the_last() -> None:
    for out, in_ in itertools.product([1, 2, 3, 6, 12, 40], repeat=2):
        c = layer("a", out, in_, pivoted=True)
        assert c.useful == min(out, in_) - 1
        for rank in range(c.useful + 1):
            assert cost(c, rank) == rank * in_ + (out - rank) * rank
        assert cost(c, min(out, in_)) == c.dense == cost(c, None)


@each_allocation
@pytest.mark.parametrize("keep", [0.9, 0.97, 0.99])
def test_a_keep_near_one_is_spent_to_within_a_rank_of_pivoted_rows(
    allocation: str, keep: float
) -> None:
    torch.manual_seed(0)
    layers = [layer(f"{i}", 40, 40, pivoted=True) for i in range(3)]
    ranks = allocate(layers, keep, allocation)
    assert keep * 4800 - spent(layers, ranks) < 40
    if allocation == "uniform":
        assert None not in ranks.values()


def test_a_step_over_many_ranks_is_taken_as_far_as_the_budget_goes() -> None:
    """With falling prices a flat spectrum is best kept whole, which nothing is left to pay for."""
    layers = [
        Candidate(
            "steep", 20, 20, torch.tensor([1e9] * 10 + [1e-9] * 10), costs=pivoted_costs(20, 20)
        ),
        Candidate("flat", 20, 20, torch.ones(20), costs=pivoted_costs(20, 20)),
    ]
    ranks = allocate(layers, 0.7, "global")
    within = [v for v in vectors(layers) if spent(layers, v) <= 560]
    assert lost(layers, ranks) == pytest.approx(min(lost(layers, v) for v in within))


@each_seed
def test_costs_that_are_multiples_of_a_unit_change_nothing(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layers = [c for c in random_layers(chance, False, 0.0) if c.useful]
    stated = [replace(c, costs=tuple(c.prices[: c.useful + 2])) for c in layers]
    for allocation, keep in itertools.product(ALLOCATIONS, (0.65, 0.8, 0.95)):
        assert allocate(stated, keep, allocation, 4) == allocate(layers, keep, allocation, 4)


@pytest.mark.parametrize("rank", [20, 39])
def test_a_rank_of_its_own_is_kept_where_pivoted_rows_are_smaller(rank: int) -> None:
    assert allocate([layer("a", 40, 40, pivoted=True, rank=rank)], None) == {"a": rank}
    assert allocate([layer("a", 40, 40, pivoted=True, rank=40)], None) == {"a": None}


def test_a_keep_of_its_own_counts_pivoted_rows() -> None:
    found = allocate([replace(layer("a", 40, 40, pivoted=True), keep=0.75)], None)
    assert found == {"a": 20}  # 20 · 60 of 1,600


def test_global_gives_flat_spectra_whole_layers() -> None:
    """What is lost by a flat spectrum is worth nothing until the layer is dense."""
    layers = [Candidate(f"{i}", 20, 20, torch.ones(20)) for i in range(4)]
    ranks = allocate(layers, 0.6, "global")
    assert sorted(rank is None for rank in ranks.values()) == [False, False, True, True]
    assert 0.6 * 1600 - spent(layers, ranks) < 40


def test_global_puts_ranks_where_the_loss_is() -> None:
    layers = [Candidate(n, 40, 40, s * spectrum(40, 1)) for n, s in (("low", 1), ("high", 100))]
    ranks = allocate(layers, 0.4, "global")
    assert ranks["low"] is not None
    assert ranks["high"] is None or ranks["high"] > ranks["low"]


@each_allocation
def test_a_layer_whose_factors_are_not_smaller_stays_dense(allocation: str) -> None:
    layers = [layer("narrow", 2, 2), layer("wide", 40, 40)]
    ranks = allocate(layers, 0.5, allocation)
    assert ranks["narrow"] is None
    assert ranks["wide"] is not None
    assert kept_share(layers, ranks) <= 0.5


@each_allocation
def test_keep_one_leaves_everything_dense(allocation: str) -> None:
    layers = [layer("a", 30, 40), layer("b", 64, 8)]
    assert allocate(layers, 1.0, allocation, align=8) == {"a": None, "b": None}


@each_allocation
@pytest.mark.parametrize("keep", [0.9, 1.0])
def test_a_greatest_keep_holds_even_where_the_budget_allows_more(
    allocation: str, keep: float
) -> None:
    lowest, highest = match_bounds((0.0, 0.5), 40, 40)
    layers = [layer("a", 40, 40, lowest=lowest, highest=highest), layer("b", 30, 30, highest=7)]
    assert allocate(layers, keep, allocation) == {"a": 10, "b": 7}


@each_allocation
def test_ranks_and_keeps_of_their_own_are_paid_from_the_same_budget(allocation: str) -> None:
    layers = [
        layer("free", 40, 40),
        Candidate("ranked", 40, 40, spectrum(40, 1), rank=3),
        Candidate("kept", 40, 40, spectrum(40, 1), keep=0.5),
        Candidate("whole", 40, 40, spectrum(40, 1), keep=1.0),
    ]
    ranks = allocate(layers, 0.6, allocation)
    assert (ranks["ranked"], ranks["kept"], ranks["whole"]) == (3, 10, None)
    assert ranks["free"] == (0.6 * 6400 - 240 - 800 - 1600) // 80


def test_with_a_rank_or_keep_for_every_layer_no_keep_is_needed() -> None:
    layers = [Candidate("a", 40, 40, rank=3), Candidate("b", 40, 40, keep=0.25)]
    assert allocate(layers, None) == {"a": 3, "b": 5}


@pytest.mark.parametrize("rank", [20, 25, 40])
def test_a_rank_that_saves_nothing_is_dense(rank: int) -> None:
    assert allocate([Candidate("a", 40, 40, rank=rank)], None) == {"a": None}


def test_a_small_keep_of_its_own_is_rank_one() -> None:
    assert allocate([Candidate("a", 40, 40, keep=1e-6)], None) == {"a": 1}


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_of_its_own_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(SettingError, match=rf"rank of layer 'a' must be from 1 to 40, got {rank}"):
        allocate([Candidate("a", 60, 40, rank=rank)], None)


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_keep_of_its_own_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(SettingError, match=r"keep of layer 'a' must be above 0 and at most 1"):
        allocate([Candidate("a", 60, 40, keep=keep)], None)


def test_a_missing_keep_names_the_first_layer_that_needs_it() -> None:
    layers = [Candidate("a", 40, 40, rank=3), Candidate("b", 40, 40), Candidate("c", 40, 40)]
    with pytest.raises(SettingError, match=r"keep is missing: 2 of 3 layers .* first 'b'"):
        allocate(layers, None)


@each_allocation
def test_a_keep_that_cannot_be_met_says_which_could(allocation: str) -> None:
    layers = [Candidate("own", 40, 40, spectrum(40, 1), rank=10), layer("a", 40, 40, lowest=2)]
    with pytest.raises(
        SettingError,
        match=r"keep=0.2 leaves 640 of 3,200 parameters, .* take 960; the least keep is 0.3000",
    ):
        allocate(layers, 0.2, allocation)
    assert allocate(layers, 0.3, allocation) == {"own": 10, "a": 2}


@pytest.mark.parametrize("keep", [1e-9, 0.3, 1, 1.0])
def test_a_share_above_zero_and_up_to_one_is_taken(keep: float) -> None:
    assert check_keep(keep) == keep


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        (0, "got 0$"),
        (-0.1, "got -0.1$"),
        (1.5, "got 1.5$"),
        (2, r"got 2; did you mean 0.02\?"),
        (math.nan, "got nan$"),
        (math.inf, "got inf$"),
        (True, "got True$"),
        (False, "got False$"),
        ("0.3", "got '0.3'$"),
        (None, "got None$"),
        (30, r"got 30; did you mean 0.3\?"),
        (100, r"got 100; did you mean 1\?"),
        (101, "got 101$"),
        (300, "got 300$"),
    ],
)
def test_another_keep_is_refused_in_the_words_it_was_given(keep: object, found: str) -> None:
    with pytest.raises(SettingError, match=f"^share must be above 0 and at most 1 .*{found}"):
        check_keep(keep, "share")  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(40, 40), (64, 16), (7, 300)])
@pytest.mark.parametrize("keep_range", [(0.0, 1.0), (0.1, 0.5), (0.25, 0.25), (0.9, 1.0)])
@pytest.mark.parametrize("pivoted", [False, True])
def test_bounds_are_the_ranks_within_a_range_of_keeps(
    sizes: tuple[int, int], keep_range: tuple[float, float], pivoted: bool
) -> None:
    c = layer("a", *sizes, pivoted=pivoted)
    lowest, highest = match_bounds(keep_range, *sizes, costs=c.costs)
    assert lowest == 1 or cost(c, lowest - 1) < keep_range[0] * c.dense <= c.prices[lowest]
    if keep_range[1] == 1:
        assert highest is None
    else:
        assert highest is not None
        most = keep_range[1] * c.dense
        assert highest == 1 or c.prices[highest] <= most < c.prices[highest + 1]


def test_useful_ranks_are_those_whose_factors_are_smaller() -> None:
    for out, in_ in itertools.product([1, 2, 3, 6, 12, 40], repeat=2):
        c = Candidate("a", out, in_)
        assert c.useful * c.unit < c.dense <= (c.useful + 1) * c.unit


def test_shares_are_parameters_after_over_before() -> None:
    layers = [Candidate("a", 40, 40), Candidate("b", 10, 20)]
    assert kept_share(layers, {"a": 5, "b": None}) == pytest.approx((400 + 200) / 1800)


# Units


def taken(
    scores: dict[str, Tensor], prices: dict[str, int], budget: float
) -> dict[str, list[bool]]:
    """One unit after another, the best first, until one does not fit."""
    units = [
        (-float(score[i]), place, i, name)
        for place, (name, score) in enumerate(scores.items())
        for i in range(len(score))
    ]
    kept = {name: [False] * len(score) for name, score in scores.items()}
    spent, full = 0, False
    for falling, _, i, name in sorted(units):
        price = prices[name]
        full = full or spent + price > budget
        if falling == -math.inf or (not full and falling < math.inf):
            kept[name][i] = True
            spent += price
    return kept


def some_scores(chance: random.Random, levels: int, infinite: bool) -> dict[str, Tensor]:
    """Scores of a few layers; the fewer levels there are, the more of them are equal."""
    scores = {}
    for name in "abcd"[: chance.randint(1, 4)]:
        values = [chance.randint(0, levels) / levels for _ in range(chance.choice([0, 1, 5, 30]))]
        for i in range(len(values)):
            if infinite and chance.random() < 0.2:
                values[i] = chance.choice([math.inf, -math.inf, -math.inf])
        scores[name] = torch.tensor(values)
    return scores


@each_seed
@pytest.mark.parametrize("levels", [1, 4, 10**6], ids=["ties", "some_ties", "no_ties"])
@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("alike", [False, True], ids=["prices", "one_price"])
def test_kept_units_are_the_best_that_fit_one_after_another(
    seed: int, levels: int, infinite: bool, alike: bool
) -> None:
    chance = random.Random(seed)
    scores = some_scores(chance, levels, infinite)
    prices = {name: 7 if alike else chance.randint(1, 9) for name in scores}
    everything = sum(prices[name] * len(score) for name, score in scores.items())
    for budget in (0, 0.5, 6, 7, 7.5, everything / 3, everything / 2, everything - 1, everything):
        found = kept_units(scores, prices, budget)
        assert {n: kept.tolist() for n, kept in found.items()} == taken(scores, prices, budget)


@pytest.mark.parametrize("prices", [(3, 3), (3, 5)], ids=["one_price", "prices"])
def test_no_budget_keeps_what_is_beyond_price_and_no_more(prices: tuple[int, int]) -> None:
    scores = {"a": torch.tensor([1.0, math.inf]), "b": torch.tensor([math.inf, -math.inf, 2.0])}
    for budget in (-4, 0, 1):
        found = kept_units(scores, {"a": prices[0], "b": prices[1]}, budget)
        assert found["a"].tolist() == [False, True]
        assert found["b"].tolist() == [True, False, False]


@pytest.mark.parametrize("prices", [(3, 3), (3, 5)], ids=["one_price", "prices"])
def test_a_budget_of_everything_keeps_all_that_may_be(prices: tuple[int, int]) -> None:
    scores = {"a": torch.tensor([0.0, -1.0]), "b": torch.tensor([-math.inf, 2.0])}
    found = kept_units(scores, {"a": prices[0], "b": prices[1]}, 2 * sum(prices))
    assert found["a"].tolist() == [True, True]
    assert found["b"].tolist() == [False, True]


@pytest.mark.parametrize("alike", [False, True], ids=["prices", "one_price"])
def test_budgets_that_float32_cannot_tell_apart_are_met_to_the_parameter(alike: bool) -> None:
    whole = 2**26
    scores = {"a": torch.tensor([6.0]), "b": torch.arange(5, 0, -1).float()}
    prices = {"a": whole - 4, "b": 1}
    if alike:
        scores, prices = {"a": torch.arange(4, 0, -1).float()}, {"a": whole // 4 + 1}
    for more in range(-3, 5):
        found = kept_units(scores, prices, float(whole + more))
        assert {n: kept.tolist() for n, kept in found.items()} == taken(
            scores, prices, whole + more
        )


def test_what_is_kept_is_told_by_truth_values_also_where_it_is_nothing() -> None:
    for budget in (0, 3, 99):
        found = kept_units({"a": torch.ones(2), "b": torch.zeros(1)}, {"a": 3, "b": 3}, budget)
        assert {kept.dtype for kept in found.values()} == {torch.bool}


def test_layers_without_units_are_no_obstacle() -> None:
    nothing = {"a": torch.zeros(0)}
    assert kept_units(nothing, {"a": 3}, 5)["a"].tolist() == []
    assert kept_units({**nothing, "b": torch.ones(2)}, {"a": 3, "b": 4}, 5)["b"].any()


@each_allocation
def test_prices_take_the_place_of_parameters(allocation: str) -> None:
    """A layer at twice the price is one of twice the size, whatever its parameters."""
    unit, energies = 14, torch.arange(6.0, 0, -1)
    plain = [Candidate(name, 6, 8, energies) for name in "ab"]
    priced = [
        replace(one, costs=tuple(1000 * unit * r for r in range(7)), price=48_000, unit=1)
        for one in plain
    ]
    for keep in (0.3, 0.6, 0.9):
        assert allocate(priced, keep, allocation) == allocate(plain, keep, allocation)
    assert [cost(priced[0], rank) for rank in (1, 3, None)] == [14_000, 42_000, 48_000]
    assert priced[0].before == priced[0].dense == 48_000
    half = replace(priced[0], whole=96_000)
    assert kept_share([half], {"a": None}) == 0.5


# Properties

SMALL = st.integers(1, 12)
SHARES = st.floats(0.01, 1)
RANGES = st.sampled_from([(0.0, 1.0), (0.0, 0.5), (0.3, 0.6), (0.2, 1.0)])


@st.composite
def some_layers(draw: st.DrawFn, own: bool = True) -> list[Candidate]:
    """Layers of any sizes and spectra, bounded, some with a rank or a keep of their own."""
    layers = []
    torch.manual_seed(draw(st.integers(0, 99)))
    for i in range(draw(st.integers(1, 4))):
        out, in_ = draw(SMALL), draw(SMALL)
        costs = pivoted_costs(out, in_) if draw(st.booleans()) else ()
        lowest, highest = match_bounds(draw(RANGES), out, in_, costs=costs)
        c = layer(f"{i}", out, in_, lowest=lowest, highest=highest)
        kind = draw(st.sampled_from(["free", "rank", "keep"])) if own else "free"
        more = {"rank": draw(st.integers(1, c.most))} if kind == "rank" else {}
        layers.append(
            replace(c, costs=costs, keep=draw(SHARES) if kind == "keep" else None, **more)
        )
    return layers


def allocated(
    layers: list[Candidate], keep: float, allocation: str, align: int = 1
) -> dict[str, int | None]:
    try:
        return allocate(layers, keep, allocation, align)
    except SettingError as error:
        assume("the least keep is" not in str(error))
        raise


@each_allocation
@given(some_layers(), SHARES, st.integers(1, 8))
def test_no_allocation_is_above_its_budget_or_out_of_bounds(
    allocation: str, layers: list[Candidate], keep: float, align: int
) -> None:
    ranks = allocated(layers, keep, allocation, align)
    assert list(ranks) == [c.name for c in layers]
    free = [c for c in layers if c.rank is None and c.keep is None]
    assert not free or spent(layers, ranks) <= keep * sum(c.dense for c in layers) + 1e-6
    for c in free:
        rank = ranks[c.name]
        top = c.useful + 1 if rank is None else rank
        assert c.least <= top <= (c.useful + 1 if c.highest is None else max(c.highest, c.least))
        assert cost(c, rank) < c.dense or rank is None


@given(some_layers(own=False), SHARES)
def test_a_keep_is_refused_only_where_every_allocation_is_above_it(
    layers: list[Candidate], keep: float
) -> None:
    least = sum(min(cost(c, c.least), c.dense) for c in layers)
    possible = least <= keep * sum(c.dense for c in layers) + 1e-6
    for allocation in ALLOCATIONS:
        if possible:
            allocate(layers, keep, allocation)
        else:
            with pytest.raises(SettingError, match="the least keep is"):
                allocate(layers, keep, allocation)


@given(some_layers(own=False), SHARES)
def test_a_single_layer_gets_the_greatest_rank_that_fits(
    layers: list[Candidate], keep: float
) -> None:
    c = layers[0]
    fits = [cost(c, v[c.name]) for v in vectors([c])]
    for allocation in ALLOCATIONS:
        rank = allocated([c], keep, allocation)[c.name]
        assert cost(c, rank) == max(price for price in fits if price <= keep * c.dense + 1e-6)


@given(some_layers(own=False), SHARES)
def test_more_budget_loses_no_more_but_for_what_a_rank_is_worth(
    layers: list[Candidate], keep: float
) -> None:
    layers = [replace(c, costs=(), highest=99) for c in layers]
    slack = max(c.unit for c in layers) / sum(c.dense for c in layers)
    less, more = (allocated(layers, min(1, k), "global") for k in (keep, keep + slack))
    assert lost(layers, more) <= lost(layers, less) + 1e-9


@given(some_layers(own=False), SHARES, st.permutations(range(4)))
def test_the_order_of_layers_changes_nothing_but_between_equals(
    layers: list[Candidate], keep: float, order: list[int]
) -> None:
    assume(len({(c.out_features, c.in_features) for c in layers}) == len(layers))
    turned = [layers[i] for i in order if i < len(layers)]
    for allocation in ALLOCATIONS:
        assert allocated(layers, keep, allocation) == allocated(turned, keep, allocation)


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.floats(0, 99),
    st.floats(0, 99),
)
def test_units_are_the_best_that_fit_and_a_greater_budget_keeps_them_all(
    scores: list[list[int]], each: list[int], one: float, other: float
) -> None:
    units = {f"{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(scores)}
    prices = {f"{i}": price for i, price in enumerate(each)}
    less, more = (kept_units(units, prices, budget) for budget in sorted((one, other)))
    assert {n: kept.tolist() for n, kept in less.items()} == taken(units, prices, min(one, other))
    assert all((kept <= more[name]).all() for name, kept in less.items())
