"""A layer of Kronecker factors behaves as the linear layer it replaces, without its weight."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import ShapeError
from lrcompress.nn import KroneckerLinear
from lrcompress.nn.kronecker import carry_kronecker
from lrcompress.structure.plan import LayerPlan, Plan

IN, OUT = 12, 6
FIRSTS = [(2, 3), (3, 12), (6, 4), (1, 2), (3, 1), (1, 12), (6, 12), (1, 1), (2, 6), (3, 4)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def layer() -> KroneckerLinear:
    return KroneckerLinear(IN, OUT, 2, (2, 3))


def summed(layer: KroneckerLinear) -> Tensor:
    pairs = zip(layer.first, layer.second, strict=True)
    return torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)


@pytest.mark.parametrize("first", FIRSTS, ids=str)
@pytest.mark.parametrize("terms", [1, 3])
def test_computes_what_the_sum_of_its_products_says(first: tuple[int, int], terms: int) -> None:
    layer = KroneckerLinear(IN, OUT, terms, first).double()
    torch.testing.assert_close(layer.weight, summed(layer))
    for batch in ((), (3,), (0,), (2, 3), (2, 1, 3)):
        x = torch.randn(*batch, IN).double()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_gradients_are_those_of_the_weight(layer: KroneckerLinear) -> None:
    """So a first moment of the weight carries over exactly; transposed, too."""
    x = torch.randn(5, IN)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    assert weight.grad is not None
    for transposed in (False, True):
        held = weight.grad.mT.contiguous() if transposed else weight.grad
        carried = carry_kronecker(layer.first.detach(), layer.second.detach(), transposed)
        for parameter, value in zip(layer.factors, carried([held], False), strict=True):
            torch.testing.assert_close(parameter.grad, value)


def test_second_moments_carry_over_as_if_entries_were_independent() -> None:
    layer = KroneckerLinear(IN, OUT, 1, (2, 3))
    draws = torch.randn(20_000, OUT, IN) * torch.rand(OUT, IN)
    carry = carry_kronecker(layer.first.detach(), layer.second.detach(), False)
    carried = carry([draws.square().mean(0)], True)
    gradients = [carry([draw], False) for draw in draws[:4000]]
    for k, value in enumerate(carried):
        measured = torch.stack([one[k] for one in gradients]).square().mean(0)
        torch.testing.assert_close(measured, value, rtol=0.15, atol=0)


def test_state_keys_say_what_they_are(layer: KroneckerLinear) -> None:
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {"first": (2, 2, 3), "second": (2, 3, 4), "bias": (OUT,)}
    assert KroneckerLinear.tensors(layer.sizes) == {k: shapes[k] for k in ("first", "second")}
    assert "terms=2, first=(2, 3)" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_between_dtypes_as_a_whole_and_follows_autocast(
    layer: KroneckerLinear, dtype: torch.dtype
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, IN)).dtype == torch.bfloat16
    assert layer.to(dtype)(torch.randn(3, IN, dtype=dtype)).dtype == dtype


def test_copies_and_pickles_and_is_filled_later(layer: KroneckerLinear) -> None:
    x = torch.randn(3, IN)
    empty = KroneckerLinear(IN, OUT, 2, (2, 3), device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty):
        assert again(x).equal(layer(x))


def test_is_exported_with_any_number_of_tokens(layer: KroneckerLinear) -> None:
    for first in ((2, 3), (3, 12), (1, 2)):
        one = KroneckerLinear(IN, OUT, 2, first).eval()
        tokens = torch.export.Dim("tokens", min=2)
        program = torch.export.export(one, (torch.randn(2, 5, IN),), dynamic_shapes=({1: tokens},))
        x = torch.randn(2, 9, IN)
        torch.testing.assert_close(program.module()(x), one(x))


@pytest.mark.parametrize("conv", [False, True])
def test_takes_the_place_of_a_layer_and_goes_back(conv: bool) -> None:
    old = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, dtype=torch.float64)
    old.eval().weight.requires_grad_(False)
    new = KroneckerLinear.in_place_of(old, 2, 3, 4)
    assert new.bias is old.bias
    assert not new.training
    assert not new.first.requires_grad
    assert new.first.dtype == old.weight.dtype
    dense = new.to_dense()
    assert type(dense) is type(old)
    assert dense.bias is old.bias
    x = torch.randn(3, IN, dtype=old.weight.dtype)
    torch.testing.assert_close(dense(x), new(x))


def test_a_plan_gives_a_model_its_structure_and_state_tells_it() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    sizes = {"in": IN, "out": OUT, "terms": 2, "first_out": 2, "first_in": 3}
    plan = Plan((LayerPlan("0", "kronecker", sizes),))
    made = plan.apply_(copy.deepcopy(model))
    assert Plan.of(made) == Plan.matching(model, made.state_dict()) == plan
    back = Plan.matching(made, model.state_dict()).apply_(copy.deepcopy(made))
    assert type(back[0]) is nn.Linear
    for size, message in (("first_out", r"cannot be \[4, 3\]"), ("terms", r"cannot have terms 9")):
        wrong = sizes | {size: {"first_out": 4, "terms": 9}[size]}
        with pytest.raises(ShapeError, match=message):
            Plan((LayerPlan("0", "kronecker", wrong),)).apply_(model)
    assert KroneckerLinear.tensors(sizes | {"first_out": 0})["first"] == (2, 0, 3)


def test_bad_sizes_are_told(layer: KroneckerLinear) -> None:
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied: .* 13 features"):
        layer(torch.zeros(2, IN + 1))
    with pytest.raises(ShapeError, match=r"terms must be at least 1, got 0"):
        KroneckerLinear(IN, OUT, 0, (2, 3))
    with pytest.raises(ShapeError, match=r"nearest that does is \[3, 4\]"):
        KroneckerLinear(IN, OUT, 1, (4, 5))
