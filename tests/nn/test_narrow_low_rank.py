"""Low-rank layers that have lost outputs or inputs, beside the plain ones with zeros in place."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import ShapeError
from lrcompress.nn import (
    LowRankLinear,
    NarrowLowRankLinear,
    NarrowPivotedLinear,
    PivotedLinear,
    PrunedLinear,
    low_rank_in_place_of,
)
from lrcompress.structure.plan import Plan

ROWS = torch.tensor([True, False, True, True, False, False, True, True])
COLUMNS = torch.arange(12) % 3 > 0
each_kind = pytest.mark.parametrize("pivoted", [False, True])
each_plain = pytest.mark.parametrize(
    "plain", [nn.Linear(12, 8), nn.Linear(12, 8, bias=False), Conv1D(8, 12)]
)


def made(
    plain: nn.Module, pivoted: bool, rank: int = 3
) -> NarrowLowRankLinear | NarrowPivotedLinear:
    layer = low_rank_in_place_of(PrunedLinear.of(plain, ROWS, COLUMNS), rank, pivoted=pivoted)
    assert isinstance(layer, NarrowPivotedLinear if pivoted else NarrowLowRankLinear)
    with torch.no_grad():
        for factor in layer.factors:
            factor.normal_()
        if pivoted:
            layer.order.copy_(torch.randperm(5))
    return layer


@each_kind
@each_plain
def test_its_dense_form_has_zeros_for_what_is_gone(plain: nn.Module, pivoted: bool) -> None:
    layer, x = made(plain, pivoted), torch.randn(4, 12)
    dense = layer.to_dense()
    assert type(dense) is type(plain)
    torch.testing.assert_close(dense(x)[:, ROWS], layer(x[:, COLUMNS]))
    assert dense(x)[:, ~ROWS].count_nonzero() == 0
    assert torch.equal(dense(x), dense(x * COLUMNS))
    assert layer.weight.shape == (5, 8)
    size = 3 * (5 + 8 - 3) if pivoted else 3 * (5 + 8)
    assert sum(p.numel() for p in layer.factors) == size


@each_kind
def test_a_plan_and_a_state_dict_make_it_of_any_layer(pivoted: bool) -> None:
    narrow = nn.Sequential(made(nn.Linear(12, 8), pivoted))
    state, x = narrow.state_dict(), torch.randn(2, 8)
    plan = Plan.of(narrow)
    assert plan.layers[0].sizes == {"in": 12, "out": 8, "rows": 5, "columns": 8, "rank": 3}
    starts = [nn.Linear(12, 8), LowRankLinear(12, 8, 2), PivotedLinear(12, 8, 2)]
    starts += [PrunedLinear.of(nn.Linear(12, 8), rows=~ROWS), made(nn.Linear(12, 8), not pivoted)]
    for start in starts:
        for found in (plan, Plan.matching(nn.Sequential(start), state)):
            model = nn.Sequential(start)
            found.apply_(model).load_state_dict(state)
            assert torch.equal(model(x), narrow(x))
            assert Plan.of(model) == plan
    back = nn.Linear(12, 8).state_dict()
    assert (
        Plan.matching(narrow, {f"0.{key}": value for key, value in back.items()}).layers[0].kind
        == "dense"
    )


def test_it_keeps_its_features_where_the_form_or_the_rank_changes() -> None:
    layer = made(nn.Linear(12, 8), pivoted=True)
    balanced = layer.to_low_rank()
    again = NarrowPivotedLinear.of(balanced)
    lower = low_rank_in_place_of(layer, 2)
    for other in (balanced, again, lower):
        assert torch.equal(other.rows, ROWS)
        assert torch.equal(other.columns, COLUMNS)
        assert other.bias is layer.bias
        assert other.plain is nn.Linear
    torch.testing.assert_close(balanced.weight.detach(), layer.weight.detach())
    torch.testing.assert_close(again.weight.detach(), layer.weight.detach())
    assert isinstance(low_rank_in_place_of(nn.Linear(3, 2), 1, pivoted=True), PivotedLinear)


@each_kind
def test_ranks_and_masks_that_cannot_be_are_named(pivoted: bool) -> None:
    kind = NarrowPivotedLinear if pivoted else NarrowLowRankLinear
    with pytest.raises(ShapeError, match="with 3 outputs and 6 inputs left the rank is at most 3"):
        kind.in_place_of(nn.Linear(12, 8), 3, 6, 4)
    layer = made(nn.Linear(12, 8), pivoted)
    assert layer.inconsistency() is None
    layer.rows.zero_()
    assert layer.inconsistency() == "rows and columns must name (5, 8) features, got (0, 8)"
    if pivoted:
        layer = made(nn.Linear(12, 8), pivoted)
        layer.order.zero_()
        assert layer.inconsistency() == "its order is no permutation of 0 to 4"
