"""Two processes under DDP, each with a stand-in device, that communicate as NCCL does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
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


LOST = """
import copy, os, sys
sys.path.insert(0, {standin!r})
import torch
import vgpu, vccl
from torch import nn
from lrcompress.distributed import Processes
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.errors import PlatformError
from lrcompress.statistics.moments import Statistics

number = int(os.environ["RANK"])
torch.vgpu.set_device(number)
torch.distributed.init_process_group("vccl")
processes = Processes.of()
assert Processes.of().control is processes.control  # made once


vgpu.counts(reset=True)
held = vgpu.counts().now
assert processes.all_gather("told by " + str(number)) == ["told by 0", "told by 1"]
assert vgpu.counts().peak == held, "objects were laid out on the device"

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.device("vgpu", number))
before = copy.deepcopy(model.state_dict())


def dies(names, what):
    for name in names:
        if number == 1 and {when!r} == "solving":
            os._exit(7)
        yield name


if {when!r} == "sending":
    sent = Processes.broadcast_

    def broadcast_(self, tensors, source):
        if number == 1:
            os._exit(7)
        sent(self, tensors, source)

    Processes.broadcast_ = broadcast_
try:
    settings = Settings(method="svd", keep=0.5, targets=["*"])
    factor_(model, Statistics(), settings, processes=processes, track=dies)
except PlatformError as error:
    assert "process 0 of 2 waited for the others in vain" in str(error), error
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())
    sys.stdout.write("ok")
    sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("when", ["solving", "sending"])
def test_a_process_that_is_lost_at_a_point_leaves_the_others_as_they_were(
    device: SimpleNamespace, tmp_path: Path, launch: Callable[..., list[str]], when: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOST.format(standin=str(Path(__file__).parent / "standin"), when=when))
    assert launch(script, 2, 0, 7)[0].splitlines()[-1] == "ok"


SAVED = """
import os, sys
sys.path.insert(0, {standin!r})
import torch
import vgpu, vccl
from torch import nn
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.sampling import Sampling
from lrcompress.distributed import Processes
from lrcompress.engine.settings import Settings

number = int(os.environ["RANK"])
torch.vgpu.set_device(number)
torch.distributed.init_process_group("vccl")
torch.manual_seed(0)
pairs = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2)]
model = nn.Sequential(*pairs).to(torch.device("vgpu", number))
kinds = ("input_moment", "output_moment")
sampling = Sampling(kinds=kinds, owner="Factorize", deal=True, mask=None)
observation = Observation(sampling, Processes.of())
observation.watch(model, Settings(method="kfac", keep=0.5, targets=["*"]))
x = torch.randn(8, 64, device=model[0][0].weight.device)
observation.open_step([x])
loss = model(x).square().mean()
observation.before_backward(loss, 1.0)
loss.backward()
observation.close_step()
seen = {{*observation.statistics.outputs}}
before = vgpu.counts(reset=True)
state = observation.state_dict()["statistics"]
assert vgpu.counts().peak == before.now, "statistics were laid on the device"
assert {{*observation.statistics.outputs}} == seen, "statistics were moved"
others = {{*state["outputs"]}} if number else {{*state["outputs"]}} - seen
assert len(others) == (0 if number else 4 - len(seen)), others
sys.stdout.write("ok")
"""


def test_a_checkpoint_takes_nothing_of_a_device_and_moves_no_statistics(
    device: SimpleNamespace, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SAVED.format(standin=str(Path(__file__).parent / "standin")))
    assert [said.splitlines()[-1] for said in launch(script, 2)] == ["ok", "ok"]
