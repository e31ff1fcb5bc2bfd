"""Runs that are killed with SIGKILL at random moments and resumed end as the uninterrupted one.

    python tests/benchmarks/kills.py --mode one [--number 20] [--seed 0]
    python tests/benchmarks/kills.py --mode ddp
    python tests/benchmarks/kills.py --mode fsdp2

Each of the runs in turn, K-FAC at two points, LoSparse from K-FAC and K-FAC with distillation, is
started anew, killed a random moment after a random step (at any place: observing, at a point,
writing a checkpoint), and resumed from the last file that can be read. Compared with the run that
was let alone, bit for bit: weights, optimizer state and structure, of every process. The module,
the batches and the saving at every step are those of the tests; ``ddp`` and ``fsdp2`` are two
processes over gloo.
"""

import argparse
import collections
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

RUNS = ("two points", "losparse", "distilled")
STEPS = 18
HERE = Path(__file__).resolve().parent
SPAWN = multiprocessing.get_context("forkserver")


def make_callback(name: str) -> Any:
    import lrcompress

    if name == "losparse":
        given = {"mask_every": 2, "init": "kfac", "at": "epoch:1", "every_n_steps": 1}
        return lrcompress.LoSparse(keep=0.4, verbose=False, **given)
    given = {"every_n_steps": 1, "validate": False, "verbose": False}
    if name == "distilled":
        return lrcompress.Factorize(keep=0.4, at="epoch:1", **given)
    return lrcompress.Factorize(keep=[0.6, 0.3], at=["epoch:1", 0.7], **given)


def make_module(name: str, mode: str, start: str | None, folder: str) -> Any:
    from lrcompress.distill import Distilled, Logits

    sys.path.insert(0, str(HERE.parent / "callbacks"))
    if mode == "fsdp2":
        from sharded_runs import Sharded

        module = Sharded(checkpoint=start)
    else:
        from conftest import Tagger

        module = Tagger()
    if name == "distilled":
        return Distilled(module, losses=[Logits()], teacher_dir=folder)
    return module


def train(
    name: str, mode: str, number: int, port: str, folder: str, start: str | None, end: str
) -> None:
    """Run in one of the processes, from a checkpoint if there is one, to the end."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    import lrcompress

    count = 1 if mode == "one" else 2
    if mode != "one":
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(7 * number + 1000 * (start is not None), verbose=False)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    module = make_module(name, mode, start, folder)
    torch.set_rng_state(state)
    from conftest import Loader, sentences

    given = [{k: v[number::count] for k, v in batch.items()} for batch in sentences()]
    saving = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    strategy = {"one": "auto", "ddp": "ddp"}.get(mode)
    if strategy is None:
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=count,
        strategy=strategy,
        callbacks=[make_callback(name), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, Loader(given), ckpt_path=start)
    (optimizer,) = trainer.optimizers
    kept = {
        "weights": _whole(module.state_dict()),
        "optimizer": _whole(optimizer.state_dict()),
        "plan": lrcompress.Plan.of(module).to_dict(),
    }
    torch.save(kept, f"{end}.{number}")


def _whole(tree: Any) -> Any:
    """Return nested state with sharded tensors gathered."""
    if isinstance(tree, dict):
        return {key: _whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_whole(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


class Job:
    """The processes of one run."""

    def __init__(self, name: str, mode: str, folder: Path, start: Path | None, end: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        given = (port, str(folder), None if start is None else str(start), str(end))
        self.processes = [
            SPAWN.Process(target=train, args=(name, mode, number, *given))
            for number in range(1 if mode == "one" else 2)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> bool:
        for process in self.processes:
            process.join()
        return all(process.exitcode == 0 for process in self.processes)

    def kill_after(self, file: Path, wait: float) -> None:
        """Kill all once a file is there and a moment more has passed."""
        while not file.exists() and any(process.is_alive() for process in self.processes):
            time.sleep(0.005)
        time.sleep(wait)
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        self.finish()


def last_readable(folder: Path) -> Path:
    from lrcompress.errors import CheckpointError
    from lrcompress.structure.checkpoint import read_checkpoint

    files = sorted(folder.glob("step=*.ckpt"), key=lambda file: -int(file.stem[5:]))
    for file in files:
        try:
            read_checkpoint(file)
        except CheckpointError:
            continue
        return file
    raise FileNotFoundError(f"no checkpoint in {folder}")


def differs(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return not (isinstance(other, torch.Tensor) and torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(differs(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(map(differs, one, other))
    return bool(one != other)


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("one", "ddp", "fsdp2"), default="one")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, outcome = random.Random(options.seed), collections.Counter()
    SPAWN.set_forkserver_preload(
        ["lightning.pytorch", "lrcompress.callbacks", "lrcompress.distill"]
    )
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in RUNS:
            (root / name).mkdir()
            job = Job(name, options.mode, root / name, None, root / f"{name}.whole")
            if not job.finish():
                raise RuntimeError(f"the run {name!r} does not end")
        while outcome.total() < options.number:
            name, step = RUNS[outcome.total() % len(RUNS)], draw.randint(1, STEPS - 1)
            folder = root / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            job = Job(name, options.mode, folder, None, folder / "never")
            job.kill_after(folder / f"step={step}.ckpt", 0.03 * draw.random())
            if (folder / "never.0").exists():
                continue  # it ended before it was killed
            start = last_readable(folder)
            # a copy, so that what is written after it cannot be what is read
            copy = Path(shutil.copy(start, root / "start.ckpt"))
            for file in folder.glob("step=*.ckpt"):
                file.unlink()
            ended = Job(name, options.mode, folder, copy, folder / "end").finish()
            ends = root / f"{name}.whole", folder / "end"
            same = ended and not any(
                differs(*(torch.load(f"{path}.{number}") for path in ends))
                for number in range(1 if options.mode == "one" else 2)
            )
            result = "bit-identical" if same else "different" if ended else "failed to resume"
            outcome[result] += 1
            print(f"{name}: killed after step {start.stem[5:]}, {result}", flush=True)
    print(f"{options.mode}: {dict(outcome)} of {options.number}")
    return int(outcome["bit-identical"] < options.number)


if __name__ == "__main__":
    sys.exit(main())
