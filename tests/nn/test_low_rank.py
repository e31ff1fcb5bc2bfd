"""A factored layer behaves as the linear layer it replaces."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear

IN, OUT, RANK = 6, 4, 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def layer() -> LowRankLinear:
    return LowRankLinear(IN, OUT, RANK)


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_its_weight_and_bias_say_for_any_batch(
    batch: tuple[int, ...], bias: bool
) -> None:
    layer = LowRankLinear(IN, OUT, RANK, bias=bias)
    x = torch.randn(*batch, IN)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.bias is None) == (not bias)
    assert layer.weight.shape == (OUT, IN)


def test_another_number_of_features_is_refused_as_by_a_linear_layer(layer: LowRankLinear) -> None:
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        layer(torch.zeros(2, IN + 1))


def test_state_keys_say_what_they_are(layer: LowRankLinear) -> None:
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "right.weight": (RANK, IN),
        "left.weight": (OUT, RANK),
        "left.bias": (OUT,),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_between_dtypes_as_a_whole(layer: LowRankLinear, dtype: torch.dtype) -> None:
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(3, IN, dtype=dtype)).dtype == dtype


def test_follows_autocast(layer: LowRankLinear) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, IN)).dtype == torch.bfloat16


def test_can_be_made_without_memory_and_filled_later(layer: LowRankLinear) -> None:
    empty = LowRankLinear(IN, OUT, RANK, device="meta", dtype=torch.float16)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.dtype for p in empty.parameters()} == {torch.float16}
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, IN)
    assert empty(x).equal(layer(x))


def test_gradients_of_the_factors_are_those_of_their_product(layer: LowRankLinear) -> None:
    x = torch.randn(5, IN)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(layer.left.weight.grad, weight.grad @ layer.right.weight.mT)
    torch.testing.assert_close(layer.right.weight.grad, layer.left.weight.mT @ weight.grad)


def test_says_its_sizes(layer: LowRankLinear) -> None:
    assert f"in_features={IN}, out_features={OUT}, rank={RANK}" in repr(layer)


def test_copies_and_pickles(layer: LowRankLinear) -> None:
    x = torch.randn(3, IN)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again(x).equal(layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_takes_the_place_of_a_linear_layer_with_its_bias_and_its_flags(bias: bool) -> None:
    old = nn.Linear(IN, OUT, bias=bias, dtype=torch.bfloat16).eval()
    old.weight.requires_grad_(False)
    new = LowRankLinear.in_place_of(old, RANK)
    assert new.bias is old.bias
    assert not new.training
    assert not new.left.training
    assert {f.weight.dtype for f in (new.left, new.right)} == {torch.bfloat16}
    assert not any(f.weight.requires_grad for f in (new.left, new.right))
    assert (new.in_features, new.out_features, new.rank) == (IN, OUT, RANK)


@pytest.mark.parametrize("sizes", [(IN, OUT), (IN, IN)])
def test_takes_the_place_of_a_conv1d_and_goes_back_to_one(sizes: tuple[int, int]) -> None:
    old = Conv1D(sizes[1], sizes[0])
    new = LowRankLinear.in_place_of(old, RANK)
    again = LowRankLinear.in_place_of(new, 1)
    assert (new.in_features, new.out_features) == sizes
    assert new.bias is again.bias is old.bias
    x = torch.randn(2, 3, sizes[0])
    for layer in (new, again):
        dense = layer.to_dense()
        assert isinstance(dense, Conv1D)
        torch.testing.assert_close(dense(x), layer(x))
        assert dense.weight.shape == old.weight.shape
        assert dense.weight.is_contiguous()


def test_takes_the_place_of_factors_at_a_lower_rank(layer: LowRankLinear) -> None:
    new = LowRankLinear.in_place_of(layer.double(), 1)
    assert new.bias is layer.bias
    assert new.left.weight.shape == (OUT, 1)
    assert new.left.weight.dtype == torch.float64


def test_refuses_the_place_of_what_is_not_linear() -> None:
    with pytest.raises(LayerError, match=r"layer is a Embedding"):
        LowRankLinear.in_place_of(nn.Embedding(3, 2), 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_of_it_computes_the_same(bias: bool) -> None:
    layer = LowRankLinear(IN, OUT, RANK, bias=bias).eval()
    layer.left.weight.requires_grad_(False)
    dense = layer.to_dense()
    x = torch.randn(3, IN)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), layer(x))
    assert dense.bias is layer.bias
    assert not dense.training
    assert not dense.weight.requires_grad
    assert dense.weight.is_leaf


def test_a_dense_layer_of_one_without_memory_has_none_either() -> None:
    dense = LowRankLinear(IN, OUT, RANK, device="meta").to_dense()
    assert {p.device.type for p in dense.parameters()} == {"meta"}
    conv = LowRankLinear.in_place_of(Conv1D(OUT, IN).to("meta"), RANK).to_dense()
    assert {p.device.type for p in conv.parameters()} == {"meta"}


@pytest.mark.parametrize("where", ["linear1", "linear2", "self_attn.out_proj"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_a_torch_encoder_reads_it_as_a_dense_layer(where: str) -> None:
    dense = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    factored = copy.deepcopy(dense)
    parent, _, child = where.rpartition(".")
    layer = LowRankLinear.in_place_of(dense.get_submodule(where), RANK)
    setattr(factored.get_submodule(parent), child, layer)
    setattr(dense.get_submodule(parent), child, layer.to_dense())
    x = torch.randn(2, 5, 8)
    slow = dense(x)
    with torch.inference_mode():
        torch.testing.assert_close(factored(x), dense(x))
        torch.testing.assert_close(factored(x), slow, rtol=1e-4, atol=1e-5)
