"""What stands in the model after compression, one layer kind a file."""

from lrcompress.nn.low_rank import LowRankLinear

__all__ = ["LowRankLinear"]
