"""Rows that are Kronecker products."""

import pytest
import torch
from torch import nn

from lrcompress.errors import ShapeError
from lrcompress.nn import KroneckerEmbedding


def test_rows_are_kronecker_products_with_the_block() -> None:
    torch.manual_seed(0)
    layer = KroneckerEmbedding.in_place_of(nn.Embedding(20, 12, padding_idx=2), 4)
    assert layer.block.shape == (1, 3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randint(0, 20, (3, 5))
    expected = torch.stack([torch.kron(row, layer.block[0]) for row in layer.left.weight])
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(layer(tokens), expected[tokens])
    dense = layer.to_dense()
    assert type(dense) is nn.Embedding
    assert dense.padding_idx == 2
    torch.testing.assert_close(dense(tokens), layer(tokens))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert KroneckerEmbedding.tensors(layer.sizes) == shapes
    assert KroneckerEmbedding.sizes_from_shapes(shapes) == layer.sizes


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ShapeError, match="width 12 take a rank that divides it, got 5; from 1, 2"):
        KroneckerEmbedding.in_place_of(nn.Embedding(20, 12), 5)
