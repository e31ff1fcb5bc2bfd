"""Layers that share their factors, in state dicts and in plans."""

import copy

import pytest
import torch
from torch import nn

from lrcompress.errors import CheckpointError
from lrcompress.export import merge_dense
from lrcompress.nn import LowRankEmbedding, LowRankLinear
from lrcompress.structure.parameter_counts import dense_size, sizes_before
from lrcompress.structure.plan import LayerPlan, Plan, restore_structure
from lrcompress.structure.tied_weights import same_storage, tied_layers

SIZES = {"in": 6, "out": 20, "rank": 2}
EMBED = LayerPlan("embed", "low_rank_embedding", SIZES)
HEAD = LayerPlan("head", "low_rank", SIZES, tied="embed")


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)
        if tied:
            self.head.weight = self.embed.weight


def test_a_plan_says_who_shares_whose_factors() -> None:
    model, plan = Tied(), Plan((EMBED, HEAD))
    before = dense_size(model)
    plan.apply_(model)
    assert isinstance(model.embed, LowRankEmbedding)
    assert isinstance(model.head, LowRankLinear)
    assert model.head.left.weight is model.embed.left.weight
    assert tied_layers(dict(model.named_modules())) == {"head": "embed"}
    assert Plan.of(model) == plan == Plan.from_dict(plan.to_dict())
    now = sum(p.numel() for p in model.parameters())
    assert (dense_size(model), sizes_before(model)) == (before, (now, 4 * now))
    assert "tied" not in str(Plan((EMBED,)).to_dict())
    merged = merge_dense(model)
    assert merged.head.weight is merged.embed.weight
    back = (LayerPlan(x.name, "dense", {"in": 6, "out": 20}) for x in plan)
    Plan(tuple(back)).apply_(model)
    assert model.head.weight is model.embed.weight


def test_a_state_dict_says_it_by_the_memory_it_shares() -> None:
    model = Plan((EMBED, HEAD)).apply_(Tied())
    state = model.state_dict()
    assert Plan.matching(Tied(), state) == Plan.of(model)
    assert Plan.of(restore_structure(Tied(), {"state_dict": state})) == Plan.of(model)
    apart = copy.deepcopy(state)  # which keeps what is shared
    assert Plan.matching(Tied(), apart) == Plan.of(model)
    for key, value in state.items():
        apart[key] = value.clone()  # equal values are no tie
    found = Plan.matching(Tied(), apart)
    assert [x.tied for x in found] == ["", ""]
    found.apply_(untied := Tied(False))
    assert Plan.of(untied) == found
    assert Plan.matching(model, apart) == Plan((LayerPlan("head", "low_rank", SIZES),))
    parts = {"embed": ("left.weight", "right.weight"), "head": ("right.weight", "left.weight")}
    assert same_storage(state, parts, "") == {"head": "embed"}
    assert same_storage({}, parts, "") == {}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (EMBED, LayerPlan("head", "low_rank_sparse", SIZES | {"rows": 3}, "embed")),
            "'head' of kind 'low_rank_sparse' cannot share the factors of 'embed': embeddings of",
        ),
        (
            (EMBED, LayerPlan("head", "low_rank", SIZES | {"rank": 3}, "embed")),
            "cannot share the factors of 'embed', which has .*'rank': 2",
        ),
        ((LayerPlan("head", "low_rank", SIZES, "embed"),), "cannot share the factors of 'embed'"),
        ((LayerPlan("head", "low_rank", SIZES, "nowhere"),), "cannot share .* 'nowhere'"),
    ],
)
def test_what_cannot_be_shared_is_refused(layers: tuple[LayerPlan, ...], message: str) -> None:
    model = Tied()
    with pytest.raises(CheckpointError, match=message):
        Plan(layers).apply_(model)
    assert type(model.head) is nn.Linear
    assert type(model.embed) is nn.Embedding


def test_without_memory_too() -> None:
    with torch.device("meta"):
        model = Plan((EMBED, HEAD)).apply_(Tied())
    assert model.head.right.weight is model.embed.right.weight
    assert model.embed.right.weight.is_meta
