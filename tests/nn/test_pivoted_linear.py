"""Pivoted rows are the same matrix as the factors they come from, in fewer parameters."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.nn import LowRankLinear, PivotedLinear

SIZES = [(9, 6), (6, 9), (7, 7), (5, 1), (1, 5)]  # out, in
EVERY = [(out, in_, rank) for out, in_ in SIZES for rank in range(1, min(out, in_) + 1)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def factors(out: int, in_: int, rank: int, left: str) -> tuple[Tensor, Tensor]:
    """Factors in float64, of which ``left`` may be of lower rank than it is wide."""
    found = torch.randn(out, rank, dtype=torch.float64)
    if left == "a zero column":
        found[:, 0] = 0
    elif left == "zero":
        found.zero_()
    elif left == "equal columns":
        found[:] = found[:, :1].clone()
    elif left == "equal rows":
        found[:] = found[:1].clone()
    return found, torch.randn(rank, in_, dtype=torch.float64)


@pytest.mark.parametrize(("out", "in_", "rank"), EVERY)
@pytest.mark.parametrize("kind", ["full", "a zero column", "zero", "equal columns", "equal rows"])
def test_it_is_the_product_of_any_factors_at_every_rank(
    out: int, in_: int, rank: int, kind: str
) -> None:
    left, right = factors(out, in_, rank, kind)
    layer = PivotedLinear(in_, out, rank, dtype=torch.float64)
    stored, rows = layer.set_(left, right)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    x = torch.randn(3, in_, dtype=torch.float64)
    assert sum(p.numel() for p in layer.factors) == rank * (out + in_ - rank)
    assert layer.rest.isfinite().all()
    torch.testing.assert_close(layer.weight[:], left @ right)
    torch.testing.assert_close(stored @ rows, left @ right)
    torch.testing.assert_close(layer.left, stored)
    torch.testing.assert_close(layer(x), x @ (left @ right).mT + layer.bias)
    assert layer.inconsistency() is None
    pivots = [row for row in range(out) if layer.order[row] < rank]
    torch.testing.assert_close(layer.weight[:][pivots], rows[layer.order[pivots]])


@pytest.mark.parametrize(("out", "in_", "rank"), EVERY)
@pytest.mark.parametrize("kind", ["full", "equal columns"])
def test_it_goes_over_from_balanced_factors_and_back(
    out: int, in_: int, rank: int, kind: str
) -> None:
    old = LowRankLinear(in_, out, rank, dtype=torch.float64).eval()
    left, right = factors(out, in_, rank, kind)
    with torch.no_grad():
        old.left.weight.copy_(left)
        old.right.weight.copy_(right)
    new = PivotedLinear.of(old)
    back = new.to_low_rank()
    for layer in (new, back):
        torch.testing.assert_close(layer.weight[:], left @ right)
        assert layer.bias is old.bias
        assert layer.sizes == old.sizes
        assert not layer.training
    heights, widths = back.left.weight.norm(dim=0), back.right.weight.norm(dim=1)
    if kind == "full":
        torch.testing.assert_close(heights, widths)


def test_entries_of_the_rest_stay_small() -> None:
    for rank in (8, 100, 250):
        left = torch.linalg.qr(torch.randn(256, rank, dtype=torch.float64)).Q
        layer = PivotedLinear(64, 256, rank)
        layer.set_(left * torch.logspace(0, -6, rank), torch.randn(rank, 64))
        assert layer.rest.abs().max() < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_are_exact_to_their_rounding(dtype: torch.dtype) -> None:
    left, right = factors(40, 30, 12, "full")
    layer = PivotedLinear(30, 40, 12, dtype=dtype, bias=False)
    layer.set_(left.to(dtype), right.to(dtype))
    product = left.to(dtype).double() @ right.to(dtype).double()
    error = (layer.weight[:].double() - product).norm() / product.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert layer(torch.randn(2, 30, dtype=dtype)).dtype == dtype
    assert layer.order.dtype == torch.int64


@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_its_weight_and_bias_say_for_any_batch(
    batch: tuple[int, ...], bias: bool
) -> None:
    layer = PivotedLinear(6, 4, 2, bias=bias)
    layer.order.copy_(torch.tensor([2, 0, 3, 1]))
    x = torch.randn(*batch, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert (layer.bias is None) == (not bias)


@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_are_those_of_the_weight_by_the_chain_rule(tokens: int) -> None:
    layer = PivotedLinear(6, 5, 2, dtype=torch.float64)
    left, right = layer.set_(*factors(5, 6, 2, "full"))
    x = torch.randn(tokens, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    assert weight.grad is not None
    others = layer.order.argsort()[2:]
    torch.testing.assert_close(layer.right.grad, left.mT @ weight.grad)
    torch.testing.assert_close(layer.rest.grad, (weight.grad @ right.mT)[others])
    expected = [layer.right.grad, layer.rest.grad]
    for found, value in zip(
        layer.rows_of([left.mT @ weight.grad, weight.grad @ right.mT]), expected, strict=True
    ):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize(("out", "in_", "rank"), EVERY)
def test_the_state_of_factors_comes_back_from_that_of_rows(out: int, in_: int, rank: int) -> None:
    layer = PivotedLinear(in_, out, rank, dtype=torch.float64)
    left, right = layer.set_(*factors(out, in_, rank, "full"))
    moment = torch.randn(out, in_, dtype=torch.float64)
    whole = [left.mT @ moment, moment @ right.mT]
    found = layer.state_of_factors(layer.rows_of(whole), False)
    for one, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(one, expected)
    squares = moment.square()
    whole = [left.square().mT @ squares, squares @ right.square().mT]
    found = layer.state_of_factors(layer.rows_of(whole), True)
    for one, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(one, expected)
        assert (one >= 0).all()


def test_state_keys_say_what_they_are() -> None:
    state = PivotedLinear(6, 4, 3).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == {"right": (3, 6), "rest": (1, 3), "bias": (4,), "order": (4,)}


def test_an_order_that_is_none_is_told() -> None:
    layer = PivotedLinear(6, 4, 2)
    layer.order.copy_(torch.tensor([0, 1, 1, 3]))
    assert layer.inconsistency() == "its order is no permutation of 0 to 3"


@pytest.mark.parametrize("sizes", [(6, 4), (6, 6)])
def test_takes_the_place_of_a_conv1d_and_goes_back_to_one(sizes: tuple[int, int]) -> None:
    old = Conv1D(sizes[1], sizes[0])
    new = PivotedLinear.in_place_of(old, 2)
    for layer in (new, PivotedLinear.in_place_of(new, 1), new.to_low_rank()):
        x = torch.randn(2, 3, sizes[0])
        dense = layer.to_dense()
        assert isinstance(dense, Conv1D)
        assert layer.bias is old.bias
        torch.testing.assert_close(dense(x), layer(x))


def test_takes_over_dtype_and_flags_and_copies() -> None:
    old = nn.Linear(6, 4, dtype=torch.bfloat16).eval()
    old.weight.requires_grad_(False)
    new = PivotedLinear.in_place_of(old, 2)
    assert not new.training
    assert {p.dtype for p in new.factors} == {torch.bfloat16}
    assert not any(p.requires_grad for p in new.factors)
    assert "in_features=6, out_features=4, rank=2" in repr(new)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert copy.deepcopy(new)(x).equal(new(x))


def test_can_be_made_without_memory_and_filled_later() -> None:
    layer = PivotedLinear(6, 4, 4)
    empty = PivotedLinear(6, 4, 4, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 6)
    assert empty(x).equal(layer(x))


@pytest.mark.parametrize("tokens", [1, 7])
def test_follows_autocast(tokens: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert PivotedLinear(6, 4, 2)(torch.randn(tokens, 6)).dtype == torch.bfloat16
