"""What a device has not is refused before the first step, with a way out that then goes through."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import PlatformError

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")


class Deep(L.LightningModule):
    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(num)
        )
        self.width = width
        self.steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        for block in self.blocks:
            batch = batch + block(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(device: SimpleNamespace, folder: Path, model: Deep, **options: Any) -> Any:
    given = {"at": "step:8", "window": "step:8", "every_n_steps": 1, "mask": None, **options}
    callback = lrcompress.Factorize(0.5, verbose=False, validate=False, report_path=None, **given)
    run = device.trainer(callback, default_root_dir=folder, max_steps=9)
    run.fit(model, device.Loader([torch.randn(4, model.width) for _ in range(9)]))
    return callback


def test_statistics_that_do_not_fit_may_take_turns(
    device: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = fit(device, tmp_path, Deep(32, 64))._needed
    more = needed.weights + max(needed.solve, needed.gradients) + needed.statistics // 3
    # weights lie there when it is asked; batches and the like are small
    monkeypatch.setattr(type(torch.vgpu), "capacity", device.counts().now + more + (1 << 16))
    model = Deep(32, 64)
    with pytest.raises(PlatformError, match=r"Factorize would take about .* GiB on vgpu:0") as told:
        fit(device, tmp_path, model)
    assert model.steps == 0
    (turns,) = re.findall(r"offload='cpu' or turns=(\d) for the statistics$", str(told.value))
    assert int(turns) in (3, 4)
    assert fit(device, tmp_path, Deep(32, 64), turns=int(turns)).report.points


def test_a_solve_that_does_not_fit_may_be_done_on_the_host(
    device: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is observed for ``svd``, and yet there is something to solve."""
    needed = fit(device, tmp_path, Deep(1, 256), method="svd")._needed
    assert needed.solve > 2 * needed.gradients
    more = needed.weights + needed.solve // 2
    monkeypatch.setattr(type(torch.vgpu), "capacity", device.counts().now + more)
    model = Deep(1, 256)
    with pytest.raises(PlatformError, match=r"Factorize would take about .*, solve_device='cpu', "):
        fit(device, tmp_path, model, method="svd")
    assert model.steps == 0
    assert fit(device, tmp_path, Deep(1, 256), method="svd", solve_device="cpu").report.points
