"""Weights of factored layers: what is free to ask, and what code that reads them gets."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.nn import KINDS, FactoredEmbedding, FactoredLinear, LowRankLinear
from lrcompress.nn.deferred_weight import DeferredWeight
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.plan import LayerPlan, Plan

SIZES = {
    "low_rank": {"rank": 2},
    "pivoted": {"rank": 2},
    "low_rank_sparse": {"rank": 2, "rows": 2},
    "kronecker": {"terms": 2, "first_out": 2, "first_in": 3},
    "updated": {"rank": 2, "entries": 3, "heads": 2, "masked": 1},
    "low_rank_embedding": {"rank": 2},
    "kronecker_embedding": {"rank": 2},
    "safe_embedding": {"rank": 2, "heads": 1, "width": 4},
}
each_kind = pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("narrow")])


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that multiplied their weight out."""
    made: list[str] = []
    for kind in (*KINDS.values(), FactoredLinear, FactoredEmbedding):
        plain = vars(kind).get("_product")
        if plain is None:
            continue

        def counted(self: Any, plain: Any = plain) -> Tensor:
            made.append(type(self).__name__)
            return plain(self)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "_product", counted)
    return made


def layer_of(kind: str) -> Any:
    table = "embedding" in kind
    model = nn.Sequential(nn.Embedding(4, 6) if table else nn.Linear(6, 4))
    known = KINDS[kind].size_limits({"in": 6, "out": 4})
    sizes = {"in": 6, "out": 4} | {k: v for k, v in SIZES[kind].items() if k in known}
    Plan((LayerPlan("0", kind, sizes),)).apply_(model)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model[0]


@each_kind
def test_what_describes_a_weight_costs_no_product(kind: str, products: list[str]) -> None:
    layer = layer_of(kind)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.size(0), weight.ndim) == (torch.Size([4, 6]), 4, 2)
    assert (weight.dim(), weight.numel(), len(weight), weight.element_size()) == (2, 24, 4, 4)
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert weight.is_floating_point()
    assert not weight.is_complex()
    assert not weight.is_cuda
    assert not weight.is_quantized
    assert products == []
    weight.detach()
    assert len(products) == 1


@each_kind
def test_its_values_are_a_plain_tensor_with_gradients(kind: str) -> None:
    layer = layer_of(kind)
    weight = layer.weight
    assert type(weight.detach()) is type(weight * 1) is Tensor
    torch.testing.assert_close(weight + 0, layer._product(), rtol=0, atol=0)
    assert torch.equal(torch.cat([weight, weight])[4:], layer._product())
    (weight * torch.arange(24.0).view(4, 6)).sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (layer._product() * torch.arange(24.0).view(4, 6)).sum().backward()
    for gradient, parameter in zip(found, layer.parameters(), strict=True):
        assert (gradient is None) == (parameter.grad is None)
        assert gradient is None or torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_dtype_is_that_of_the_factors(dtype: torch.dtype) -> None:
    layer = LowRankLinear(6, 4, 2, dtype=dtype)
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        assert layer.weight.dtype == dtype


def factored(model: nn.Module, *targets: str) -> nn.Module:
    settings = Settings(method="svd", keep=0.4, targets=targets, align=1)
    factor_(model, Statistics(), settings)
    return model


def test_t5_and_its_generate_make_no_product(products: list[str]) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    model = T5ForConditionalGeneration(config).eval()
    factored(model, "*.block.*")
    products.clear()
    ids = torch.arange(1, 7).view(1, 6)
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
        model.generate(ids, max_new_tokens=4)
    assert products == []


class Calls:
    """Counts how often layers are called."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fused_encoder_calls_factored_layers(
    padded: bool, activation: str, products: list[str]
) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True)
    model = factored(nn.TransformerEncoder(block, 2), "*.linear1", "*.linear2")
    products.clear()
    x = torch.randn(4, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4], [2]]) if padded else None
    expected = model.train()(x, src_key_padding_mask=mask)
    calls = Calls(model)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=mask)
    real = torch.ones(4, 5, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert calls.count == 4
    assert products == []


def test_layers_are_copied_and_saved_as_before() -> None:
    layer = layer_of("low_rank")
    copied = copy.deepcopy(layer)
    assert "weight" not in layer.state_dict()
    assert torch.equal(copied.weight, layer.weight + 0)
    assert isinstance(copied.weight, DeferredWeight)


class Doubled(torch.autograd.Function):
    """Code that torch's Python functions do not see, as a fused loss is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight * 2, g.mT @ x * 2


@each_kind
def test_gradients_arrive_past_torchs_python_functions(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(5, 6)
    Doubled.apply(x, layer.weight).square().sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (x @ layer._product().mT * 2).square().sum().backward()
    assert any(gradient is not None for gradient in found)
    for gradient, parameter in zip(found, layer.parameters(), strict=True):
        assert (gradient is None) == (parameter.grad is None)
        assert gradient is None or torch.allclose(gradient, parameter.grad)
    with torch.no_grad():
        once = Doubled.apply(x, layer.weight)
    torch.testing.assert_close(once, x @ layer._product().mT * 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_arrive_through_activation_checkpointing(reentrant: bool) -> None:
    layer, x = layer_of("low_rank"), torch.randn(5, 6, requires_grad=True)
    found = checkpoint(lambda x, w: (x @ w.mT).square(), x, layer.weight, use_reentrant=reentrant)
    found.sum().backward()
    found = layer.left.weight.grad.clone()
    layer.zero_grad()
    (x @ layer._product().mT).square().sum().backward()
    torch.testing.assert_close(found, layer.left.weight.grad)


@each_kind
def test_it_says_whether_gradients_reach_its_factors(kind: str) -> None:
    layer = layer_of(kind)
    assert layer.weight.requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    layer.factors[0].requires_grad_(True)
    assert layer.weight.requires_grad


def test_an_address_is_good_for_as_long_as_the_weight() -> None:
    weight = layer_of("low_rank").weight
    assert weight.data_ptr() == weight.data_ptr() == weight.untyped_storage().data_ptr()
    assert torch.equal(weight._made, weight + 0)


def test_a_parameter_is_made_of_a_plain_copy() -> None:
    layer = layer_of("low_rank")
    made = nn.Parameter(layer.weight.detach())
    assert torch.equal(made, layer._product())
