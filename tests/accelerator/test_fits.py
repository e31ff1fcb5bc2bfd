"""Every callback in real fits on the stand-in device, in every precision."""

import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from short_runs import RUNS

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", RUNS)
def test_a_fit_ends_with_another_structure_and_finite_weights(
    device: SimpleNamespace, tmp_path: Path, name: str, precision: str
) -> None:
    seen = []

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            states = (x for state in trainer.optimizers[0].state.values() for x in state.values())
            seen.extend([*module.state_dict().values(), *(x for x in states if x.ndim)])

    dense = device.Tagger().state_dict().keys()
    model, run = device.fit(name, tmp_path, Look(), precision=precision)
    assert run.global_step == 8
    assert model.state_dict().keys() != dense or name == "dsee"
    assert {value.device for value in seen} == {device.DEVICE}
    assert all(bool(value.isfinite().all()) for value in seen)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["kfac", "row_fisher", "losparse", "dsee", "embedding low_rank"])
def test_a_fit_ends_as_on_the_cpu(device: SimpleNamespace, tmp_path: Path, name: str) -> None:
    there, _ = device.fit(name, tmp_path, dropout=0.0)
    here = {"accelerator": "cpu", "strategy": "auto"}
    cpu, _ = device.fit(name, tmp_path, dropout=0.0, **here)
    mine, theirs = ({k: v.cpu() for k, v in one.state_dict().items()} for one in (cpu, there))
    torch.testing.assert_close(mine, theirs)
