"""Self-attentive factorized embedding (SAFE) of Subformer."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.errors import LayerError
from lrcompress.nn.low_rank_embedding import FactoredEmbedding, register_table
from lrcompress.nn.replacement import Sizes

_HEAD = 32  # width of an attention head, where that divides
_WIDER = 4  # the feed-forward part against the layer


class SafeEmbedding(FactoredEmbedding):
    """Self-attentive factorized embedding (SAFE): ``lift(layer(left[tokens]))``.

    Rows of low width pass through a transformer layer before ``lift`` brings them to the full
    width. The layer has attention over the whole last axis of the input, padding excluded, and a
    feed-forward part, each ``x + branch(norm(x))``. Branches end in matrices that are zero at
    first, so a new one is ``left liftᵀ``: of full width it can be any table exactly. All its
    parameters are matrices, so that optimizers that treat biases and norms otherwise have it, like
    the table before, in one group. It has ``vocabulary·rank + 12·rank² + rank·width`` parameters.
    The values of a new table are not set: they are uninitialised memory.

    Since a row depends on the others of its sequence, there is no dense form, and models that
    generate token by token cannot use it.

    Args:
        num_embeddings: rows.
        embedding_dim: width of the output.
        rank: width of ``left`` and of the layer.
        **options: ``padding_idx``, ``scale``, ``sparse``, ``device`` and ``dtype`` of
            :class:`FactoredEmbedding`.

    Shapes:
        input ``(..., length)`` of row numbers, output ``(..., length, width)``; ``left.weight``
        ``(vocabulary, rank)``, ``lift.weight`` ``(width, rank)``, ``attention.weight``
        ``(3·rank, rank)``, ``attention_out.weight`` ``(rank, rank)``, ``feed.weight``
        ``(4·rank, rank)``, ``feed_out.weight`` ``(rank, 4·rank)``.

    Cost:
        ``12·rank² + rank·(2·length + width)`` multiply-adds a token.

    Source:
        Reid et al., "Subformer", Findings of EMNLP 2021, arXiv 2101.00234.

    Example:
        >>> SafeEmbedding(9, 6, rank=2)(Tensor([[1, 4, 2]]).long()).shape
        torch.Size([1, 3, 6])
    """

    kind = "safe_embedding"
    sizing_tensors = MappingProxyType({"left.weight": 2, "lift.weight": 2})

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, **options)
        weight = self.left.weight
        # as many heads as are at least so wide, of those numbers that divide
        self.heads = rank // _HEAD if rank % _HEAD == 0 else math.gcd(rank, max(1, rank // _HEAD))

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, False, weight.device, weight.dtype)

        self.attention, self.attention_out = linear(rank, 3 * rank), linear(rank, rank)
        self.feed, self.feed_out = linear(rank, _WIDER * rank), linear(_WIDER * rank, rank)
        self.lift = linear(rank, embedding_dim)
        for last in (self.attention_out, self.feed_out):
            nn.init.zeros_(last.weight)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        mine = (p for p in self.parameters() if p is not self.left.weight)
        return (*mine, self.left.weight)

    def _product(self) -> Tensor:
        """Return the table ``left liftᵀ`` ``(vocabulary, width)``, without the attention."""
        return self.left.weight @ self.lift.weight.mT

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (vocabulary, rank), (width, _) = shapes["left.weight"], shapes["lift.weight"]
        return {"in": width, "out": vocabulary, "rank": rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        e, wide = sizes["rank"], _WIDER * sizes["rank"]
        return {
            "left.weight": (sizes["out"], e),
            "attention.weight": (3 * e, e),
            "attention_out.weight": (e, e),
            "feed.weight": (wide, e),
            "feed_out.weight": (e, wide),
            "lift.weight": (sizes["in"], e),
        }

    def to_dense(self) -> nn.Module:
        """Raise an error: no plain embedding computes the same, as rows depend on their sequence.

        Raises:
            LayerError: always.
        """
        raise LayerError(
            "a SafeEmbedding reads whole sequences: there is no plain embedding that computes the "
            "same; keep it, or use method='low_rank'"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows of ``left``, apply the transformer layer, and lift to the full width."""
        tokens = input.reshape(-1, input.shape[-1]) if input.ndim else input.reshape(1, 1)
        x = self.left(tokens)
        x = x + self.attention_out(self._attend(_normed(x), tokens))
        x = x + self.feed_out(F.gelu(self.feed(_normed(x))))
        return self._scaled(self.lift(x)).reshape(*input.shape, self.embedding_dim)

    def _attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        mask = None
        if self.padding_idx is not None:
            real = tokens != self.padding_idx
            # of a row that is all padding nothing is read, but zeros would become NaN
            mask = (real | ~real.any(-1, keepdim=True))[:, None, None]
        split = self.attention(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


register_table(SafeEmbedding)
