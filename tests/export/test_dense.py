"""Back to plain layers: the same function, the same ties, nothing that knows of factors."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrcompress.export import load_pretrained, merge_dense, save_pretrained
from lrcompress.nn import FactoredLinear, LowRankLinear
from lrcompress.structure.plan import Plan

from .conftest import ARCHITECTURES, KINDS, inputs, made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_computes_the_same_with_the_layers_it_had(
    architecture: str, kind: str
) -> None:
    model = made(architecture, kind)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge_dense(model)
    dense = ARCHITECTURES[architecture]()
    shapes = {
        name: (type(m), [tuple(p.shape) for p in m.parameters()])
        for name, m in dense.named_modules()
    }
    assert shapes == {
        name: (type(m), [tuple(p.shape) for p in m.parameters()])
        for name, m in merged.named_modules()
    }
    assert merged.state_dict().keys() == dense.state_dict().keys()
    assert len(list(merged.parameters())) == len(list(dense.parameters())), "ties are kept"
    x = inputs(model)
    torch.testing.assert_close(merged(**x).logits, model(**x).logits)
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in merged.parameters()
    }
    assert not shared


def test_a_merged_model_is_an_ordinary_one_to_transformers(tmp_path: Path) -> None:
    save_pretrained(made("gpt2"), tmp_path / "factored")
    model = load_pretrained(tmp_path / "factored")
    merged = merge_dense(model)
    merged.save_pretrained(tmp_path / "dense")
    assert "lrcompress" not in (tmp_path / "dense" / "config.json").read_text()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert isinstance(again.transformer.h[0].attn.c_attn, Conv1D)
    x = inputs(model)
    assert again(**x).logits.equal(merged(**x).logits)
    assert Plan.of(model), "the model it was made of is as it was"
    assert model.config.quantization_config.quant_method == "lrcompress"


def test_dequantize_of_transformers_merges_in_place(tmp_path: Path) -> None:
    save_pretrained(made("bert"), tmp_path)
    model = load_pretrained(tmp_path)
    expected = model(**inputs(model)).logits
    model.dequantize()
    assert not any(isinstance(m, FactoredLinear) for m in model.modules())
    torch.testing.assert_close(model(**inputs(model)).logits, expected)
    assert not hasattr(model.config, "quantization_config")


def test_a_layer_in_two_places_stays_one() -> None:
    layer = LowRankLinear(4, 4, 2)
    other = nn.Linear(4, 4)
    other.bias = layer.left.bias
    merged = merge_dense(nn.Sequential(layer, layer, other))
    assert isinstance(merged[0], nn.Linear)
    assert merged[0] is merged[1]
    assert merged[0].bias is merged[2].bias
    assert merged[0].bias is not layer.bias


def test_a_layer_by_itself_and_a_plain_model_are_merged_too() -> None:
    layer = LowRankLinear(4, 3, 2)
    merged = merge_dense(layer)
    assert type(merged) is nn.Linear
    plain = nn.Sequential(nn.Linear(2, 2))
    copied = merge_dense(plain)
    assert copied[0] is not plain[0]
    assert copied[0].weight.equal(plain[0].weight)
