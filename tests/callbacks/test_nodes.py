"""Several nodes: under torchrun, and by the job script for SLURM, killed and started again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
Make = Callable[..., Any]
BESIDE = """
import sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
from conftest import Loader, Tagger, sentences

class Data(L.LightningDataModule):
    def train_dataloader(self):
        number, count = self.trainer.global_rank, self.trainer.world_size
        return Loader([{{k: v[number::count] for k, v in b.items()}} for b in sentences()])

class Save(L.Callback):
    def on_fit_end(self, trainer, module):
        torch.save(module.state_dict(), trainer.default_root_dir + f"/{{trainer.global_rank}}.pt")
"""
# What srun does for a job script: the tasks of all nodes, each told by SLURM's variables which it
# is. KILL=1: they are killed once there is a checkpoint of some steps.
SRUN = """#!{python}
import gc, glob, os, runpy, signal, sys, time
import lightning.pytorch.cli, lrcompress.callbacks, lrcompress.distill
assert sys.argv[1:4] == ["python", "-m", "lrcompress"]
tasks = []
gc.freeze()  # a task that ends does not go through what was imported
for number in range(2):
    tasks.append(os.fork())
    if not tasks[-1]:
        os.environ |= {{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}}
        sys.argv[:] = ["lrcompress", *sys.argv[4:]]
        runpy.run_module("lrcompress", run_name="__main__", alter_sys=True)
        sys.exit()
while os.environ.get("KILL") and not glob.glob("runs/7/last.ckpt"):
    time.sleep(0.01)
if os.environ.get("KILL"):
    for task in tasks:
        os.kill(task, signal.SIGKILL)
codes = [os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks]
sys.exit(max(map(abs, codes)))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text(BESIDE.format(here=str(Path(__file__).parent)))
    flags = ["enable_progress_bar", "enable_model_summary", "logger", "use_distributed_sampler"]
    options = {"keep": [0.6, 0.3], "at": ["epoch:1", 0.7], "every_n_steps": 1, "verbose": False}
    callbacks = [{"class_path": "lrcompress.Factorize", "init_args": options}, "beside.Save"]
    trainer = dict.fromkeys(flags, False) | {"max_epochs": 3, "callbacks": callbacks}
    data = {"trainer": trainer, "model": "conftest.Tagger", "data": "beside.Data"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def started(command: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    paths = f"{ROOT}:{Path(__file__).parent}:{folder}"
    env = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | env
    )
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def end(running: subprocess.Popen[str]) -> int:
    _, told = running.communicate(timeout=600)
    sys.stderr.write(told[-3000:])
    return running.returncode


def test_two_nodes_end_as_one_with_two_processes_that_is_killed_and_queued_again(
    recipe: Path, free_port: Make, tmp_path: Path
) -> None:
    port = free_port()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    fit = ["-m", "lrcompress", "fit", "--config", "recipe.yaml", "--trainer.strategy=ddp"]
    fit += ["--trainer.accelerator=cpu", "--trainer.num_nodes=2", "--trainer.devices=1"]
    fit += ["--trainer.default_root_dir=nodes"]
    # at the same steps: statistics are added up over the processes whenever they are saved
    saving: dict[str, Any] = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    saving["init_args"] = {"dirpath": "nodes", "every_n_train_steps": 4}
    fit += [f"--trainer.callbacks+={json.dumps(saving)}"]
    (tmp_path / "nodes").mkdir()
    agents = [started([*agent, f"--node-rank={node}", *fit], tmp_path) for node in range(2)]
    assert [end(one) for one in agents] == [0, 0]

    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lrcompress", "SLURM_NTASKS": "2"}
    job |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    job |= {"SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "ACCELERATOR": "cpu"}
    job |= {"EVERY": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": port}
    script = ["bash", str(ROOT / "recipes" / "slurm.sbatch"), "recipe.yaml"]
    assert end(started(script, tmp_path, KILL="1", **job)) == signal.SIGKILL
    steps = torch.load(tmp_path / "runs/7/last.ckpt", weights_only=True)["global_step"]
    assert 4 <= steps < 18
    assert end(started(script, tmp_path, **job)) == 0

    ends = [tmp_path / place / f"{number}.pt" for place in ("nodes", "runs/7") for number in (0, 1)]
    first, *others = map(torch.load, ends)
    assert any(name.endswith("left.weight") for name in first)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(value, other[name]) for name, value in first.items())
