"""A graph that onnxruntime runs, measured by its own profile."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lrcompress.bench import OnnxModel, compare
from lrcompress.errors import SettingError


def written(path: Path, widths: Sequence[int]) -> Path:
    """A file of products with weights of these widths, then one of two activations, and a head."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    steps = [*pairwise(widths), (widths[-1], 4)]
    weights = [onnx.numpy_helper.from_array(torch.randn(*x).numpy(), f"w{x}") for x in steps]
    chain = ["x", *(f"h{i}" for i in range(len(steps) - 1))]
    node = onnx.helper.make_node
    nodes = [
        node("MatMul", [before, weight.name], [after])
        for before, weight, after in zip(chain, weights, chain[1:], strict=False)
    ]
    nodes += [
        node("Transpose", [chain[-1]], ["turned"], perm=[0, 2, 1]),
        node("MatMul", [chain[-1], "turned"], ["scores"]),
        node("MatMul", ["scores", chain[-1]], ["mixed"]),
        node("MatMul", ["mixed", weights[-1].name], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    ends = [
        [value(name, onnx.TensorProto.FLOAT, ["batch", "length", width])]
        for name, width in (("x", widths[0]), ("y", 4))
    ]
    graph = onnx.helper.make_graph(nodes, "graph", *ends, weights)
    version = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=version, ir_version=9), path)
    return path


def test_the_ideal_comes_from_products_with_weights(tmp_path: Path) -> None:
    small = written(tmp_path / "small.onnx", [512, 32, 512])
    dense = written(tmp_path / "dense.onnx", [512, 512])
    pair = [OnnxModel(path.stem, path, threads=1) for path in (small, dense)]
    batch = {"x": torch.randn(4, 64, 512)}
    now, before = (one.products(batch) for one in pair)
    assert now.size == 2 * 32 * 512 + 512 * 4
    assert before.size == 512 * 512 + 512 * 4
    assert 0.2 < before.share < 1
    run = compare(*pair, batch, device="cpu", rounds=5)
    assert (run.mode, run.batch, run.length) == ("onnx", 4, 64)
    assert run.ideal is not None
    assert 1 < run.ideal < before.size / now.size
    assert pair[1].stored_bytes == dense.stat().st_size > 4 * 512 * 512
    assert run.speeds["small"].flops is None
    with pytest.raises(SettingError, match=r"dense.onnx reads 'x'; there is y"):
        pair[1].call({"y": batch["x"]})


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = tmp_path / "model.onnx"
    path.touch()
    with pytest.raises(SettingError, match="needs onnxruntime, which is not installed: pip inst"):
        OnnxModel("model", path)
