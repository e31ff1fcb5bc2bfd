"""A graph that onnxruntime runs, measured by its own profile."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrcompress.bench import OnnxSubject, compare
from lrcompress.errors import SettingError
from lrcompress.nn import LowRankLinear


class Net(nn.Module):
    """A layer, an activation and a product of two activations, which is no weight's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).relu()
        return self.head(h @ h.mT @ h)


def written(layer: nn.Module, path: Path) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    example, free = (torch.randn(2, 16, 512),), ({0: "batch", 1: "length"},)
    model = Net(layer).eval()
    torch.onnx.export(model, example, path, input_names=["x"], dynamic_shapes=free, verbose=False)
    return path


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_the_ideal_comes_from_products_with_weights(tmp_path: Path) -> None:
    small = written(LowRankLinear(512, 512, rank=32), tmp_path / "small.onnx")
    dense = written(nn.Linear(512, 512), tmp_path / "dense.onnx")
    pair = [OnnxSubject(path.stem, path, threads=1) for path in (small, dense)]
    batch = {"x": torch.randn(4, 64, 512)}
    now, before = (one.products(batch) for one in pair)
    assert now.size == 2 * 32 * 512 + 512 * 4
    assert before.size == 512 * 512 + 512 * 4
    assert 0.2 < before.share < 1
    run = compare(*pair, batch, device="cpu", rounds=5)
    assert (run.mode, run.batch, run.length) == ("onnx", 4, 64)
    assert run.ideal is not None
    assert 1 < run.ideal < before.size / now.size
    weights = sum(path.stat().st_size for path in tmp_path.glob("dense.onnx*"))
    assert pair[1].stored_bytes == weights > 4 * 512 * 512
    assert run.speeds["small"].flops is None
    with pytest.raises(SettingError, match=r"dense.onnx reads 'x'; there is y"):
        pair[1].call({"y": batch["x"]})


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = tmp_path / "model.onnx"
    path.touch()
    with pytest.raises(SettingError, match="needs onnxruntime, which is not installed: pip inst"):
        OnnxSubject("model", path)
