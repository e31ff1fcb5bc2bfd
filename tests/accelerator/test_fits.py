"""Every callback in real fits on the stand-in device, in every precision."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lrcompress

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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:monitor_mode")
def test_a_search_tries_and_goes_back_as_on_the_cpu(
    device: SimpleNamespace, tmp_path: Path, precision: str
) -> None:
    """Where a lower loss is taken for worse, training makes the model worse than it was."""
    ends = []
    for place in ({}, {"accelerator": "cpu", "strategy": "auto"}):
        given = {"at": [0.3, 0.6], "every_n_steps": 1, "align": 1, "verbose": False}
        given |= {"drop": 0.01, "monitor": "val_loss", "monitor_mode": "max"}
        callback = lrcompress.Factorize(keep="auto", report_path=None, **given)
        model = device.tagger("kfac", tmp_path, dropout=0.0)
        run = device.trainer(
            callback, default_root_dir=tmp_path, precision=precision, limit_val_batches=1.0, **place
        )
        batches = device.sentences(10)
        run.fit(model, device.Loader(batches), device.Loader(batches[:2]))
        points = callback.report.points
        assert any("went back" in point.note for point in points)
        assert "ends within" in points[-1].note
        states = [x for state in run.optimizers[0].state.values() for x in state.values()]
        places = {x.device.type for x in (*model.parameters(), *states) if x.ndim}
        ends.append((len(places), [(point.step, len(point.search.trials)) for point in points]))
        assert all(p.numel() for p in model.parameters())
        told = [(x.value, x.kept) for point in points for x in point.search.trials]
        ends[-1] += (told[0],)
    assert ends[0][0] == ends[1][0] == 1
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-2)


class Deterministic(TorchDispatchMode):
    """Refuses on the device what CUDA refuses under ``use_deterministic_algorithms``."""

    refused = ("kthvalue", "histc", "put_", "median.dim")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.device.type != "cpu":
            floats = first.is_floating_point() and kwargs.get("dtype") not in (torch.int64,)
            assert name not in self.refused, name
            assert not (name == "cumsum" and floats), "cumsum of floats"
            weights = args[1] if len(args) > 1 else kwargs.get("weights")
            assert not (name == "bincount" and weights is not None), "bincount with weights"
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", [*RUNS, "kfac narrow", "kfac model"])
def test_nothing_is_used_that_a_deterministic_trainer_refuses(
    device: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    name, _, option = name.partition(" ") if name.startswith("kfac ") else (name, "", "")
    given = {"narrow": {"narrow_blocks": True}, "model": {"fisher": "model", "logits": "head"}}
    run = device.trainer(
        *device.callbacks(name, **given.get(option, {})), default_root_dir=tmp_path
    )
    model = device.tagger(name, tmp_path)
    with Deterministic():
        run.fit(model, device.Loader(device.sentences(10)))
    assert run.global_step == 8


def test_what_it_refuses_is_seen_in_backward_passes_too(device: SimpleNamespace) -> None:
    """Else the test above would show nothing."""
    x = torch.ones(3, device=device.DEVICE, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: g.cumsum(0))
    with Deterministic(), pytest.raises(AssertionError, match="cumsum of floats"):
        y.sum().backward()
