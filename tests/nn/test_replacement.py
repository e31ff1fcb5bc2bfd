"""What every kind of layer says of itself is true of it."""

import pytest
import torch
from torch import nn

from lrcompress.nn import KINDS, FactoredEmbedding, Replacement

BASE = {"in": 12, "out": 8}

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# What these kinds compute, no plain layer of the same sizes does: their own tests say what it is.
OTHERWISE = {"narrow", "narrow_low_rank", "narrow_pivoted", "safe_embedding"}


def original(kind: type[Replacement]) -> nn.Module:
    if issubclass(kind, FactoredEmbedding):
        return nn.Embedding(BASE["out"], BASE["in"])
    return nn.Linear(BASE["in"], BASE["out"])


def made(kind: type[Replacement]) -> Replacement:
    return kind.in_place_of(original(kind), **small(kind))


def small(kind: type[Replacement]) -> dict[str, int]:
    """Own sizes of a layer of that kind: a little above the least."""
    return {size: min(least + 1, most) for size, (least, most) in kind.size_limits(BASE).items()}


@each_kind
def test_a_layer_is_stored_as_its_kind_says(kind: type[Replacement]) -> None:
    layer = made(kind)
    stored = {k: tuple(v.shape) for k, v in layer.state_dict().items() if not k.endswith("bias")}
    assert stored == kind.tensors(BASE | small(kind))
    told = {part: stored[part] for part in kind.sizing_tensors}
    assert {part: len(shape) for part, shape in told.items()} == dict(kind.sizing_tensors)
    assert kind.sizes_from_shapes(told) == layer.sizes == BASE | small(kind)


@each_kind
def test_its_factors_are_all_its_parameters_but_the_bias(kind: type[Replacement]) -> None:
    layer = made(kind)
    others = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    assert set(map(id, others)) == set(map(id, layer.factors))


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name not in OTHERWISE])
def test_a_plain_layer_of_it_computes_the_same(kind: type[Replacement]) -> None:
    layer = made(kind)
    for factor in layer.factors:
        nn.init.normal_(factor)
    x = torch.arange(5) if issubclass(kind, FactoredEmbedding) else torch.randn(5, BASE["in"])
    plain = layer.to_dense()
    assert type(plain) is layer.plain is type(original(kind))
    torch.testing.assert_close(plain(x), layer(x))


@each_kind
def test_it_takes_layers_of_its_family_and_no_others(kind: type[Replacement]) -> None:
    for other in KINDS.values():
        family = issubclass(kind, FactoredEmbedding) == issubclass(other, FactoredEmbedding)
        assert kind.can_replace(original(other)) == kind.can_replace(made(other)) == family
    assert not kind.can_replace(nn.LayerNorm(8))


@each_kind
def test_a_new_layer_is_consistent(kind: type[Replacement]) -> None:
    assert made(kind).inconsistency() is None
