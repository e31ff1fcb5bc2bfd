"""Pruning: LoSparse (low rank plus sparse rows) and DSEE (frozen weights, sparse updates)."""

from lrcompress.pruning.budget import LoSparseBudget, Quota
from lrcompress.pruning.pruner import Pruner
from lrcompress.pruning.split import check_dense, growth, preview, split_

__all__ = ["LoSparseBudget", "Pruner", "Quota", "check_dense", "growth", "preview", "split_"]
