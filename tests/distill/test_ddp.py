"""Two real processes that train together end with the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import lightning as L
import torch
from torch.utils.data import DataLoader
from lrcompress.distill import Distilled, HiddenStates, Logits, Relations

sys.path.insert(0, {here!r})
from conftest import Reader, StartAt, sentences

L.seed_everything(0, verbose=False)
student = Reader()
torch.manual_seed(1)
teacher = {teacher}
losses = [Logits(), HiddenStates({{"step:3": [0.0, 1.0]}}), Relations()]
module = Distilled(student, teacher=teacher, losses=losses, task={task}, cache={cache})
trainer = L.Trainer(
    strategy="ddp", devices=2, accelerator="cpu", max_epochs=2, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    default_root_dir={root!r}, callbacks=[StartAt()], num_sanity_val_steps=0, barebones=False,
)
rows = [row for batch in sentences(4, 4) for row in
        [{{key: value[i] for key, value in batch.items()}} for i in range(4)]]
trainer.fit(module, DataLoader(rows, batch_size=2))
torch.save(module.state_dict(), {root!r} + f"/rank{{trainer.global_rank}}.pt")
torch.save(module._distillation.teacher.module.state_dict(),
           {root!r} + f"/teacher{{trainer.global_rank}}.pt")
trainer.save_checkpoint({root!r} + "/end.ckpt")
"""


@pytest.mark.parametrize(("teacher", "task"), [('"start"', 0.5), ("Reader()", 0.0)])
def test_ranks_end_with_identical_weights(teacher: str, task: float, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    here, root = str(Path(__file__).parent), str(tmp_path)
    cache = None if teacher == '"start"' else str(tmp_path / "cache")
    fields = {"here": here, "root": root, "teacher": teacher, "task": task, "cache": repr(cache)}
    script.write_text(SCRIPT.format(**fields))
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("rank", "teacher"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert ("lrcompress_teacher" in torch.load(tmp_path / "end.ckpt")) == (cache is None)
    assert (tmp_path / "teachers").exists() == (cache is None)
    assert cache is None or (tmp_path / "cache").exists()
