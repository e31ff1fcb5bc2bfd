"""Which layers can be factored further, and what is told of a layer that is replaced."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError
from lrcompress.nn import (
    KroneckerLinear,
    LowRankEmbedding,
    LowRankLinear,
    LowRankSparseLinear,
    LowRankUpdateLinear,
    NarrowLowRankLinear,
    NarrowPivotedLinear,
    PivotedLinear,
    PrunedLinear,
)
from lrcompress.structure.surgery import check_kinds, replace_

DENSE = nn.Linear(6, 8)
# What each is told to be, and what may be asked for of it.
KINDS: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
    "": (DENSE, ("any", "dense", "narrow")),
    "is low rank already": (LowRankLinear.in_place_of(DENSE, 2), ("any", "narrow")),
    "is low rank already, in pivoted rows": (
        PivotedLinear.in_place_of(DENSE, 2),
        ("any", "narrow"),
    ),
    "has lost heads, which DSEE removed, or features, since its block was narrowed": (
        PrunedLinear.in_place_of(DENSE, 4, 6),
        ("narrow",),
    ),
    "is low rank already, in a narrowed block": (
        NarrowLowRankLinear.in_place_of(DENSE, 4, 6, 2),
        ("any", "narrow"),
    ),
    "is low rank already, in pivoted rows of a narrowed block": (
        NarrowPivotedLinear.in_place_of(DENSE, 4, 6, 2),
        ("any", "narrow"),
    ),
    "is a sum of Kronecker products already": (KroneckerLinear.in_place_of(DENSE, 1, 2, 2), ()),
    "is low rank plus sparse rows, which LoSparse made": (
        LowRankSparseLinear.in_place_of(DENSE, 2),
        (),
    ),
    "is frozen with an update, which DSEE made and merges at the end": (
        LowRankUpdateLinear.in_place_of(DENSE, 2),
        (),
    ),
    "is a LowRankEmbedding": (LowRankEmbedding.in_place_of(nn.Embedding(9, 4), 2), ()),
}
ASKED: dict[str, dict[str, bool]] = {
    "any": {},
    "dense": {"dense": True},
    "narrow": {"narrow": True},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("told", KINDS)
def test_layers_that_cannot_be_factored_further_are_refused_for_what_they_are(
    told: str, asked: str
) -> None:
    layer, able = KINDS[told]
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    if asked in able:
        check_kinds(model, ["0", "1.0"], **ASKED[asked])
        return
    takes = "dense" if asked == "dense" else "dense or low-rank"
    says = f"^layer '1.0' {told}; this starts from {takes} layers: .* with exclude=, .*merge_dense"
    with pytest.raises(LayerError, match=says):
        check_kinds(model, ["0", "1.0"], **ASKED[asked])


def test_a_layer_without_hooks_shares_none_with_the_one_before() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    old = model[0]
    replace_(model, "0", LowRankLinear.in_place_of(old, 2))
    model[0].register_forward_hook(lambda *_: seen.append("new"))
    old(torch.ones(4))
    assert not seen
    model(torch.ones(4))
    assert seen == ["new"]


@pytest.mark.parametrize(
    "layer", [DENSE, Conv1D(6, 4), nn.Embedding(9, 4), BartScaledWordEmbedding(9, 4, 0)]
)
def test_what_a_layer_has_of_itself_is_not_told_of(layer: nn.Module) -> None:
    kind = LowRankEmbedding if isinstance(layer, nn.Embedding) else LowRankLinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_(model := nn.Sequential(layer), "0", kind.in_place_of(layer, 2))
    assert isinstance(model[0], kind)


def test_a_layer_that_is_none_of_this_package_is_put_in_place_without_a_word() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].temperature = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_(model, "0", new := nn.Linear(4, 4))
    assert model[0] is new


def test_hooks_of_an_embeddings_gradient_are_told_of() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    model[0].weight.register_hook(lambda gradient: gradient)
    with pytest.warns(UserWarning, match="and hooks of its weight's gradient with it$"):
        replace_(model, "0", LowRankEmbedding.in_place_of(model[0], 2))


def hook_of(module: str) -> Any:
    def hook(*_: Any) -> None:
        pass

    hook.__module__ = module
    return hook


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (hook_of("torch.distributed.fsdp"), False),
        (hook_of("torch.distributions"), True),
        (hook_of("mine.torch.distributed.x"), True),
        ([].append, True),  # of no module
    ],
    ids=["fsdp", "torch", "mine", "built in"],
)
@pytest.mark.parametrize("kind", ["state_dict_post", "load_state_dict_pre"])
def test_hooks_of_state_dicts_are_told_of_but_for_those_of_fsdp2(
    kind: str, hook: Any, told: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    if kind == "state_dict_post":
        model[0]._register_state_dict_hook(hook)
    else:
        model[0].register_load_state_dict_pre_hook(hook)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_(model, "0", LowRankLinear.in_place_of(model[0], 2))
    words = ["layer '0' is replaced, and hooks of its state dict with it"] if told else []
    assert [str(warning.message) for warning in caught] == words
