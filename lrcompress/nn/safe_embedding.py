"""An embedding of narrow rows, a transformer layer over them, and a matrix that widens them."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lrcompress.errors import LayerError
from lrcompress.nn.low_rank_embedding import FactoredTable, register_table
from lrcompress.nn.replacement import Sizes

_HEAD = 32  # width of an attention head, where that divides
_WIDER = 4  # the feed-forward part against the layer


class SafeEmbedding(FactoredTable):
    """``lift(layer(left[tokens]))``: Subformer's self-attentive factorised embedding.

    The layer has attention over the whole last axis of the input, padding excluded, and a
    feed-forward part, each ``x + branch(norm(x))``. Branches end in matrices that are zero at
    first, so a new one is ``left lift``: of full width it can be any table exactly.

    Shapes:
        input ``(..., length)`` of row numbers, output ``(..., length, width)``; ``left.weight``
        ``(vocabulary, rank)``, ``lift.weight`` ``(width, rank)``.

    Source:
        Reid et al., "Subformer", Findings of EMNLP 2021, arXiv 2101.00234.
    """

    kind = "safe_embedding"
    told_by = MappingProxyType({"left.weight": 2, "lift.weight": 2})

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, **options)
        like = {"device": self.left.weight.device, "dtype": self.left.weight.dtype}
        # as many heads as are at least so wide, of those numbers that divide
        self.heads = math.gcd(rank, max(1, rank // _HEAD)) if rank % _HEAD else rank // _HEAD
        self.norm_attention = nn.LayerNorm(rank, **like)
        self.attention = nn.Linear(rank, 3 * rank, **like)
        self.attention_out = nn.Linear(rank, rank, **like)
        self.norm_feed = nn.LayerNorm(rank, **like)
        self.feed = nn.Linear(rank, _WIDER * rank, **like)
        self.feed_out = nn.Linear(_WIDER * rank, rank, **like)
        self.lift = nn.Linear(rank, embedding_dim, bias=False, **like)
        for last in (self.attention_out, self.feed_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        mine = (p for p in self.parameters() if p is not self.left.weight)
        return (*mine, self.left.weight)

    @property
    def weight(self) -> Tensor:
        """The table without its layer."""
        return self.left.weight @ self.lift.weight.mT

    @override
    @staticmethod
    def told_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (vocabulary, rank), (width, _) = shapes["left.weight"], shapes["lift.weight"]
        return {"in": width, "out": vocabulary, "rank": rank}

    @override
    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        e, wide = sizes["rank"], _WIDER * sizes["rank"]
        layers = {
            "attention": (3 * e, e),
            "attention_out": (e, e),
            "feed": (wide, e),
            "feed_out": (e, wide),
        }
        found = {"left.weight": (sizes["out"], e), "lift.weight": (sizes["in"], e)}
        for name, shape in layers.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}  # type: ignore[dict-item]
        for name in ("norm_attention", "norm_feed"):
            found |= {f"{name}.weight": (e,), f"{name}.bias": (e,)}  # type: ignore[dict-item]
        return found  # type: ignore[return-value]

    @override
    def to_dense(self) -> nn.Module:
        """Raise, since what a row becomes depends on its neighbours.

        Raises:
            LayerError: always.
        """
        raise LayerError(
            "a SafeEmbedding reads whole sequences: there is no plain embedding that computes the "
            "same; keep it, or use method='low_rank'"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look up narrow rows, let them see each other, and widen them."""
        tokens = input.reshape(-1, input.shape[-1]) if input.ndim else input.reshape(1, 1)
        x = self.left(tokens)
        x = x + self.attention_out(self._attend(self.norm_attention(x), tokens))
        x = x + self.feed_out(F.gelu(self.feed(self.norm_feed(x))))
        return self._scaled(self.lift(x)).reshape(*input.shape, self.embedding_dim)

    def _attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        mask = None
        if self.padding_idx is not None:
            real = tokens != self.padding_idx
            # of a row that is all padding nothing is read, but zeros would become NaN
            mask = (real | ~real.any(-1, keepdim=True))[:, None, None]
        split = self.attention(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*split.unbind(0), attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


register_table(SafeEmbedding)
