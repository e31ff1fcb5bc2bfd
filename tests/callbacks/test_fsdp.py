"""FSDP2 in real processes: as DDP, bit for bit where it can be, and resumed after a kill."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]
RUNS: dict[str, str] = {
    "one point": (
        "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, fisher='model', "
        "logits='model.head', verbose=False)"
    ),
    "two points": (
        "lrcompress.Factorize(keep=[0.6, 0.3], at=['epoch:1', 0.7], every_n_steps=1, "
        "validate=False, verbose=False, allocation='uniform')"
    ),
    "losparse": (
        "lrcompress.LoSparse(keep=0.4, mask_every=2, init='kfac', low_rank_share='auto', "
        "at='epoch:1', every_n_steps=1, verbose=False)"
    ),
    "distilled": "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False)",
}
PRELUDE = """
import gc, signal, weakref
from sharded_runs import *
import torch.distributed as dist
from lrcompress.callbacks import sharding


def made(name, checkpoint=None, **kwargs):
    model = tagger(checkpoint=checkpoint, **kwargs)
    return distilled(model, f"{root}/teachers") if name == "distilled" else model


def save(value, name):
    if NUMBER == 0:
        torch.save(value, f"{root}/{name}.pt")
"""
WHOLE = """
class Memory(L.Callback):
    "Values of layers that are whole at the same time, and the layers there ever were."

    def __init__(self):
        self.live, self.most, self.bound, self.old = [], 0, 0, {}

    def counted(self, value):
        whole = plain(value)
        if whole is not value and value.ndim == 2:
            self.live = [one for one in self.live if one[0]() is not None]
            self.live.append((weakref.ref(whole.untyped_storage()), whole.numel()))
            self.most = max(self.most, sum(size for _, size in self.live))
        return whole

    def on_train_start(self, trainer, module):
        gc.collect()  # what configure_model has left
        gc.disable()

    def on_train_batch_start(self, trainer, module, batch, index):
        layers = [layer for block in module.model.blocks for layer in block.values()]
        sizes = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers]
        self.bound = max(self.bound, 3 * max(sizes))  # a weight and Adam's two moments
        self.old |= {id(m): weakref.ref(m) for m in module.model.blocks.modules()}


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 10:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


plain = sharding.whole
for name, make in runs.items():
    for strategy in ("ddp", fsdp(distributed=name == "losparse")):
        where = "ddp" if strategy == "ddp" else "fsdp"
        model, memory = made(name, dropout=0.0), Memory()
        sharding.whole = memory.counted
        run = trainer(memory, eval(make), root=root, every_step=f"{root}/{name} {where}",
                      strategy=strategy)
        run.fit(model, loader(), loader())
        gc.enable()
        gc.collect()
        now = set(model.modules())
        assert not [one for one in memory.old.values() if one() and one() not in now], name
        save(kept(run, model), f"{name} {where}")
        if where == "fsdp":
            assert memory.bound / 3 < memory.most <= memory.bound, (name, memory.most)
            units = [m for m in model.modules() if isinstance(m, FSDPModule)]
            assert len(units) == 3
            owners = sharding._owners(model)
            assert all(id(p) in owners for p in model.parameters())
            if name == "distilled":
                teacher = model._distillation.teacher.module
                assert all(hasattr(p, "full_tensor") for p in teacher.parameters())
                assert len([m for m in teacher.modules() if isinstance(m, FSDPModule)]) == 3

run = trainer(eval(runs["two points"]), Kill(), root=root, every_step=f"{root}/killed",
              strategy=fsdp(distributed=True))
run.callbacks.sort(key=lambda callback: isinstance(callback, Kill))  # after the file is written
run.fit(made("two points", dropout=0.0), loader(), loader())
"""
RESUMED = """
for name, folder, step, distributed in cases:
    path = f"{root}/{folder}/step={step}.ckpt"
    assert os.path.isdir(path) == distributed
    model = made(name, path, seed=5, dropout=0.0)
    run = trainer(eval(runs[name]), root=root, every_step=f"{root}/rest {step}",
                  strategy=fsdp(distributed=distributed))
    run.fit(model, loader(), loader(), ckpt_path=path)
    save(kept(run, model), f"{folder} {step} resumed")
"""
CASES = [
    ("two points", "killed", 10, True),  # mid-observation of the second
    ("one point", "one point fsdp", 3, False),
    ("losparse", "losparse fsdp", 9, True),  # mid-window, half pruned
    ("distilled", "distilled fsdp", 12, False),
]


def write(folder: Path, body: str) -> Path:
    """Write a script that knows where it is, the runs and the cases."""
    known = {"root": str(folder), "runs": RUNS, "cases": CASES}
    names = "".join(f"{name} = {value!r}\n" for name, value in known.items())
    path = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script = folder / "script.py"
    script.write_text(path + names + PRELUDE + body)
    return script


def assert_same(one: Any, other: Any, **close: float) -> None:
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, **(close or {"rtol": 0.0, "atol": 0.0}))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], **close)
    else:
        assert one == other


def test_fsdp_is_as_ddp_and_a_killed_run_ends_as_the_whole_one(
    launch: Make, tmp_path: Path
) -> None:
    launch(write(tmp_path, WHOLE), 2, code=-signal.SIGKILL)
    whole = {name: torch.load(tmp_path / f"{name} fsdp.pt") for name in RUNS}
    for name, one in whole.items():
        close = {"rtol": 1e-4, "atol": 1e-6} if name == "losparse" else {}
        assert_same(one, torch.load(tmp_path / f"{name} ddp.pt"), **close)
        assert len(one["plan"]["layers"]) > 2
        assert one["optimizer"]
    path = tmp_path / "killed"
    assert (path / "step=10.ckpt" / "meta.pt").exists()
    assert not (path / "step=11.ckpt").exists()
    launch(write(tmp_path, RESUMED), 2)
    for name, folder, step, _ in CASES:
        assert_same(torch.load(tmp_path / f"{folder} {step} resumed.pt"), whole[name])
