"""FSDP2 in real processes: as DDP, bit for bit where it can be, and resumed after a kill."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

import lrcompress
from lrcompress.solvers import truncation

sys.path.insert(0, str(Path(__file__).parent))
import sharded_runs

Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
# A page of figures takes longer to draw than most runs take; the first run has one.
RUNS: dict[str, str] = {
    "one point": "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False)",
    "two points": (
        "lrcompress.Factorize(keep=[0.6, 0.3], at=['epoch:1', 0.7], every_n_steps=1, "
        "validate=False, **QUIET, allocation='uniform')"
    ),
    "losparse": (
        "lrcompress.LoSparse(keep=0.4, mask_every=2, init='kfac', low_rank_share='auto', "
        "at='epoch:1', every_n_steps=1, **QUIET)"
    ),
    "kronecker": (
        "lrcompress.Factorize(keep=0.6, at=0.5, method='kronecker', every_n_steps=2, "
        "shapes={'*up': [16, 16]}, **QUIET)"
    ),
    "distilled": (  # and two backward passes in each observed step
        "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, fisher='model', "
        "logits='model.head', **QUIET)"
    ),
}
PRELUDE = """
import gc, signal, weakref
from sharded_runs import *
import torch.distributed as dist
from lrcompress.callbacks import fsdp as fsdp_module

QUIET = dict(verbose=False, report_path=None)


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


plain = fsdp_module.full_tensor
for name, make in runs.items():
    for strategy in ("ddp", fsdp(distributed=name == "losparse")):
        where = "ddp" if strategy == "ddp" else "fsdp"
        model, memory = made(name, dropout=0.0), Memory()
        fsdp_module.full_tensor = memory.counted
        run = trainer(memory, eval(make), root=root, save_to=f"{root}/{name} {where}",
                      every=3, strategy=strategy)
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
            owners = fsdp_module._fsdp_params(model)
            assert all(id(p) in owners for p in model.parameters())
            if name == "distilled":
                teacher = model._distillation.teacher.module
                assert all(hasattr(p, "full_tensor") for p in teacher.parameters())
                assert len([m for m in teacher.modules() if isinstance(m, FSDPModule)]) == 3

run = trainer(eval(runs["two points"]), Kill(), root=root, save_to=f"{root}/killed", every=3,
              strategy=fsdp(distributed=True))
run.callbacks.sort(key=lambda callback: isinstance(callback, Kill))  # after the file is written
run.fit(made("two points", dropout=0.0), loader(), loader())
"""
RESUMED = """
for name, folder, step, distributed in cases:
    path = f"{root}/{folder}/step={step}.ckpt"
    assert os.path.isdir(path) == distributed
    model = made(name, path, seed=5, dropout=0.0)
    run = trainer(eval(runs[name]), root=root, save_to=f"{root}/rest {step}", every=3,
                  strategy=fsdp(distributed=distributed))
    run.fit(model, loader(), loader(), ckpt_path=path)
    save(kept(run, model), f"{folder} {step} resumed")
"""
ONE_PROCESS = """
for name, make in runs.items():
    if name == "distilled":  # its labels are drawn, and its losses are means over a process's rows
        continue
    results = []
    for strategy in ("auto", fsdp()) if name == "losparse" else ("auto",):
        model = made(name, dropout=0.0)
        run = trainer(eval(make), root=root, strategy=strategy)
        run.fit(model, loader(), loader())
        results.append(kept(run, model))
    save(results[0], f"{name} alone")
    for key, value in results[-1]["model"].items():  # FSDP2 of one process
        torch.testing.assert_close(value, results[0]["model"][key], rtol=1e-4, atol=1e-6)
"""
CASES = [
    ("two points", "killed", 9, True),  # mid-observation of the second
    ("one point", "one point fsdp", 3, False),
    ("losparse", "losparse fsdp", 9, True),  # mid-window, half pruned
    ("distilled", "distilled fsdp", 12, False),
    ("kronecker", "kronecker fsdp", 15, False),  # after the point
]


REFUSED = """
import re
from types import SimpleNamespace
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard, init_device_mesh
import lrcompress.engine.distributed_solve
from lrcompress.errors import PlatformError, SettingError
from lrcompress.structure.surgery import replace_


def refused(message, work):
    try:
        work()
    except PlatformError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(message)


def fit(callback, strategy=None, model=None, **kwargs):
    model = tagger() if model is None else model
    trainer(callback, root=root, strategy=strategy or fsdp(), **kwargs).fit(model, loader())


one_point = lambda: eval(runs["one point"])
across = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
refused("Factorize follows .* lays them over 2 otherwise; use Mo.*tensor_parallel_size=1",
        lambda: fit(one_point(), across))
across = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
refused("Distilled follows parameters that", lambda: fit(L.Callback(), across, made("distilled")))
refused("granularity='entries' scores every entry.*use granularity='rows'",
        lambda: fit(lrcompress.LoSparse(keep=0.4, granularity="entries")))
refused("measure_layers=True puts layers back in turn.*use strategy='ddp'",
        lambda: fit(lrcompress.Factorize(keep=0.4, measure_layers=True)))
caching = Distilled(tagger(), losses=[Logits()], cache=f"{root}/cache")
refused("would wait; leave cache= out", lambda: fit(one_point(), model=caching))

plain = lrcompress.engine.distributed_solve.broadcast_layers_
def broken(model, owner, optimizers, processes):
    plain(model, owner, optimizers, processes)
    if NUMBER == 1:
        model.get_submodule(next(iter(owner))).left.weight.data[0, 0] += 1e-6
lrcompress.engine.distributed_solve.broadcast_layers_ = broken
refused("'model.blocks.0.down.left.weight' was not the same in all 2 processes when it was",
        lambda: fit(one_point()))
