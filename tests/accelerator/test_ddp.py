"""Two processes under DDP, each with a stand-in device, that communicate as NCCL does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

# every process takes its rows of the same batches
SCRIPT = """
import gc, os, sys
sys.path.insert(0, {standin!r})
import torch
import vgpu, runs, vccl
import lightning as L
import lrcompress
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

number = int(os.environ["RANK"])
devices = [torch.device("vgpu", index) for index in range(2)]
vgpu.torch.vgpu.set_device(number)


class Strategy(DDPStrategy):
    "DDP that notes how many wrappers are alive when another is made."

    def configure_ddp(self):
        alive.append(sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects()))
        super().configure_ddp()

    def determine_ddp_device_ids(self):
        return None  # else Lightning asks for a stream of CUDA


def fit(name, folder, **kwargs):
    strategy = Strategy(parallel_devices=devices, process_group_backend="vccl")
    saving = ModelCheckpoint(os.path.join({root!r}, folder), "{{step}}", every_n_train_steps=1,
        save_top_k=-1, save_on_train_epoch_end=False)
    model, run = runs.fit(name, {root!r}, saving, strategy=strategy, devices=2, size=2,
        number=number, use_distributed_sampler=False, enable_checkpointing=True, **kwargs)
    return model


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


for name in {names!r}:
    alive = []
    model = fit(name, name, precision="bf16-mixed")
    assert alive and not any(alive), (name, alive)
    torch.save(model.state_dict(), os.path.join({root!r}, f"{{name}} {{number}}.pt"))
    if name not in {resumed!r}:
        continue
    again = fit(name, name + " again", precision="bf16-mixed",
        ckpt_path=os.path.join({root!r}, name, "step=2.ckpt"))
    assert same(model, again), name
print("ok")
"""
NAMES = ["kfac", "kronecker", "losparse", "dsee", "distilled", "embedding low_rank"]
RESUMED = ["kfac", "losparse"]  # within the window


def test_two_processes_end_alike_and_are_resumed(
    device: SimpleNamespace, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    script = tmp_path / "script.py"
    standin = str(Path(__file__).parent / "standin")
    script.write_text(
        SCRIPT.format(standin=standin, root=str(tmp_path), names=NAMES, resumed=RESUMED)
    )
    assert [said.splitlines()[-1] for said in launch(script, 2)] == ["ok", "ok"]
    for name in NAMES:
        one, other = (torch.load(tmp_path / f"{name} {i}.pt") for i in range(2))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), (name, key)
