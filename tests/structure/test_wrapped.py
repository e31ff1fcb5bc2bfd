"""Layers of other libraries are known, by real ones of peft, torchao and bitsandbytes."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear
from lrcompress.structure.wrapped import (
    adapted_names,
    check_unwrapped,
    is_adapted,
    quantised,
    unread_layers,
)


def model() -> nn.Sequential:
    return nn.Sequential(LowRankLinear(8, 8, rank=4), nn.Linear(8, 8))


def test_adapters_are_found_and_reach_up_and_down() -> None:
    plain = model()
    assert adapted_names(plain) == []
    check_unwrapped(plain)
    config = LoraConfig(r=2, target_modules=["left"], modules_to_save=["1"])
    made = get_peft_model(plain, config).base_model.model
    wrapped = adapted_names(made)
    assert {"0.left", "1"} <= {*wrapped}
    assert is_adapted("0", wrapped)
    assert is_adapted("0.left.base_layer", wrapped)
    assert is_adapted("1.original_module", wrapped)
    assert not is_adapted("0.right", wrapped)
    assert not is_adapted("10", wrapped)
    assert unread_layers(made) == {}
    with pytest.raises(LayerError, match="layer '0' has adapters, which would be lost; merge the"):
        check_unwrapped(made)


def test_quantised_factors_are_found() -> None:
    made = model()
    assert quantised(made.parameters()) is None
    quantize_(made, Int8WeightOnlyConfig(), lambda _, name: name == "0.right")
    kind = type(made[0].right.weight).__name__  # Int8Tensor, or AffineQuantizedTensor of older ones
    assert kind.endswith("Tensor")
    assert kind != "Tensor"
    assert quantised(made[0].factors) == f"quantised (torch.float32, {kind})"
    with pytest.raises(LayerError, match="the factors of layer '0' are quantised"):
        check_unwrapped(made)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_other_types_are_named_with_their_library(kind: str) -> None:
    made = nn.Sequential(nn.Linear(8, 8), getattr(bnb.nn, kind)(8, 8))
    found = unread_layers(made)
    assert found.keys() == {"1"}
    assert f"it is a {kind} of bitsandbytes, whose weight is not read here" in found["1"]
    assert torch.is_tensor(made[0].weight)
