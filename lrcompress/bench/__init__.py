"""How fast and how large models are here: measured in turns, on this machine."""

from lrcompress.bench.compare import compare
from lrcompress.bench.models import Subject, TorchSubject
from lrcompress.bench.onnx import OnnxSubject
from lrcompress.bench.record import LayerTime, Run, Speed

__all__ = ["LayerTime", "OnnxSubject", "Run", "Speed", "Subject", "TorchSubject", "compare"]
