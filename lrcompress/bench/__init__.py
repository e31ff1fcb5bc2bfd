"""Benchmarks of latency, memory, FLOPs and size of models, on this machine."""

from lrcompress.bench.compare import compare
from lrcompress.bench.models import BenchModel, TorchModel
from lrcompress.bench.onnx import OnnxModel
from lrcompress.bench.record import LayerTime, Run, Speed

__all__ = ["BenchModel", "LayerTime", "OnnxModel", "Run", "Speed", "TorchModel", "compare"]
