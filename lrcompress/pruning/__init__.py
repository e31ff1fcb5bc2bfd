"""Low rank plus sparse rows: split layers, prune both under a budget, keep what survives."""

from lrcompress.pruning.budget import Quota, Shares
from lrcompress.pruning.pruner import Pruner
from lrcompress.pruning.split import check_dense, outlook, split_

__all__ = ["Pruner", "Quota", "Shares", "check_dense", "outlook", "split_"]
