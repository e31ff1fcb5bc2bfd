"""An embedding of low rank behaves as the one it stands for."""

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from lrcompress.errors import LayerError
from lrcompress.nn import LowRankEmbedding
from lrcompress.statistics.views import is_embedding, view
from lrcompress.structure.plan import LayerPlan, Plan


def filled(old: nn.Embedding, rank: int) -> LowRankEmbedding:
    layer = LowRankEmbedding.in_place_of(old, rank)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_looks_up_rows_of_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = filled(nn.Embedding(20, 6, padding_idx=3, dtype=dtype).eval(), 2)
    tokens = torch.randint(0, 20, (4, 5))
    torch.testing.assert_close(layer(tokens), layer.weight[tokens])
    assert layer.weight.dtype == dtype
    assert not layer.training
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (20, 6, 3)
    assert view(layer, table=True).shape == (20, 6)
    assert is_embedding(layer)
    layer(tokens).sum().backward()
    assert not layer.left.weight.grad[3].any()


def test_the_scale_of_an_embedding_of_transformers_stays() -> None:
    old = BartScaledWordEmbedding(20, 6, 1, embed_scale=4.0)
    layer = filled(old, 6)
    tokens = torch.randint(0, 20, (4, 5))
    torch.testing.assert_close(layer(tokens), 4 * layer.weight[tokens])
    dense = LowRankEmbedding.in_place_of(layer, 2).to_dense()
    assert type(dense) is BartScaledWordEmbedding
    assert (dense.embed_scale, dense.padding_idx, dense.weight.shape) == (4.0, 1, (20, 6))
    assert "20, 6, rank=6, scale=4" in repr(layer)
    old.embed_scale = torch.tensor(4.0)
    with pytest.raises(LayerError, match="its scale is a tensor"):
        LowRankEmbedding.in_place_of(old, 2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), "Embedding cannot be factored: max_norm shortens"),
        (nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq divides"),
        (nn.Linear(4, 9), "Linear cannot be factored: it is no embedding"),
        (type("Shifted", (nn.Embedding,), {})(9, 4), "Shifted cannot .* something else"),
    ],
)
def test_what_does_more_than_look_up_rows_is_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        LowRankEmbedding.in_place_of(layer, 2)


def test_a_linear_layer_cannot_become_one() -> None:
    sizes = {"in": 4, "out": 9, "rank": 2}
    with pytest.raises(LayerError, match="'0' is a Linear, which cannot become 'low_rank_emb"):
        Plan((LayerPlan("0", "low_rank_embedding", sizes),)).apply_(nn.Sequential(nn.Linear(4, 9)))
