"""A layer that has lost outputs or inputs, beside the plain one with zeros in their place."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.nn import LowRankLinear, LowRankUpdateLinear, PrunedLinear
from lrcompress.structure.plan import Plan

ROWS = torch.tensor([True, False, True, True, False, False, True, True])
COLUMNS = torch.arange(12) % 3 > 0
each_plain = pytest.mark.parametrize(
    "plain", [nn.Linear(12, 8), nn.Linear(12, 8, bias=False), Conv1D(8, 12)]
)


@each_plain
def test_computes_what_is_left_of_the_plain_layer(plain: nn.Module) -> None:
    x = torch.randn(3, 5, 12)
    expected = plain(x * COLUMNS)

    by_rows, by_columns = (
        PrunedLinear.of(plain, rows=ROWS),
        PrunedLinear.of(plain, columns=COLUMNS),
    )

    torch.testing.assert_close(by_rows(x), plain(x)[..., ROWS])
    torch.testing.assert_close(by_columns(x[..., COLUMNS]), expected)
    assert by_columns.bias is plain.bias
    both = PrunedLinear.of(plain, rows=ROWS, columns=COLUMNS)
    torch.testing.assert_close(both(x[..., COLUMNS]), expected[..., ROWS])
    assert sum(p.numel() for p in both.parameters()) == 5 * 8 + (5 if plain.bias is not None else 0)


@each_plain
def test_its_dense_form_has_zeros_for_what_is_gone(plain: nn.Module) -> None:
    x = torch.randn(4, 12)
    layer = PrunedLinear.of(plain, rows=ROWS, columns=COLUMNS)
    dense = layer.to_dense()
    assert type(dense) is type(plain)
    torch.testing.assert_close(dense(x)[:, ROWS], layer(x[:, COLUMNS]))
    assert dense(x)[:, ~ROWS].count_nonzero() == 0
    assert torch.equal(dense(x), dense(x * COLUMNS))
    assert torch.equal(PrunedLinear.of(dense, ROWS, COLUMNS).weight, layer.weight)


def test_a_plan_makes_it_of_any_layer_and_any_layer_of_it() -> None:
    narrow = nn.Sequential(PrunedLinear.of(nn.Linear(12, 8), rows=ROWS))
    state = narrow.state_dict()
    for start in (nn.Linear(12, 8), LowRankLinear(12, 8, 2), narrow[0].to_dense()):
        model = nn.Sequential(start)
        Plan.matching(model, state).apply_(model).load_state_dict(state)
        assert torch.equal(model[0].rows, ROWS)
        assert torch.equal(model[0].weight, narrow[0].weight)

    updated = nn.Sequential(LowRankUpdateLinear.in_place_of(nn.Linear(12, 8), 2, 3))
    held = updated.state_dict()
    Plan.matching(narrow, held).apply_(narrow).load_state_dict(held)
    x = torch.randn(2, 12)
    assert torch.equal(narrow(x), updated(x))
    assert Plan.of(narrow) == Plan.of(updated)


def test_follows_dtypes_and_says_whether_its_places_fit() -> None:
    layer = PrunedLinear.of(nn.Linear(12, 8), rows=ROWS).bfloat16()
    assert layer(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    assert layer.rows.dtype == torch.bool
    assert layer.inconsistency() is None
    left = int(ROWS.sum())
    layer.rows[1] = True
    told = f"rows and columns must name ({left}, 12) features, got ({left + 1}, 12)"
    assert layer.inconsistency() == told
    layer.rows = layer.rows.int()
    assert "must be bool" in str(layer.inconsistency())
