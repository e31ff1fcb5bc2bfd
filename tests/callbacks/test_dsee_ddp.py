"""DSEE in two real processes: alike to the bit, equal to one process, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lrcompress

Make = Callable[..., Any]
RUN = (
    "lrcompress.DSEE(keep=0.4, rank=2, entries=5, updates=['*.up'], prune_from='step:5', "
    "prune_at='step:9', verbose=False, report_path=None)"
)
SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.parallel import DistributedDataParallel
import lrcompress
from conftest import Loader, Tagger, sentences

root, number = {root!r}, int(os.environ["RANK"])
parts = [{{k: v[number::2] for k, v in batch.items()}} for batch in sentences()]

class Watch(L.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, DistributedDataParallel)
        if 1 < trainer.global_step < 18:
            held = {{id(p) for p in wrapper.parameters() if p.requires_grad}}
            assert held == {{id(p) for p in trainer.optimizers[0].state}}

def fit(ckpt_path=None):
    torch.manual_seed(0)
    model = Tagger(dropout=0.0)
    torch.manual_seed(number)  # what a process draws differs, what it trains does not
    saving = ModelCheckpoint(root, "{{step}}", every_n_train_steps=1, save_top_k=-1,
        save_on_train_epoch_end=False)
    run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=root,
        callbacks=[{run}, Watch(), saving])
    run.fit(model, Loader(parts), Loader(parts), ckpt_path=ckpt_path)
    run.strategy.barrier()
    return model.state_dict()

whole = fit()
torch.save(whole, root + f"/{{number}}.pt")
for step in (2, 7, 12):
    again = fit(root + f"/step={{step}}.ckpt")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole), step
"""


def test_processes_are_alike_equal_to_one_and_resumed(
    launch: Make, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent), root=str(tmp_path), run=RUN))
    launch(script, 2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)

    torch.manual_seed(0)
    alone = tagger(dropout=0.0)
    trainer(eval(RUN, {"lrcompress": lrcompress})).fit(alone, loader(), loader())
    for name, value in alone.state_dict().items():
        if name.endswith("weight") and "blocks" in name:
            assert int((first[name] == 0).sum()) == int((value == 0).sum())
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
