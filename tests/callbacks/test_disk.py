"""Files that are cut short, of another version, or do not fit on the disk."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.cli import main
from lrcompress.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks")
Make = Callable[..., Any]
OPTIONS = {"keep": 0.5, "at": 0.5, "every_n_steps": 2, "verbose": False}


@pytest.fixture
def saved(tagger: Make, loader: Make, trainer: Make, tmp_path: Path) -> Path:
    """A folder with a checkpoint after every step of a run."""
    run = trainer(lrcompress.Factorize(**OPTIONS), every_step=True)
    run.fit(tagger(), loader(), loader())
    return tmp_path


def refused(
    path: Path, kind: type[Exception] | tuple[type[Exception], ...], message: str,
    tagger: Make, loader: Make, trainer: Make,
) -> None:
    model, callback = tagger(), lrcompress.Factorize(**OPTIONS)
    names = list(model.state_dict())
    with pytest.raises(kind, match=message):
        trainer(callback).fit(model, loader(), loader(), ckpt_path=path)
    assert not model._load_state_dict_pre_hooks
    if kind is not CheckpointError:  # the file could not be read, so nothing was touched
        assert list(model.state_dict()) == names


def test_a_checkpoint_cut_short_changes_nothing(
    saved: Path, tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (saved / "step=12.ckpt").read_bytes()
    path = saved / "cut.ckpt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        model = tagger()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises((EOFError, OSError, RuntimeError, ValueError, Exception)):
            trainer(lrcompress.Factorize(**OPTIONS)).fit(model, loader(), ckpt_path=path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model._load_state_dict_pre_hooks
        with pytest.raises(CheckpointError, match=r"cut.ckpt cannot be read .* may be cut short: "):
            lrcompress.restore_structure(model, path)


def test_a_checkpoint_of_another_version_is_refused(
    saved: Path, tagger: Make, loader: Make, trainer: Make
) -> None:
    checkpoint = torch.load(saved / "step=12.ckpt", weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if "Factorize" in key]
    state = checkpoint["callbacks"][key]
    for changed, message in [
        (state | {"version": 2}, r"expected Factorize state of version 1, got version 2"),
        (
            state | {"plan": state["plan"] | {"version": 3}},
            r"expected a plan of version 1, got version 3",
        ),
    ]:
        checkpoint["callbacks"][key] = changed
        torch.save(checkpoint, saved / "other.ckpt")
        model = tagger()
        with pytest.raises(CheckpointError, match=message):
            trainer(lrcompress.Factorize(**OPTIONS)).fit(
                model, loader(), ckpt_path=saved / "other.ckpt"
            )
        assert not model._load_state_dict_pre_hooks


FULL = """
import sys
sys.path.insert(0, {here!r})
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from pathlib import Path
import lrcompress
from lrcompress.distill import Distilled, Logits
from conftest import Loader, Tagger

root, disk = Path({root!r}), Path({disk!r})
saving = ModelCheckpoint(disk, "last", every_n_train_steps=1, save_on_train_epoch_end=False,
                         enable_version_counter=False)

class Fill(L.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == {step}:
            (root / "kept.ckpt").write_bytes((disk / "last.ckpt").read_bytes())
            with (disk / "filler").open("wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError:
                    pass

def trainer(*callbacks):
    return L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_model_summary=False, default_root_dir=disk, callbacks=[*callbacks])

L.seed_everything(0, verbose=False)
module = Distilled(Tagger(), losses=[Logits()], cache={cache})
callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False,
                                report_path={report})
try:
    trainer(callback, Fill(), *([saving] if {saves} else [])).fit(module, Loader(sentences()))
except Exception as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in disk.rglob("*") if path.is_file()))
if {saves}:
    print((disk / "last.ckpt").read_bytes() == (root / "kept.ckpt").read_bytes())
"""
