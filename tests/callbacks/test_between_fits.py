"""Two fits with a factoring between them, for strategies that take the module apart."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn

import lrcompress
from lrcompress.callbacks import factor_checkpoint
from lrcompress.cli import main
from lrcompress.errors import CheckpointError, PlatformError, SettingError
from lrcompress.report import Report

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
BESIDE = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from conftest import Loader, Tagger, sentences

class Sharded(Tagger):
    "FSDP2, as its users write it: layers first, then the whole."

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for block in self.blocks:
                for layer in block.values():
                    fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

class Data(L.LightningDataModule):
    def train_dataloader(self):
        count, number = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        return Loader([{{k: v[number::count] for k, v in b.items()}} for b in sentences()])

    val_dataloader = train_dataloader
"""
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"save_distributed_checkpoint": True},
}
FACTORIZE = {
    "class_path": "lrcompress.Factorize",
    "init_args": {"keep": [0.6, 0.4], "at": [0.3, 0.6], "verbose": False},
}
SAVING = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"},
}
# One group of processes for all, the first of which factors, as a job script would have it done.
FITS = """
import os
os.chdir({root!r})
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from lrcompress.cli import main

def fit(*arguments):
    recipe = ["--config", "recipe.yaml", "--model.dropout=0"]
    assert main(["fit", *recipe, "--trainer.callbacks", *arguments]) == 0

fit({one!r})
if dist.get_rank() == 0:
    dcp_to_torch_save("one/step=12.ckpt", "dense.ckpt")  # what the command of the error calls
    factor = ["factor", "--config", "recipe.yaml", "--out", "factored.ckpt", "--point", "2"]
    assert main([*factor, "--checkpoint", "one/step=12.ckpt"]) == 1
    assert main([*factor, "--checkpoint", "dense.ckpt", "--batches", "6"]) == 0
dist.barrier()
one_file = "--trainer.strategy.save_distributed_checkpoint=false"
fit({two!r}, one_file)
fit({rest!r}, one_file, "--ckpt_path", "two/step=4.ckpt")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for a sharded strategy, with a module and data beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "boundary_model.py").write_text(BESIDE.format(here=str(Path(__file__).parent)))
    flags = ["enable_progress_bar", "enable_model_summary", "logger", "use_distributed_sampler"]
    trainer = dict.fromkeys(flags, False) | {"accelerator": "cpu", "devices": 2, "max_epochs": 2}
    trainer |= {"strategy": SHARDED, "callbacks": [FACTORIZE], "num_sanity_val_steps": 0}
    recipe = {"trainer": trainer, "model": "boundary_model.Sharded", "data": "boundary_model.Data"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def callbacks(*given: dict[str, Any], where: str) -> str:
    saving = {**SAVING, "init_args": SAVING["init_args"] | {"dirpath": where}}
    return json.dumps([*given, saving])


def test_a_sharded_run_is_factored_between_two_fits(
    folder: Path, launch: Make, tagger: Make
) -> None:
    start = {"class_path": "lrcompress.StartFrom", "init_args": {"checkpoint": "factored.ckpt"}}
    start["init_args"] |= {"restart_steps": 6}
    given = {"one": callbacks(where="one")}
    given |= {name: callbacks(start, where=name) for name in ("two", "rest")}
    (folder / "fits.py").write_text(FITS.format(root=str(folder), **given))
    launch(folder / "fits.py", 2)
    names = ("dense", "factored", "two/step=12", "rest/step=12")
    files = {name: torch.load(f"{name}.ckpt", weights_only=True) for name in names}
    dense, factored, whole, rest = (files[name]["state_dict"] for name in names)

    for name in ("embed.weight", "head.weight", "head.bias"):
        assert torch.equal(dense[name], factored[name])
    (state,) = files["factored"]["callbacks"].values()
    (point,) = Report.from_dict(state["report"]).points
    assert point.keep == pytest.approx(0.4, abs=0.05)
    assert point.observed["steps"] == 6
    assert point.metrics["before"].keys() == {"val_loss"}
    model = lrcompress.restore_structure(tagger(), whole)
    model.load_state_dict(whole)
    assert len(lrcompress.Plan.of(model)) == sum(layer.rank is not None for layer in point.layers)
    assert whole.keys() == rest.keys() == factored.keys()
    for name, value in whole.items():
        assert torch.equal(value, rest[name])
        assert not torch.equal(value, factored[name])


@pytest.fixture
def dense(tagger: Make, loader: Make, trainer: Make, tmp_path: Path) -> Path:
    run = trainer(max_epochs=1)
    run.fit(tagger(), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"


def factorize(**kwargs: Any) -> lrcompress.Factorize:
    return lrcompress.Factorize(**({"keep": 0.5, "verbose": False} | kwargs))


@pytest.mark.parametrize("method", ["kfac", "svd"])
def test_it_is_what_compress_makes_of_the_weights(
    method: str, dense: Path, tagger: Make, loader: Make, batches: Make, tmp_path: Path
) -> None:
    module = tagger()
    report = factor_checkpoint(
        dense, tmp_path / "out.ckpt", module, loader(), factorize(method=method), batches=12
    )
    assert Report.load(tmp_path).points == report.points  # beside what it wrote
    held = torch.load(tmp_path / "out.ckpt", weights_only=True)
    same = tagger()
    same.load_state_dict(torch.load(dense, weights_only=True)["state_dict"])

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), batch["labels"])

    record = lrcompress.compress(same, [*batches(), *batches()], loss, method=method, keep=0.5)
    assert [x.rank for x in report.points[0].layers] == [x.rank for x in record.layers]
    for name, value in same.state_dict().items():
        torch.testing.assert_close(held["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    assert all(part.training for part in module.modules())
    assert "configure_optimizers" not in vars(module)
    again = type(module).load_from_checkpoint  # what is written is Lightning's
    with pytest.raises(RuntimeError, match=r"left\.weight"):
        again(tmp_path / "out.ckpt")


def test_the_rate_rises_over_the_first_steps_also_of_a_resumed_fit(
    dense: Path, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.ckpt")
    factor_checkpoint(dense, out, tagger(), loader(), factorize(), batches=3)
    seen: list[float] = []

    torch.optim.SGD([torch.ones(1)])  # from now on torch's own step runs hooks as well

    class SGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def fit(steps: float, **kwargs: Any) -> L.LightningModule:
        model = tagger(dropout=0.0)
        model.configure_optimizers = lambda: SGD(model.parameters(), lr=1e-3)
        start = lrcompress.StartFrom(out, restart_steps=steps)
        run = trainer(start, every_step=True, max_epochs=2)
        run.fit(model, loader(), loader(), **kwargs)
        assert start.report.points
        run.validate(model, loader(), verbose=False)  # what was trained stays
        return model

    whole = fit(0.5)
    rates = [1e-3 * min(1, (step + 1) / 6) for step in range(12)]
    assert seen == pytest.approx(rates)
    seen.clear()
    resumed = fit(6, ckpt_path=tmp_path / "step=4.ckpt")
    assert seen == pytest.approx(rates[4:])
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    seen.clear()
    fit(0)
    assert seen == [1e-3] * 12


def test_what_is_wrong_is_told(
    dense: Path, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out.ckpt"

    def fails(kind: type[Exception], message: str, **kwargs: Any) -> None:
        given = {"checkpoint": dense, "module": tagger(), "callback": factorize()} | kwargs
        with pytest.raises(kind, match=message):
            factor_checkpoint(out=out, data=loader(), **given)
        assert not out.exists()
        assert "configure_optimizers" not in vars(given["module"])

    fails(SettingError, r"point must be from 1 to 1, got 2", point=2)
    fails(SettingError, r"batches must be a whole number from 1, got 0", batches=0)
    fails(
        CheckpointError,
        r"(?s)dense.ckpt is not of this Tagger: .*size mismatch",
        module=tagger(width=8),
    )
    fails(
        CheckpointError,
        r"none.ckpt cannot be read .*no such file",
        checkpoint=tmp_path / "none.ckpt",
    )
    with pytest.raises(
        CheckpointError, match=r"was not factored between two fits; StartFrom takes"
    ):
        trainer(lrcompress.StartFrom(str(dense))).fit(tagger(), loader())
    with pytest.raises(CheckpointError, match=r"StartFrom state of version 1, got version 2"):
        lrcompress.StartFrom(str(dense)).load_state_dict({"version": 2})
    with pytest.raises(SettingError, match=r"restart_scale must be above 0"):
        lrcompress.StartFrom(str(dense), restart_scale=0)
    factor_checkpoint(dense, out, tagger(), loader(), factorize(), batches=1)
    start, other = lrcompress.StartFrom(str(out)), lrcompress.StartFrom(str(out), restart_steps=3)
    with pytest.raises(
        SettingError, match=r"restart_steps=0.05 is a share of a length that is not"
    ):
        trainer(start, max_epochs=-1).fit(tagger(), loader())
    strange: Any = SimpleNamespace(optimizers=[SimpleNamespace()])  # as DeepSpeed's are
    with pytest.raises(PlatformError, match=r"and SimpleNamespace is none; set restart_steps=0"):
        other.on_train_start(strange, tagger())


def test_one_recipe_serves_both_fits(
    folder: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--config", "recipe.yaml", "--trainer.strategy=auto", "--trainer.devices=1"]
    none = "--trainer.callbacks=null"
    factor = ["factor", "--config", "recipe.yaml", "--checkpoint", str(dense), "--out", "f.ckpt"]
    assert main([*factor, none]) == 2
    assert (
        "trainer.callbacks: expected one lrcompress.Factorize, which can" in capsys.readouterr().err
    )
    assert main([*factor, "--device=xpu:7"]) == 1
    assert "device='xpu:7': torch finds no such device here" in capsys.readouterr().err
    assert main([*factor, "--batches=2", "--device=cpu"]) == 0
    start = ["--trainer.callbacks=lrcompress.StartFrom", "--trainer.callbacks.checkpoint=f.ckpt"]
    assert main(["fit", *one, none, "--trainer.max_steps=1"]) == 0
    assert main(["fit", *one, *start, "--trainer.max_steps=1"]) == 0
    (saved,) = Path("checkpoints").glob("*v1.ckpt")
    held = torch.load(saved, weights_only=True)
    assert any(name.endswith("left.weight") for name in held["state_dict"])
    assert Report.from_dict(held["callbacks"]["lrcompress.StartFrom"]["report"]).points
