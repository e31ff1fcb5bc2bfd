"""Two real processes that train together end with the same weights."""

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
import lightning as L
import torch
from torch.utils.data import DataLoader
from lrcompress.distill import Distilled, HiddenStates, Logits, Relations

sys.path.insert(0, {here!r})
from conftest import Reader, StartAt, sentences

rows = [row for batch in sentences(4, 4) for row in
        [{{key: value[i] for key, value in batch.items()}} for i in range(4)]]
for root, teacher, task, cache in [
    ({start!r}, "start", 0.5, None), ({cached!r}, Reader, 0.0, {cached!r} + "/cache")
]:
    L.seed_everything(0, verbose=False)
    student = Reader()
    torch.manual_seed(1)
    teacher = teacher if teacher == "start" else teacher()
    losses = [Logits(), HiddenStates({{"step:3": [0.0, 1.0]}}), Relations()]
    module = Distilled(student, teacher=teacher, losses=losses, task=task, cache=cache)
    trainer = L.Trainer(
        strategy="ddp", devices=2, accelerator="cpu", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=root, callbacks=[StartAt()], num_sanity_val_steps=0, barebones=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=2))
    torch.save(module.state_dict(), f"{{root}}/rank{{trainer.global_rank}}.pt")
    torch.save(module._distillation.teacher.module.state_dict(),
               f"{{root}}/teacher{{trainer.global_rank}}.pt")
    trainer.save_checkpoint(f"{{root}}/end.ckpt")
"""


def test_ranks_end_with_identical_weights(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    start, cached = tmp_path / "start", tmp_path / "cached"
    for folder in (start, cached):
        folder.mkdir()
    fields = {"here": str(Path(__file__).parent), "start": str(start), "cached": str(cached)}
    script.write_text(SCRIPT.format(**fields))
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for root in (start, cached):
        for name in ("rank", "teacher"):
            first, second = (torch.load(root / f"{name}{rank}.pt") for rank in range(2))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
        kept = root == start
        assert ("lrcompress_teacher" in torch.load(root / "end.ckpt")) == kept
        assert (root / "teachers").exists() == kept
        assert (root / "cache").exists() == (not kept)
