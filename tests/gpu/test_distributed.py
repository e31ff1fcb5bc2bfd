"""DDP and FSDP2 with one process, whose collectives are those of NCCL on a GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import lrcompress
from lrcompress.distributed import Processes

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
import sharded_runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match"),  # of a side of one
]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}


def callback(name: str) -> Any:
    if name == "losparse":
        seen = {"at": "epoch:1", "every_n_steps": 1, "mask_every": 2, "init": "kfac"}
        return lrcompress.LoSparse(keep=0.4, low_rank_share="auto", **seen, **QUIET)
    seen = {"at": 0.5, "every_n_steps": 2}
    return lrcompress.Factorize(keep=0.5, method=name, **seen, **QUIET)


def strategy(name: str) -> Any:
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return DDPStrategy() if name == "ddp" else "auto"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["kfac", "kronecker", "losparse"])
def test_one_process_ends_as_one_device_and_is_resumed(
    card: Any, tmp_path: Path, name: str, kind: str
) -> None:
    card.needs("cuda", "cpu", why="the stand-in has tests of its own for several processes")

    def fit(kind: str, to: str, checkpoint: Path | None = None) -> dict[str, Any]:
        given = {"root": str(tmp_path), "save_to": str(tmp_path / to), "strategy": strategy(kind)}
        run = sharded_runs.trainer(callback(name), accelerator=card.type, every=3, **given)
        resumed = None if checkpoint is None else str(checkpoint)
        model = sharded_runs.tagger(
            5 if resumed else 0, checkpoint=resumed if kind == "fsdp2" else None, dropout=0.0
        )
        run.fit(model, sharded_runs.loader(), ckpt_path=resumed)
        if kind == "auto":
            assert not torch.distributed.is_initialized()
        else:
            backend = str(torch.distributed.get_backend_config())
            assert ("nccl" if card.real else "gloo") in backend
        found = sharded_runs.kept(run, model)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return found

    alone, grouped = fit("auto", "alone"), fit(kind, kind)
    assert alone["plan"] == grouped["plan"]
    assert alone["plan"]["layers"]
    torch.testing.assert_close(grouped["model"], alone["model"], rtol=1e-3, atol=1e-4)
    for step in (6, 15):  # before the point and after it
        again = fit(kind, f"again {step}", tmp_path / kind / f"step={step}.ckpt")
        assert again["plan"] == grouped["plan"]
        torch.testing.assert_close(again["model"], grouped["model"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again["optimizer"], grouped["optimizer"], rtol=1e-3, atol=1e-4)


def test_tensors_are_sent_from_the_device_that_the_backend_serves(
    card: Any, tmp_path: Path
) -> None:
    """With NCCL a sum, a broadcast and an object pass through the card itself."""
    card.needs("cuda", "cpu", why="the stand-in has tests of its own for several processes")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    backend = "nccl" if card.real else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    # as one of two sees itself, in a group of one
    processes = Processes(0, 2, torch.distributed.group.WORLD)
    assert processes.device == card.device
    values = [torch.arange(3.0, device=place) for place in ("cpu", card.device)]
    processes.broadcast_(values, 0)
    flat = torch.ones(4)
    processes.all_reduce_(flat)
    assert flat.tolist() == [1, 1, 1, 1]
    assert [value.tolist() for value in values] == [[0, 1, 2]] * 2
    found: list[Any] = [None]
    torch.distributed.all_gather_object(found, {"a": values[1].cpu()})
    assert found[0]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["kfac", "losparse"])
def test_the_wrapper_of_ddp_is_made_anew_at_a_point(card: Any, tmp_path: Path, name: str) -> None:
    card.needs("cuda", "cpu", why="the stand-in has tests of its own for several processes")
    made = []

    class Strategy(DDPStrategy):
        def configure_ddp(self) -> None:
            super().configure_ddp()
            made.append(sum(p.numel() for p in self.model.parameters()))

    run = sharded_runs.trainer(
        callback(name), root=str(tmp_path), accelerator=card.type, strategy=Strategy()
    )
    run.fit(sharded_runs.tagger(), sharded_runs.loader())
    assert len(made) >= 2
    assert made[-1] < made[0]
