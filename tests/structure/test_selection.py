"""Layers are found by pattern, and those that have to stay are named with the reason."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError, NoMatchError
from lrcompress.nn import LowRankLinear, LowRankSparseLinear
from lrcompress.structure.selection import select
from lrcompress.structure.surgery import replace_


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), Conv1D(4, 6), nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.pooler, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)


BLOCKS = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


def test_linear_layers_of_numbered_blocks_are_chosen_in_module_order() -> None:
    assert select(Model()).names == BLOCKS


@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        (["*"], [], (*BLOCKS, "pooler", "head")),
        (["*.up"], [], ("blocks.0.up", "blocks.1.up")),
        (["head", "*.1.*"], [], ("blocks.1.up", "blocks.1.down", "head")),
        (None, ["*.down"], ("blocks.0.up", "blocks.1.up")),
        (["*"], ["blocks.*", "head"], ("pooler",)),
        ("pooler", (), ("pooler",)),
        ("*", "*.up", ("blocks.0.down", "blocks.1.down", "pooler", "head")),
    ],
)
def test_patterns_choose_and_leave_out(targets: Any, exclude: Any, names: Sequence[str]) -> None:
    assert select(Model(), targets, exclude).names == tuple(names)


def test_a_name_alone_is_one_pattern_and_not_its_letters() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), *(nn.Linear(4, 4) for _ in range(9)))
    assert select(model, "10").names == ("10",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["*.upp"]}, r"targets: pattern '\*.upp' matches none of the 6 .*: .*\.up"),
        ({"targets": ["haed"]}, r"targets: pattern 'haed' matches none .* names: head"),
        ({"targets": ["up"]}, r"patterns match whole names: '\*up\*' matches 2$"),
        ({"exclude": ["poler"]}, r"exclude: pattern 'poler' matches none .* names: pooler"),
        ({"targets": ["head"], "exclude": ["head"]}, "no layer is left to factor of 1 that were"),
        ({"targets": []}, "no layer is left to factor of 0 that were chosen"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest(arguments: Any, message: str) -> None:
    with pytest.raises(NoMatchError, match=message):
        select(Model(), **arguments)


def test_a_model_without_numbered_blocks_is_told_to_name_some() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with pytest.raises(NoMatchError, match=r"none of the 2 .* targets=, for example: first"):
        select(model)
    with pytest.raises(NoMatchError, match=r"none of the 0 .* example: none there"):
        select(nn.ModuleDict({"norm": nn.LayerNorm(4)}))


@pytest.mark.parametrize(("name", "kind"), [("embed", "Embedding"), ("blocks.0", "Block")])
def test_a_layer_named_in_full_that_is_not_linear_is_refused(name: str, kind: str) -> None:
    with pytest.raises(LayerError, match=f"layer '{name}' is a {kind}; known layer types are"):
        select(Model(), [name])


def refused(model: nn.Module, name: str, reason: str, *, shared: bool = False) -> None:
    """Matched by a pattern, the layer is left alone with the reason; named in full, refused."""
    chosen = select(model, ["*"], shared=shared)
    assert name not in chosen.names
    assert reason in chosen.left_alone[name]
    with pytest.raises(LayerError, match=f"layer '{name}' cannot be factored: .*{reason[:20]}"):
        select(model, [name], shared=shared)
    with pytest.raises(NoMatchError, match=f"'{name}' was left alone: .*{reason[:20]}"):
        select(model, [name + "*"], exclude=[n for n in chosen.names if n.startswith(name)])


def test_a_head_tied_to_the_embedding_is_left_alone_or_untied() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    refused(model, "head", "its weight is tied to 'embed'; pass shared=True to untie it")
    assert select(model, ["head"], shared=True).names == ("head",)


def test_a_tied_transformers_head_is_left_alone() -> None:
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    chosen = select(BertForMaskedLM(config), ["*"])
    assert len([name for name in chosen.names if ".layer.0." in name]) == 6
    assert "tied to 'bert.embeddings" in chosen.left_alone["cls.predictions.decoder"]


def test_a_layer_used_in_two_places_is_left_alone_or_taken_once() -> None:
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    refused(model, "blocks.0.up", "it is also used as 'blocks.1.up'; pass shared=True to factor")
    assert select(model, shared=True).names == ("blocks.0.up", "blocks.0.down", "blocks.1.down")


def test_the_output_of_torch_attention_is_left_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8))
    reason = "nn.MultiheadAttention reads its weight without calling it"
    refused(model, "0.self_attn.out_proj", reason)
    assert select(model).names == ("0.linear1", "0.linear2")


class Adapted(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_layers_of_an_adapter_are_refused_unless_left_out(part: str) -> None:
    model = Model()
    model.blocks[0].up = Adapted(model.blocks[0].up)
    for targets in (None, [f"blocks.0.up.{part}"]):
        with pytest.raises(
            LayerError, match=r"up\.\w+.* is wrapped by an adapter; merge the adapt"
        ):
            select(model, targets)
    assert select(model, exclude=["blocks.0.up.*"]).names == BLOCKS[1:]


class Other(nn.Linear):
    """As libraries replace layers by their own."""


def test_linear_layers_of_other_types_stay_with_a_reason() -> None:
    model = Model()
    model.blocks[0].up = Other(4, 6)
    found = select(model)
    assert found.names == BLOCKS[1:]
    assert "it is a Other of " in found.left_alone["blocks.0.up"]
    with pytest.raises(LayerError, match=r"'blocks.0.up' cannot be factored: it is a Other of"):
        select(model, ["blocks.0.up"])
    for block in model.blocks:
        block.up, block.down = Other(4, 6), Other(6, 4)
    with pytest.raises(LayerError, match=r"'blocks.0.up' cannot be factored: it is a Other of"):
        select(model)


class Packed(nn.Parameter):
    """As bitsandbytes marks its weights."""


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), False), "torch.int8, Parameter"),
        (Packed(torch.zeros(6, 4)), "torch.float32, Packed"),
    ],
)
def test_quantised_weights_are_left_alone(weight: nn.Parameter, found: str) -> None:
    model = Model()
    model.blocks[0].up.weight = weight
    assert found in select(model).left_alone["blocks.0.up"]
    refused(model, "blocks.0.up", "its weight is quantised")


@pytest.mark.parametrize("new", [LowRankLinear(4, 6, 2), LowRankSparseLinear(4, 6, 2, 3)])
def test_factored_layers_are_chosen_themselves_and_not_their_factors(new: nn.Module) -> None:
    model = Model()
    replace_(model, "blocks.0.up", new)
    assert select(model).names == BLOCKS
    assert select(model, ["*"]).names == (*BLOCKS, "pooler", "head")
