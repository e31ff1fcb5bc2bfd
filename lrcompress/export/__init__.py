"""Export: folders for ``transformers``, ONNX files, ``torch.export`` programs, dense models.

Importing this package registers the folder format with ``transformers``; after it any
``from_pretrained`` loads such folders. ``lrcompress.load_pretrained`` needs no import besides.
``export_onnx`` and ``export_program`` write a model as one graph, which needs neither package.
"""

from lrcompress.export.dense import merge_dense
from lrcompress.export.onnx import export_onnx, quantize_onnx, run_onnx
from lrcompress.export.plugin import CompressionConfig, CompressionQuantizer
from lrcompress.export.pretrained import load_pretrained, save_pretrained
from lrcompress.export.remote_code import save_remote_code
from lrcompress.export.torch_export import export_program

__all__ = [
    "CompressionConfig",
    "CompressionQuantizer",
    "export_onnx",
    "export_program",
    "load_pretrained",
    "merge_dense",
    "quantize_onnx",
    "run_onnx",
    "save_pretrained",
    "save_remote_code",
]
