"""What stands in the model after compression, one layer kind a file."""

from collections.abc import Mapping

from lrcompress.nn.kronecker import KroneckerLinear
from lrcompress.nn.low_rank import Factored, LowRankLinear
from lrcompress.nn.low_rank_sparse import LowRankSparseLinear
from lrcompress.nn.replacement import Replacement

# What plans call a kind -> the kind.
KINDS: Mapping[str, type[Replacement]] = {
    kind.kind: kind for kind in (LowRankLinear, LowRankSparseLinear, KroneckerLinear)
}

__all__ = [
    "KINDS",
    "Factored",
    "KroneckerLinear",
    "LowRankLinear",
    "LowRankSparseLinear",
    "Replacement",
]
