"""What stands in the model after compression, one layer kind a file."""

from lrcompress.nn.low_rank import Factored, LowRankLinear
from lrcompress.nn.low_rank_sparse import LowRankSparseLinear

__all__ = ["Factored", "LowRankLinear", "LowRankSparseLinear"]
