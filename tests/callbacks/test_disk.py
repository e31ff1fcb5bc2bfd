"""Files that are cut short, of another version, or do not fit on the disk."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.callbacks import WholeCheckpointIO
from lrcompress.cli import main
from lrcompress.cli.verbs import _Trainer
from lrcompress.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
# What torch.load raises for a file that was cut short, by where.
TORN = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)
OPTIONS = {"keep": 0.5, "at": 0.5, "every_n_steps": 2, "verbose": False, "report_path": None}


@pytest.fixture
def saved(tagger: Make, loader: Make, trainer: Make, tmp_path: Path) -> Path:
    """A folder with a checkpoint after every step of a run."""
    run = trainer(lrcompress.Factorize(**OPTIONS), every_step=True)
    run.fit(tagger(), loader(), loader())
    return tmp_path


def test_a_checkpoint_cut_short_changes_nothing(
    saved: Path, tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (saved / "step=12.ckpt").read_bytes()
    path = saved / "cut.ckpt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        model = tagger()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TORN):
            trainer(lrcompress.Factorize(**OPTIONS)).fit(model, loader(), ckpt_path=path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model._load_state_dict_pre_hooks
        with pytest.raises(CheckpointError, match=r"cut.ckpt cannot be read .* may be cut short: "):
            lrcompress.restore_structure(model, path)
        boring = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
        assert main(["fit", boring, "--ckpt_path", str(path), "--trainer.logger=false"]) == 1
        told = capsys.readouterr().err
        assert f"lrcompress: error: {path} cannot be read as a checkpoint, it may be cut" in told


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
import os, sys, warnings
sys.path.insert(0, {here!r})
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from pathlib import Path
import lrcompress
from lrcompress.callbacks import WholeCheckpointIO
from lrcompress.distill import Distilled, Logits
from conftest import Loader, Tagger, sentences

kept, disk = Path({kept!r}), Path({disk!r})

class Fill(L.Callback):
    def __init__(self, step):
        self.step = step
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step != self.step:
            return
        if (disk / "last.ckpt").exists():
            kept.write_bytes((disk / "last.ckpt").read_bytes())
        with (disk / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

def run(step, saves=False, cache=None, distilled=False, report_path=None):
    L.seed_everything(0, verbose=False)
    module = Tagger()
    if distilled:
        module = Distilled(module, losses=[Logits()], cache=cache)
    callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False,
                                    report_path=report_path)
    saving = [ModelCheckpoint(disk, "last", every_n_train_steps=1, save_on_train_epoch_end=False,
                              enable_version_counter=False)] if saves else []
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=saves,
                        default_root_dir=disk, callbacks=[callback, Fill(step), *saving],
                        plugins=[WholeCheckpointIO()])
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, Loader(sentences()))
        told = sorted(str(one.message) for one in said if "No space" in str(one.message))
        if told:
            print(told[0], len(callback.report.points), trainer.global_step, sep=" | ")
    except Exception as error:
        print(type(error).__name__, error)
    (disk / "filler").unlink()
    print(sorted(path.name for path in disk.rglob("*") if path.is_file()))

run(2, saves=True)  # the next file is larger: statistics
print(kept.read_bytes() == (disk / "last.ckpt").read_bytes())
(disk / "last.ckpt").unlink()
run(5, report_path=str(disk / "report.json"))
run(10, distilled=True, cache=str(disk))
(disk / "teacher_features.sqlite").unlink()
run(9, distilled=True, saves=True)
"""


def test_a_full_disk_ends_the_run_and_spares_what_is_there(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    disk, kept, script = tmp_path / "disk", tmp_path / "kept.ckpt", tmp_path / "script.py"
    disk.mkdir()
    script.write_text(FULL.format(here=str(Path(__file__).parent), disk=str(disk), kept=str(kept)))
    mount = f"mount -t tmpfs -o size=2m none {disk}"  # a real one, of two megabytes
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here without being root")
    command = f"{mount} && {sys.executable} -W ignore {script}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    full = f"OSError [Errno 28] No space left on device: '{disk}/"
    assert lines[:3] == [f"{full}last.ckpt'", "['last.ckpt']", "True"]
    # what stands beside the result does not end the run, which goes on to its last step
    assert lines[3].startswith(f"lrcompress could not write the report {disk}/report.json")
    assert lines[3].endswith(f"No space left on device: '{disk}/report.json' | 1 | 18")
    assert lines[4] == "[]"
    cache = "CheckpointError the teacher's features cannot be written to "
    assert lines[5].startswith(cache)
    assert lines[5].endswith("full; make room, or leave cache= out; what is in it is whole")
    assert lines[6] == "['teacher_features.sqlite']"
    assert lines[7].startswith("CheckpointError the teacher cannot be written to ")
    assert lines[7].endswith("No space left on device (os error 28)")
    assert lines[8:] == ["['last.ckpt']"]
    ends = []
    for path in (None, kept):
        model = tagger()
        trainer(lrcompress.Factorize(**OPTIONS)).fit(model, loader(), ckpt_path=path)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_recipes_save_whole_files_and_others_go_where_they_went(tmp_path: Path) -> None:
    assert type(_Trainer(logger=False).strategy.checkpoint_io) is WholeCheckpointIO
    WholeCheckpointIO().save_checkpoint({"epoch": 3}, "memory://a.ckpt")
    assert WholeCheckpointIO().load_checkpoint("memory://a.ckpt") == {"epoch": 3}
