"""Embedding whose rows are Kronecker products of short rows and one block (KroneckerBERT)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ShapeError
from lrcompress.nn.low_rank_embedding import FactoredEmbedding, register_table
from lrcompress.nn.replacement import Sizes


class KroneckerEmbedding(FactoredEmbedding):
    """Embedding with rows ``left[i] ⊗ block``: each number of a short row multiplies the block.

    It has ``vocabulary·rank + width / rank`` parameters. The values of a new layer are not set:
    they are uninitialised memory.

    Args:
        num_embeddings: rows.
        embedding_dim: width of the output, a multiple of ``rank``.
        rank: width of ``left``.
        **options: ``padding_idx``, ``scale``, ``sparse``, ``device`` and ``dtype`` of
            :class:`FactoredEmbedding`.

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
        """Make a layer; its values are not yet set.

        Raises:
            ShapeError: if ``rank`` is below 1 or does not divide ``embedding_dim``.
        """
        check_divides(embedding_dim, rank)
        super().__init__(num_embeddings, embedding_dim, rank, **options)
        like = self.left.weight
        self.block = nn.Parameter(like.new_empty(1, embedding_dim // rank))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.block, self.left.weight

    def _product(self) -> Tensor:
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
        """Look up rows of ``left``, and replace each number by its multiple of the block."""
        return self._scaled((self.left(input).unsqueeze(-1) * self.block).flatten(-2))


def check_divides(width: int, rank: int) -> None:
    """Check that ``rank`` divides ``width``, so that rows can be made of blocks.

    Raises:
        ShapeError: if it does not; the message lists the ranks that do.
    """
    if rank < 1 or width % rank:
        could = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ShapeError(
            f"Kronecker rows of width {width} take a rank that divides it, got {rank}; from {could}"
        )


register_table(KroneckerEmbedding)
