"""ONNX models to benchmark with onnxruntime."""

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lrcompress.bench.models import Batch, BenchModel
from lrcompress.errors import SettingError


@dataclass(frozen=True)
class Products:
    """The matrix products with weights in one call of an ONNX graph.

    Attributes:
        share: of the time of all its operators.
        size: parameters of the weights, each as often as it is used.
    """

    share: float
    size: int


class OnnxModel(BenchModel):
    """An ONNX file to benchmark with onnxruntime on the CPU; memory and FLOPs are not known.

    Args:
        name: of it in tables.
        path: of the file; external weights beside it count among ``stored_bytes``.
        threads: that it may use; 0 lets onnxruntime choose.

    Raises:
        FileNotFoundError: if there is no such file.
        SettingError: if onnxruntime is not installed; of :meth:`call`, if the graph reads an
            input that is not in the batch. ``token_type_ids`` are zeros where they are missing.
    """

    mode = "onnx"
    parameters = None

    def __init__(self, name: str, path: str | Path, threads: int = 0) -> None:
        self.name, self.path, self.threads = name, Path(path), threads
        beside = self.path.parent.glob(f"{self.path.name}[._]data")  # of weights above 2 GB
        self.stored_bytes = sum(file.stat().st_size for file in (self.path, *beside))
        self._session = self._open()

    def _open(self, profile: Path | None = None) -> Any:
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise SettingError(
                f"{self.path} needs onnxruntime, which is not installed: pip install onnxruntime"
            ) from error
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        return runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def call(self, batch: Batch) -> object:
        return self._run(self._session, batch)

    def _run(self, session: Any, batch: Batch) -> object:
        ids = batch.get("input_ids")
        if ids is not None:  # of one text each, as a tokenizer says it
            batch = {"token_type_ids": torch.zeros_like(ids), **batch}
        names = [one.name for one in session.get_inputs()]
        missing = [name for name in names if name not in batch]
        if missing:
            raise SettingError(f"{self.path} reads {missing[0]!r}; there is {', '.join(batch)}")
        return session.run(None, {name: batch[name].numpy() for name in names})

    def products(self, batch: Batch, rounds: int = 5) -> Products:
        """Measure the products with weights among all operators, by onnxruntime's own profile.

        Args:
            batch: keyword to tensor on the CPU, as of :meth:`call`.
            rounds: calls that are counted; one more comes before them.

        Returns:
            Their share of the time of all operators, and the number of their parameters.

        Raises:
            SettingError: if the graph reads an input that is not in the batch.
        """
        with TemporaryDirectory() as folder:
            session = self._open(Path(folder) / "profile")
            for _ in range(rounds + 1):
                self._run(session, batch)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        nodes = nodes[len(nodes) // (rounds + 1) :]  # the first call is not counted
        products = [node for node in nodes if _of_weights(node["args"])]
        share = sum(node["dur"] for node in products) / sum(node["dur"] for node in nodes)
        return Products(share, sum(_size(node["args"]) for node in products) // rounds)


def _shapes(args: dict[str, Any], side: str) -> list[list[int]]:
    return [shape for one in args[f"{side}_type_shape"] for shape in one.values()]


def _of_weights(args: dict[str, Any]) -> bool:
    """Return whether an operator multiplies with a weight, and not two activations."""
    if not any(kind in args["op_name"] for kind in ("MatMul", "Gemm")):
        return False
    return sum(len(shape) > 2 for shape in _shapes(args, "input")) < 2


def _size(args: dict[str, Any]) -> int:
    # what onnxruntime has packed is not among the inputs: both widths tell its size
    return math.prod(_shapes(args, side)[0][-1] for side in ("input", "output"))
