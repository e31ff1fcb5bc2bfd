"""Lightning callbacks that compress a model during a fit, and a plugin for its checkpoints."""

from lrcompress.callbacks.between_fits import StartFrom, factor_checkpoint
from lrcompress.callbacks.checkpoint_io import WholeCheckpointIO
from lrcompress.callbacks.dsee import DSEE
from lrcompress.callbacks.embedding import FactorizeEmbedding
from lrcompress.callbacks.factorize import Factorize
from lrcompress.callbacks.losparse import LoSparse

__all__ = [
    "DSEE",
    "Factorize",
    "FactorizeEmbedding",
    "LoSparse",
    "StartFrom",
    "WholeCheckpointIO",
    "factor_checkpoint",
]
