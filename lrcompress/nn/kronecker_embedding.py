"""An embedding whose rows are Kronecker products of narrow rows and one block."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ShapeError
from lrcompress.nn.low_rank_embedding import FactoredEmbedding, register_table
from lrcompress.nn.replacement import Sizes


class KroneckerEmbedding(FactoredEmbedding):
    """``row i = left[i] ⊗ block``: every number of a narrow row becomes a multiple of the block.

    Shapes:
        input ``(...)`` of row numbers, output ``(..., width)``; ``left.weight``
        ``(vocabulary, rank)``, ``block`` ``(1, width / rank)``.

    Source:
        Tahaei et al., "KroneckerBERT", NAACL 2022, arXiv 2109.06243.

    Example:
        >>> layer = KroneckerEmbedding(9, 6, rank=2)
        >>> with torch.no_grad():
        ...     _ = layer.left.weight.copy_(torch.tensor([1.0, 3.0]).expand(9, 2))
        ...     _ = layer.block.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        >>> layer(torch.tensor(4)).tolist()
        [1.0, 0.0, 2.0, 3.0, 0.0, 6.0]
    """

    kind = "kronecker_embedding"
    sizing_tensors = MappingProxyType({"left.weight": 2, "block": 2})

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, **options: Any) -> None:
        """Make a layer, values not yet set.

        Raises:
            ShapeError: if the narrow width does not divide the width.
        """
        check_divides(embedding_dim, rank)
        super().__init__(num_embeddings, embedding_dim, rank, **options)
        like = self.left.weight
        self.block = nn.Parameter(like.new_empty(1, embedding_dim // rank))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.block, self.left.weight

    @property
    def weight(self) -> Tensor:
        return torch.kron(self.left.weight, self.block)

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (vocabulary, rank), (_, block) = shapes["left.weight"], shapes["block"]
        return {"in": rank * block, "out": vocabulary, "rank": rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rank = sizes["rank"]
        return {"left.weight": (sizes["out"], rank), "block": (1, sizes["in"] // rank)}

    def forward(self, input: Tensor) -> Tensor:
        """Look up narrow rows, and put a multiple of the block in place of each number."""
        return self._scaled((self.left(input).unsqueeze(-1) * self.block).flatten(-2))


def check_divides(width: int, rank: int) -> None:
    """Check that rows can be made of blocks.

    Raises:
        ShapeError: if they cannot; the message lists the widths with which they can.
    """
    if rank < 1 or width % rank:
        could = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ShapeError(
            f"Kronecker rows of width {width} take a rank that divides it, got {rank}; from {could}"
        )


register_table(KroneckerEmbedding)
