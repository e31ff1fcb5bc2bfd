"""Low rank plus sparse rows: split layers, prune both under a budget, keep what survives."""

from lrcompress.pruning.budget import LoSparseBudget, Quota
from lrcompress.pruning.pruner import Pruner
from lrcompress.pruning.split import check_dense, preview, split_

__all__ = ["LoSparseBudget", "Pruner", "Quota", "check_dense", "preview", "split_"]
