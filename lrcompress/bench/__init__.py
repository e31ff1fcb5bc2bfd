"""How fast and how large models are here: measured in turns, on this machine."""

from lrcompress.bench.compare import compare
from lrcompress.bench.models import BenchModel, TorchModel
from lrcompress.bench.onnx import OnnxModel
from lrcompress.bench.record import LayerTime, Run, Speed

__all__ = ["BenchModel", "LayerTime", "OnnxModel", "Run", "Speed", "TorchModel", "compare"]
