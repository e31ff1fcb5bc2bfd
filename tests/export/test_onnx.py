"""onnxruntime runs the file as torch runs the model, and int8 stays near."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrcompress.errors import ExportError, SettingError
from lrcompress.export import export_onnx, quantize_onnx, run_onnx

from .conftest import made, train_step_
from .test_torch_export import bert, example, other


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("bert", "low_rank"),
        ("gpt2", "low_rank_sparse"),
        ("llama", "low_rank"),
        ("bert", "kronecker"),
        ("bert", "pivoted"),
        ("llama", "narrow"),
        ("llama", "narrow_pivoted"),
    ],
)
def test_onnxruntime_gives_what_the_model_gives(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    model = made(architecture, kind)
    train_step_(model)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    (tmp_path / "model.int8.onnx").write_text("of another model")
    assert export_onnx(model, tmp_path, example(model)) < 1e-5
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.onnx"]
    assert "lrcompress" not in (tmp_path / "config.json").read_text()
    assert all(x.equal(state[name]) for name, x in model.state_dict().items())
    run = run_onnx(tmp_path / "model.onnx", threads=1)
    for size in (1, 3, 13):
        x = other(size, 14 - size)
        torch.testing.assert_close(run(x)["logits"], model(**x).logits, atol=1e-5, rtol=1e-5)
    if (architecture, kind) == ("bert", "low_rank"):
        small = quantize_onnx(tmp_path)
        x = other(13, 9)
        near, exact = run_onnx(small)(x)["logits"], model(**x).logits.detach()
        assert 0 < float((near - exact).abs().max()) < 0.05 * float(exact.abs().max())
        assert small.stat().st_size < (tmp_path / "model.onnx").stat().st_size


def test_what_onnx_has_not_is_told(tmp_path: Path) -> None:
    def forward(self: object, input_ids: Tensor, return_dict: bool) -> dict[str, Tensor]:
        square = input_ids.float()[:, :, None] * input_ids[:, None]
        return {"logits": torch.linalg.eigvalsh(square)}

    with pytest.raises(
        ExportError, match=r"torch\.onnx cannot write Strange: No ONNX function found for .*eigh"
    ):
        export_onnx(bert(forward), tmp_path, {"input_ids": torch.ones(2, 5).long()})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told_with_the_way_to_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("bert")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(SettingError, match=r'onnxruntime, .*: pip install "lrcompress\[onnx\]"'):
        export_onnx(model, tmp_path, example(model))
