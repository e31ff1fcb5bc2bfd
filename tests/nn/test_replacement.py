"""What every kind of layer says of itself is true of it."""

import pytest
import torch
from torch import nn

from lrcompress.nn import KINDS, NarrowLinear, Replacement

BASE = {"in": 12, "out": 8}

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def original() -> nn.Module:
    return nn.Linear(BASE["in"], BASE["out"])


def small(kind: type[Replacement]) -> dict[str, int]:
    """Own sizes of a layer of that kind: a little above the least."""
    return {size: min(least + 1, most) for size, (least, most) in kind.limits(BASE).items()}


@each_kind
def test_a_layer_is_stored_as_its_kind_says(kind: type[Replacement]) -> None:
    layer = kind.in_place_of(original(), **small(kind))
    stored = {k: tuple(v.shape) for k, v in layer.state_dict().items() if not k.endswith("bias")}
    assert stored == kind.tensors(BASE | small(kind))
    told = {part: stored[part] for part in kind.told_by}
    assert {part: len(shape) for part, shape in told.items()} == dict(kind.told_by)
    assert kind.told_sizes(told) == layer.sizes == BASE | small(kind)


@each_kind
def test_its_factors_are_all_its_parameters_but_the_bias(kind: type[Replacement]) -> None:
    layer = kind.in_place_of(original(), **small(kind))
    others = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    assert set(map(id, others)) == set(map(id, layer.factors))


@each_kind
def test_a_plain_layer_of_it_computes_the_same(kind: type[Replacement]) -> None:
    layer = kind.in_place_of(original(), **small(kind))
    for factor in layer.factors:
        nn.init.normal_(factor)
    x = torch.randn(5, BASE["in"])
    if kind is NarrowLinear:  # reads less and gives less: its own tests say what stays the same
        return
    plain = layer.to_dense()
    assert type(plain) is layer.plain is nn.Linear
    torch.testing.assert_close(plain(x), layer(x))


@each_kind
def test_it_takes_linear_layers_of_every_kind_and_no_others(kind: type[Replacement]) -> None:
    assert kind.takes(original())
    assert kind.takes(kind.in_place_of(original(), **small(kind)))
    assert not kind.takes(nn.LayerNorm(8))
