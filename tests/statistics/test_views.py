"""Every known layer type in its normal form: ``y = weight x + bias``."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError
from lrcompress.nn import LowRankEmbedding, LowRankLinear
from lrcompress.statistics.views import (
    is_embedding,
    is_linear,
    register,
    stacked_matrices,
    view,
)


def conv1d(in_features: int, out_features: int) -> nn.Module:
    return Conv1D(out_features, in_features)


def attention_output(in_features: int, out_features: int) -> nn.Module:
    assert in_features == out_features
    return nn.MultiheadAttention(in_features, 1).out_proj


def low_rank(in_features: int, out_features: int) -> nn.Module:
    return LowRankLinear(in_features, out_features, 2)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("make", [nn.Linear, conv1d, low_rank, attention_output])
def test_weight_and_bias_say_what_the_layer_computes(make: object, sizes: tuple[int, int]) -> None:
    if make is attention_output and sizes[0] != sizes[1]:
        sizes = (sizes[0], sizes[0])
    layer = make(*sizes)  # type: ignore[operator]
    seen = view(layer)
    nn.init.normal_(seen.bias)
    x = torch.randn(5, 3, sizes[0])
    torch.testing.assert_close(layer(x), x @ seen.weight.mT + seen.bias)
    assert seen.shape == seen.weight.shape == (sizes[1], sizes[0])
    assert not seen.weight.requires_grad
    assert seen.transposed == (make is conv1d)
    own = {id(p) for p in layer.parameters()}
    assert {id(p) for p in (*seen.parameters, seen.bias)} == own


def test_a_layer_without_bias_has_none() -> None:
    assert view(nn.Linear(3, 2, bias=False)).bias is None


def test_the_weight_is_read_when_asked_for() -> None:
    layer = nn.Linear(3, 2)
    seen = view(layer)
    nn.init.zeros_(layer.weight)
    assert seen.weight.equal(torch.zeros(2, 3))


class Wrapped(nn.Linear):
    """Computes something else."""


@pytest.mark.parametrize(
    "layer", [nn.Embedding(3, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1), Wrapped(2, 2)]
)
def test_another_type_is_named_with_those_that_are_known(layer: nn.Module) -> None:
    assert not is_linear(layer)
    known = "known layer types are Linear, LowRankLinear, NonDynamicallyQuantizableLinear, Conv1D"
    with pytest.raises(LayerError, match=f"net.0 is a {type(layer).__name__}; known") as caught:
        view(layer, "net.0")
    assert "." not in str(caught.value).partition("known layer types are ")[2]
    for name in known.removeprefix("known layer types are ").split(", "):
        assert name in str(caught.value)


def test_a_type_that_is_registered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrcompress.statistics.views._VIEWS", {})
    register(Wrapped, lambda layer: view(nn.Linear(2, 3)))
    assert is_linear(Wrapped(2, 2))
    assert not is_linear(nn.Linear(2, 2))


def test_a_table_that_is_registered_is_known_as_an_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lrcompress.statistics.views._TABLES", {})
    layer, other = LowRankEmbedding.in_place_of(nn.Embedding(5, 4), 2), nn.Embedding(5, 4)
    assert not is_embedding(layer)
    register(LowRankEmbedding, lambda _: view(other, table=True), table=True)
    assert is_embedding(layer)
    assert not is_linear(layer)
    assert view(layer, table=True).parameters == (other.weight,)
    assert view(other, table=True).weight.equal(other.weight)
    with pytest.raises(LayerError, match="layer is a LowRankEmbedding; known"):
        view(layer)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.zeros(3, n, 9 - n)) for n in (4, 5))
        self.scale, self.gate = nn.Parameter(torch.zeros(3, 4)), nn.Linear(4, 3)


def test_matrices_of_experts_are_told_with_the_reason_why_they_stay() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 3), "moe": Experts(), "up": nn.Linear(2, 2)})
    model["block"] = Wrapped(2, 2)  # it is in a module, which has none of its own
    model["block"].inner = Experts()
    why = "it holds experts' matrices in 3-D parameters (up, down), not in layers"
    paths = [f"{name}{end}" for name in ("moe", "block.inner") for end in ("", ".up", ".down")]
    assert stacked_matrices(model) == dict.fromkeys(paths, why)


class FSDPModule:
    """Named as the class that FSDP2 puts before a layer's own."""


def test_a_unit_of_fsdp2_answers_as_what_it_was() -> None:
    unit = type("FSDPLinear", (FSDPModule, nn.Linear), {})(3, 2)
    assert is_linear(unit)
    assert view(unit).shape == (2, 3)
    assert not is_linear(type("Other", (Wrapped, nn.Linear), {})(3, 2))
