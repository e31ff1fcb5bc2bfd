"""A frozen layer with an update: what it computes, what it learns, what it is merged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import ShapeError
from lrcompress.nn import LowRankUpdateLinear
from lrcompress.statistics.views import view

SIZES = [(3, 4, 0), (0, 5, 0), (2, 0, 0), (0, 0, 3), (2, 4, 3)]
each_size = pytest.mark.parametrize(("rank", "entries", "heads"), SIZES)


def random_layer(rank: int = 3, entries: int = 4, heads: int = 0) -> LowRankUpdateLinear:
    torch.manual_seed(0)
    layer = LowRankUpdateLinear.in_place_of(nn.Linear(12, 8), rank, entries, heads)
    for name in ("left", "right", "entries", "coefficients"):
        nn.init.normal_(getattr(layer, name)) if getattr(layer, name).numel() else None
    layer.support.copy_(torch.tensor([3, 20, 21, 95, 50][:entries]).sort().values)
    return layer


def written_out(layer: LowRankUpdateLinear) -> Tensor:
    """The weight, by the definition."""
    weight = layer.frozen.clone()
    for row in range(8):
        for column in range(12):
            weight[row, column] += layer.left[row] @ layer.right[:, column]
            if layer.masked and not layer.mask[row, column]:
                weight[row, column] = 0
    for place, value in zip(layer.support.tolist(), layer.entries, strict=True):
        row, column = divmod(place, 12)
        if not layer.masked or layer.mask[row, column]:
            weight[row, column] += value
    for head, scale in enumerate(layer.coefficients):
        width = 12 // len(layer.coefficients)
        weight[:, head * width : (head + 1) * width] *= scale
    return weight


@each_size
@pytest.mark.parametrize("masked", [False, True])
def test_computes_what_it_says(rank: int, entries: int, heads: int, masked: bool) -> None:
    layer, x = random_layer(rank, entries, heads), torch.randn(2, 5, 12)
    if masked:
        layer.prune_(torch.rand(8, 12) > 0.5)
    with torch.no_grad():
        weight = written_out(layer)
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    plain = layer.to_dense()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain.weight, weight)
    assert plain.bias is layer.bias
    if masked:
        assert (plain.weight == 0).equal(~layer.mask)


@each_size
def test_gradients_are_those_of_the_merged_weight(rank: int, entries: int, heads: int) -> None:
    layer, x = random_layer(rank, entries, heads), torch.randn(7, 12)
    trained = [p for n, p in layer.named_parameters() if p.requires_grad and n != "bias"]
    assert layer.frozen not in set(trained)
    assert all(p.numel() for p in trained)
    goal = torch.randn(7, 8)
    found = torch.autograd.grad((layer(x) * goal).sum(), trained)
    merged = torch.autograd.grad((F.linear(x, layer.weight) * goal).sum(), trained)
    torch.testing.assert_close(found, merged)


def test_starts_as_the_layer_it_stands_for() -> None:
    dense, x = nn.Linear(12, 8).double(), torch.randn(5, 12).double()
    layer = LowRankUpdateLinear.in_place_of(dense, 3, 4, 3)
    nn.init.normal_(layer.right)
    assert torch.equal(layer(x), dense(x))
    assert layer.bias is dense.bias
    assert layer.frozen.dtype == layer.left.dtype == torch.float64
    assert torch.equal(view(layer).weight, dense.weight)


def test_a_conv1d_is_one_again() -> None:
    dense, x = Conv1D(8, 12), torch.randn(5, 12)
    layer = LowRankUpdateLinear.in_place_of(dense, 2, 3)
    torch.testing.assert_close(layer(x), dense(x))
    again = LowRankUpdateLinear.in_place_of(layer, 1).to_dense()
    assert type(again) is Conv1D
    assert torch.equal(again.weight, dense.weight)


def test_pruned_entries_do_not_come_back() -> None:
    layer = random_layer()
    first, second = torch.rand(8, 12) > 0.3, torch.rand(8, 12) > 0.3
    layer.prune_(first).prune_(second)
    assert layer.mask.equal(first & second)
    again = LowRankUpdateLinear.in_place_of(nn.Linear(12, 8), 3, 4, 0, 1)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


def test_copies_moves_and_autocasts() -> None:
    layer, x = random_layer(2, 4, 3), torch.randn(5, 12)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    for one in (layer, copy.deepcopy(layer).prune_(torch.ones(8, 12).bool())):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)


def test_says_whether_its_places_lie_within_it() -> None:
    layer = random_layer()
    assert layer.inconsistency() is None
    for wrong in (96, -1):
        layer.support[0] = wrong
        assert f"below 96, beside bool mask; got torch.int64 [{wrong}," in str(
            layer.inconsistency()
        )
    layer.support = layer.support.clamp(min=0).int()
    assert "got torch.int32" in str(layer.inconsistency())


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="5 heads cannot share 12 inputs evenly"):
        LowRankUpdateLinear.in_place_of(nn.Linear(12, 8), 1, 0, 5)
    with pytest.raises(ShapeError, match=r"kept must be \(8, 12\) as the weight, got \(12, 8\)"):
        random_layer().prune_(torch.ones(12, 8).bool())
