"""Layers that replace ``nn.Linear`` and ``nn.Embedding`` in a compressed model, one kind a file."""

from collections.abc import Mapping

from lrcompress.nn.kronecker import KroneckerLinear
from lrcompress.nn.kronecker_embedding import KroneckerEmbedding
from lrcompress.nn.low_rank import FactoredLinear, LowRankLinear
from lrcompress.nn.low_rank_embedding import FactoredEmbedding, LowRankEmbedding
from lrcompress.nn.low_rank_sparse import LowRankSparseLinear
from lrcompress.nn.low_rank_update import LowRankUpdateLinear
from lrcompress.nn.narrow_low_rank import (
    NarrowLowRank,
    NarrowLowRankLinear,
    NarrowPivotedLinear,
    low_rank_in_place_of,
)
from lrcompress.nn.pivoted_linear import PivotedLinear
from lrcompress.nn.pruned_linear import PrunedLinear
from lrcompress.nn.replacement import Replacement
from lrcompress.nn.safe_embedding import SafeEmbedding

#: The name of a kind in plans, checkpoints and exported folders -> its class.
KINDS: Mapping[str, type[Replacement]] = {
    kind.kind: kind
    for kind in (
        LowRankLinear,
        LowRankSparseLinear,
        PivotedLinear,
        KroneckerLinear,
        LowRankUpdateLinear,
        PrunedLinear,
        NarrowLowRankLinear,
        NarrowPivotedLinear,
        LowRankEmbedding,
        KroneckerEmbedding,
        SafeEmbedding,
    )
}

__all__ = [
    "KINDS",
    "FactoredEmbedding",
    "FactoredLinear",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankSparseLinear",
    "LowRankUpdateLinear",
    "NarrowLowRank",
    "NarrowLowRankLinear",
    "NarrowPivotedLinear",
    "PivotedLinear",
    "PrunedLinear",
    "Replacement",
    "SafeEmbedding",
    "low_rank_in_place_of",
]
