"""Compressed models as folders that ``transformers`` loads, and back to plain layers.

Importing this package makes the folders known to ``transformers``; after it any
``from_pretrained`` loads them. ``lrcompress.load_pretrained`` does it by itself.
"""

from lrcompress.export.dense import merge_dense
from lrcompress.export.plugin import CompressionConfig, CompressionQuantizer
from lrcompress.export.pretrained import load_pretrained, save_pretrained

__all__ = [
    "CompressionConfig",
    "CompressionQuantizer",
    "load_pretrained",
    "merge_dense",
    "save_pretrained",
]