lrcompress.engine.distributed_solve.broadcast_layers_ = plain


class Meddle(L.Callback):
    "Replaces a layer as one may where nothing is sharded."
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 4:
            new = torch.nn.Linear(16, 32)
            replace_(module, "model.blocks.1.up", new)
run = trainer(Meddle(), eval(runs["two points"]), root=root, strategy=fsdp())
refused("'blocks.1.up.weight' is not the one that its unit .* replaced a layer without its",
        lambda: run.fit(tagger(), loader()))

# layers that cannot be followed
mesh = init_device_mesh("cpu", (SIZE,))
processes = fsdp_module.ShardedProcesses.of()


def check(change, name="0", **kwargs):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4), torch.nn.Linear(4, 4))
    change(model)
    fsdp_module.check_layers(model, [name], processes, "Factorize")

refused("layer '0' is a unit of its own", lambda: check(lambda m: fully_shard(m[0], mesh=mesh)))
refused("layer '1' is not sharded", lambda: check(lambda m: fully_shard(m[0], mesh=mesh), "1"))
refused("layer '0' lies over 2 of 2 processes as .*dim=1", lambda: check(lambda m: fully_shard(
    m, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))))
two = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "part"))
refused("layer '0' lies over 2 of 2 processes as .*Replicate",
        lambda: check(lambda m: fully_shard(m, mesh=two)))
refused("layer '0' is offloaded", lambda: check(
    lambda m: fully_shard(m, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))))


def tie(model):
    model[1].weight, model[2] = model[0].weight, torch.nn.Linear(4, 6)
    model[2].weight = model[0].weight
    fully_shard(model, mesh=mesh)

refused("layer '0' shares its weight", lambda: check(tie))
FSDPModule._get_fsdp_state, held = lambda self: SimpleNamespace(), FSDPModule._get_fsdp_state
refused("keeps the units of FSDP2 otherwise than torch 2.13",
        lambda: check(lambda m: fully_shard(m, mesh=mesh)))
FSDPModule._get_fsdp_state = held
print("all refused")
"""


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
    launch(write(tmp_path, WHOLE), 2, *[-signal.SIGKILL] * 2)
    whole = {name: torch.load(tmp_path / f"{name} fsdp.pt") for name in RUNS}
    for name, one in whole.items():
        close = {"rtol": 1e-4, "atol": 1e-6} if name == "losparse" else {}
        assert_same(one, torch.load(tmp_path / f"{name} ddp.pt"), **close)
        assert len(one["plan"]["layers"]) > 2
        assert one["optimizer"]
    one, other = (
        torch.load(tmp_path / f"one point {where}" / "step=6.ckpt")["callbacks"]
        for where in ("ddp", "fsdp")
    )
    key = next(key for key in one if key.startswith("Factorize"))
    assert one[key]["observation"]["folded"][0] == 2  # steps
    assert_same(one[key]["observation"], other[key]["observation"])
    path = tmp_path / "killed"
    assert (path / "step=9.ckpt" / "meta.pt").exists()
    assert not (path / "step=12.ckpt").exists()
    told = launch(write(tmp_path, RESUMED + REFUSED), 2)
    assert [out.splitlines()[-1] for out in told] == ["all refused"] * 2
    for name, folder, step, _ in CASES:
        assert_same(torch.load(tmp_path / f"{folder} {step} resumed.pt"), whole[name])
    launch(write(tmp_path, ONE_PROCESS), 1)
    for name in RUNS.keys() - {"distilled"}:
        one = whole[name]
        alone = torch.load(tmp_path / f"{name} alone.pt")
        assert_same(one["plan"], alone["plan"])
        assert_same(one["model"], alone["model"], rtol=2e-3, atol=2e-4)


PIVOTED = """
ends = {}
for name, strategy in (("ddp", "ddp"), ("fsdp", fsdp())):
    callback = lrcompress.Factorize(
        keep=[0.8, 0.4], at=["epoch:1", 0.7], every_n_steps=1, storage="pivoted", validate=False,
        **QUIET)
    model = tagger(dropout=0.0)
    run = trainer(callback, root=root, strategy=strategy)
    run.fit(model, loader())
    ends[name] = kept(run, model)
    if NUMBER == 0:
        torch.save(ends[name], f"{root}/{name}.pt")
"""


def test_pivoted_rows_are_sharded_as_they_are_whole(launch: Make, tmp_path: Path) -> None:
    launch(write(tmp_path, PIVOTED), 2)
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("ddp", "fsdp"))
    assert {layer["kind"] for layer in one["plan"]["layers"]} == {"pivoted"}
    assert one["optimizer"]
    assert_same(one, other)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    ("made", "solver"),
    [
        (lambda: lrcompress.Factorize(0.5, at=0.5, **QUIET), "engine.distributed_solve"),
        (lambda: lrcompress.LoSparse(0.5, mask_every=2, **QUIET), "pruning.split"),
    ],
)
def test_a_sharded_layer_is_solved_once(
    made: Make,
    solver: str,
    sharding: ModelParallelStrategy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not once for its errors and once more for its factors."""
    solved = []

    def truncate(weight: torch.Tensor, *given: Any, **named: Any) -> truncation.Truncation:
        solved.append(tuple(weight.shape))
        return truncation.truncate(weight, *given, **named)

    monkeypatch.setattr(f"lrcompress.{solver}.truncate", truncate)
    callback = made()
    run = sharded_runs.trainer(callback, root=str(tmp_path), strategy=sharding)
    run.fit(sharded_runs.tagger(), sharded_runs.loader())
    layers = callback.report.points[0].layers
    assert sorted(solved) == sorted((x.out_features, x.in_features) for x in layers)
