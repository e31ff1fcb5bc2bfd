"""Times as prices: measured at some sizes, lines between, and rising whatever the noise."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn

from lrcompress.bench.layer_times import UNIT, LayerTimes
from lrcompress.budget import Candidate, allocate, cost, pivoted_costs

# Wide enough that times follow from sizes, far from where noise could turn it.
WIDE, TOKENS = (512, 1024), 256


def model() -> nn.Module:
    return nn.ModuleDict({"wide": nn.Linear(1024, 512), "small": nn.Linear(64, 64)})


def times(rows: dict[str, int] | None = None) -> LayerTimes:
    return LayerTimes(model(), {"wide": TOKENS} if rows is None else rows, nullcontext)


@pytest.mark.parametrize("costs", [(), pivoted_costs(*WIDE)], ids=["balanced", "pivoted"])
def test_costs_of_ranks_are_times_that_rise(costs: tuple[int, ...]) -> None:
    measured = times()
    one = measured.priced(Candidate("wide", *WIDE, costs=costs), align=8)
    assert one.costs[0] == 0
    assert all(a < b for a, b in pairwise(one.costs))
    assert len(one.costs) == (min(WIDE) + 1 if costs else Candidate("wide", *WIDE).useful + 2)
    (plain,) = (x[0] for key, x in measured.known.items() if key[0] == "plain")
    assert one.price == one.dense == one.before == round(plain / UNIT)
    (ranks,) = (x for key, x in measured.known.items() if key[0] != "plain")
    largest = max(ranks)
    assert one.costs[largest] == pytest.approx(ranks[largest] / UNIT, rel=0.5)  # or more before it
    assert one.costs[64] < 0.6 * one.price  # 96 thousand of 524 thousand parameters
    assert 0 < one.useful <= largest


def test_a_budget_of_time_is_kept_by_the_measured_times() -> None:
    measured = times()
    layers = [measured.priced(Candidate("wide", *WIDE), 8) for _ in range(2)]
    asked = [Candidate(**{**vars(x), "name": str(i)}) for i, x in enumerate(layers)]
    ranks = allocate(asked, 0.5, "uniform", 8)
    spent = sum(cost(one, ranks[one.name]) for one in asked)
    assert 0.4 < spent / sum(one.price for one in asked) <= 0.5


def test_equal_layers_are_measured_once_and_others_by_how_much_they_read() -> None:
    measured = times({"wide": TOKENS, "small": 8})
    for _ in range(2):
        measured.priced(Candidate("wide", *WIDE), 8)
    assert len(measured.known) == 2  # the dense layer, and its factors
    measured.priced(Candidate("small", 64, 64), 8)
    assert len(measured.known) == 4
    assert {key[-1] for key in measured.known} == {TOKENS, 8}


def test_layers_that_are_not_called_are_measured_as_most_are() -> None:
    measured = times({"wide": TOKENS})
    measured.priced(Candidate("small", 64, 64), 8)
    assert {key[-1] for key in measured.known} == {TOKENS}


def test_a_block_costs_what_its_narrower_layers_do() -> None:
    block = nn.ModuleDict({"up": nn.Linear(128, 1024), "down": nn.Linear(1024, 128)})
    measured = LayerTimes(block, {"up": TOKENS, "down": TOKENS}, nullcontext)
    asked = Candidate("down", 256, 1024, most=1024, unit=256)
    one = measured.priced_block(asked, [("up", 128), ("down", 128)], 1024, align=8)
    assert one.price == one.dense == one.before
    assert len(one.costs) == 1025
    assert all(a < b for a, b in pairwise(one.costs))
    at = {key[1:3]: x[0] for key, x in measured.known.items()}
    both = (at[1024, 128] + at[128, 1024]) / UNIT
    assert one.price == pytest.approx(both, abs=2)
    assert one.costs[512] == pytest.approx((at[512, 128] + at[128, 512]) / UNIT, rel=0.5)

    narrowed = measured.priced_block(asked, [("up", 128), ("down", 128)], 512, align=8)
    assert narrowed.price < narrowed.whole == narrowed.before == one.price


def test_a_layer_of_fewer_features_is_a_share_of_the_whole_one() -> None:
    one = times().priced(Candidate("wide", *WIDE, whole=2 * 512 * 1024), 8)
    assert one.before == one.whole == pytest.approx(2 * one.price, abs=1)


def test_measuring_draws_no_random_numbers_and_changes_no_layer() -> None:
    measured = times()
    before = {name: value.clone() for name, value in measured.model.state_dict().items()}
    torch.manual_seed(3)
    measured.priced(Candidate("wide", *WIDE), 8)
    drawn = torch.randn(3)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, torch.randn(3), rtol=0, atol=0)
    for name, value in measured.model.state_dict().items():
        assert torch.equal(value, before[name])
