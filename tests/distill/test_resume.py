"""A teacher in a file of its own: runs that are interrupted, and files that are not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompress
from lrcompress.distill import Distilled, HiddenStates, Logits, Relations
from lrcompress.errors import CheckpointError

from .test_module import same

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]


def distilled(student: Any, **kwargs: Any) -> Distilled:
    return Distilled(student, losses=[Logits(), HiddenStates(), Relations()], **kwargs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("factored", [False, True])
def test_a_run_resumed_at_any_step_ends_bit_identical(
    factored: bool,
    precision: str,
    reader: Make,
    batches: Make,
    trainer: Make,
    start_at: Make,
    tmp_path: Path,
) -> None:
    def callback() -> Any:
        if not factored:
            return start_at(3)
        return lrcompress.Factorize(
            keep=0.4,
            at="step:3",
            method="svd",
            align=1,
            verbose=False,
            validate=False,
            report_path=None,
        )

    sizes = {"width": 16, "dropout": 0.0}
    whole = distilled(reader(**sizes))
    trainer(callback(), every_step=True, precision=precision).fit(whole, Stateful(batches()))
    saved = [tmp_path / f"step={step}.ckpt" for step in range(1, 9)]
    named = ["lrcompress_teacher" in torch.load(path, weights_only=True) for path in saved]
    assert named == [False] * 3 + [True] * 5
    assert len(list((tmp_path / "teachers").iterdir())) == 1
    for path in saved[:7]:
        model = distilled(reader(seed=7, **sizes))
        rest = trainer(callback(), precision=precision)
        rest.fit(model, Stateful(batches()), ckpt_path=path)
        assert same(model, whole), path.name
        theirs = model._distillation.teacher
        assert theirs.fingerprint == whole._distillation.teacher.fingerprint


class Stateful:
    """The batches in order; a checkpoint knows which is next."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.served, self.start = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.served, self.start = self.start, 0
        while self.served < len(self.batches):
            self.served += 1
            yield self.batches[self.served - 1]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["served"]


def interrupted(reader: Make, loader: Make, trainer: Make, start_at: Make, **kwargs: Any) -> None:
    trainer(start_at(), every_step=True).fit(distilled(reader(), **kwargs), loader())


@pytest.fixture
def resume(reader: Make, loader: Make, trainer: Make, tmp_path: Path) -> Make:
    def run(**kwargs: Any) -> Distilled:
        module = distilled(reader(), **kwargs)
        trainer().fit(module, loader(), ckpt_path=tmp_path / "step=4.ckpt")
        return module

    return run


def test_the_folder_can_be_chosen_and_moved(
    reader: Make, loader: Make, trainer: Make, start_at: Make, resume: Make, tmp_path: Path
) -> None:
    interrupted(reader, loader, trainer, start_at, teacher_dir=str(tmp_path / "here"))
    assert not (tmp_path / "teachers").exists()
    (file,) = (tmp_path / "here").iterdir()
    assert file.name.startswith("teacher-")
    assert load_file(file).keys() == reader().state_dict().keys()
    with pytest.raises(
        CheckpointError, match=rf"'{file.name}', which is not in .*teachers; put it"
    ):
        resume()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert resume(teacher_dir=str(tmp_path / "there"))._distillation.teacher is not None


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_file_that_is_not_the_one(
    damage: str,
    reader: Make,
    loader: Make,
    trainer: Make,
    start_at: Make,
    resume: Make,
    tmp_path: Path,
) -> None:
    interrupted(reader, loader, trainer, start_at)
    (file,) = (tmp_path / "teachers").iterdir()
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    message = "cannot be read" if damage == "cut" else "holds other weights .* teacher_dir="
    with pytest.raises(CheckpointError, match=message):
        resume()


def test_a_run_without_checkpoints_writes_no_teacher(
    reader: Make, loader: Make, trainer: Make, start_at: Make, tmp_path: Path
) -> None:
    trainer(start_at()).fit(distilled(reader()), loader())
    assert not list(tmp_path.iterdir())


def test_another_teacher_does_not_look_for_the_file(
    reader: Make, loader: Make, trainer: Make, start_at: Make, resume: Make, tmp_path: Path
) -> None:
    interrupted(reader, loader, trainer, start_at)
    shutil.rmtree(tmp_path / "teachers")
    other = reader(1)
    assert resume(teacher=other)._distillation.teacher.module is other
    trainer().validate(distilled(reader()), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    undistilled = reader()
    trainer().fit(undistilled, loader(), ckpt_path=tmp_path / "step=4.ckpt")


def test_a_checkpoint_of_a_later_version(
    reader: Make, loader: Make, trainer: Make, start_at: Make, resume: Make, tmp_path: Path
) -> None:
    interrupted(reader, loader, trainer, start_at)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    saved["lrcompress_teacher"]["version"] = 2
    torch.save(saved, tmp_path / "step=4.ckpt")
    with pytest.raises(CheckpointError, match="lrcompress_teacher of version 1, got version 2"):
        resume()


def test_a_teacher_s_file_is_a_teacher_too(
    reader: Make, loader: Make, trainer: Make, start_at: Make, tmp_path: Path
) -> None:
    interrupted(reader, loader, trainer, start_at)
    (file,) = (tmp_path / "teachers").iterdir()
    module = distilled(reader(1), teacher=str(file))
    trainer(max_steps=1).fit(module, loader())
    assert module._distillation.teacher.file == file.name
