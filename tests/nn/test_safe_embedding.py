"""SAFE: exact to begin with, blind to padding, and able to learn from neighbours."""

import pytest
import torch
from torch import nn

from lrcompress.errors import LayerError
from lrcompress.nn import SafeEmbedding


def test_of_full_width_it_represents_a_table_exactly() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(30, 8, padding_idx=0)
    layer = SafeEmbedding.in_place_of(table, 8)
    with torch.no_grad():
        layer.left.weight.copy_(table.weight)
        layer.lift.weight.copy_(torch.eye(8))
    for tokens in (torch.randint(0, 30, (4, 7)), torch.randint(0, 30, (7,)), torch.tensor(3)):
        assert torch.equal(layer(tokens), table(tokens))
    assert torch.equal(layer.weight, table.weight)


def test_it_sees_its_neighbours_and_no_padding() -> None:
    torch.manual_seed(0)
    layer = SafeEmbedding(30, 12, 6, padding_idx=0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    tokens = torch.tensor([[5, 6, 7, 0, 0]])
    short, other = layer(tokens[:, :3]), tokens.clone()
    torch.testing.assert_close(layer(tokens)[:, :3], short)
    other[0, 2] = 9
    assert not torch.allclose(layer(other)[0, 0], short[0, 0])
    assert layer(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(("rank", "heads"), [(64, 2), (100, 1), (72, 2), (6, 1)])
def test_heads_divide_the_width(rank: int, heads: int) -> None:
    layer = SafeEmbedding(10, 128, rank)
    assert layer.heads == heads
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert SafeEmbedding.tensors(layer.sizes) == shapes
    assert layer(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 128)


def test_there_is_no_plain_embedding_that_computes_the_same() -> None:
    with pytest.raises(LayerError, match="no plain embedding that computes the same; keep it"):
        SafeEmbedding(10, 8, 4).to_dense()
