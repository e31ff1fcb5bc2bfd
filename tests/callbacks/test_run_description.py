"""What the report says of the run that it is of."""

import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as tf
from lightning.pytorch import LightningDataModule

import lrcompress
from lrcompress.callbacks.run_description import describe_run

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")


class Files(LightningDataModule):
    def __init__(self, loader: Any, train: str = "train.tsv") -> None:
        super().__init__()
        self.save_hyperparameters(ignore="loader")
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader


def test_a_report_says_what_was_run(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    options: dict[str, Any] = {"verbose": False, "validate": False, "report_path": str(path)}
    callback = lrcompress.Factorize(0.5, at="step:8", every_n_steps=2, **options)
    model = tagger()
    L.seed_everything(7, verbose=False)
    trainer(callback).fit(model, datamodule=Files(loader()))
    about = lrcompress.Report.load(path).about
    assert about == callback.report.about
    assert about["model"] == "Tagger"
    assert about["data"] == "Files: train.tsv"
    assert re.fullmatch(r"18 steps in \d+ s, 1 × CPUAccelerator, 32-true", about["training"])
    assert about["seed"] == "7"
    assert about["versions"].startswith(
        f"lrcompress {lrcompress.__version__}, torch {version('torch')}"
    )
    assert "What was run" in path.with_suffix(".html").read_text(encoding="utf-8")


def test_a_model_of_transformers_is_named_with_its_source(trainer: Make, loader: Make) -> None:
    class Task(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            config = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            config.name_or_path = "some/folder"
            self.model = tf.BertModel(config)

    found = describe_run(trainer(), Task(), time.time() - 3700)
    assert found["model"] == "Task: BertModel, some/folder"
    assert "0 steps in 1 h 1 min" in found["training"]
    assert "data" not in found


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_says_which_steps_took_the_time(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
    made = [lrcompress.Factorize(0.5, at="step:8", every_n_steps=2, **options) for _ in range(2)]
    trainer(made[0], every_step=True).fit(tagger(), loader())
    checkpoint = (tmp_path / "step=13.ckpt").rename(tmp_path / "kept.ckpt")
    trainer(made[1], every_step=True).fit(tagger(), loader(), ckpt_path=checkpoint)
    assert made[0].report.about["training"].startswith("18 steps in ")
    assert made[1].report.about["training"].startswith("18 steps, the last 5 in ")


def test_what_cannot_be_told_ends_no_run(tagger: Make, loader: Make, trainer: Make) -> None:
    class Strange(torch.nn.Module):
        @property
        def name_or_path(self) -> str:
            raise RuntimeError("not now")

    options: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
    callback = lrcompress.Factorize(0.5, at="step:8", every_n_steps=2, **options)
    model = tagger()
    model.strange = Strange()
    with pytest.warns(UserWarning, match="could not describe the run in its report.*not now"):
        trainer(callback).fit(model, loader())
    assert callback.report.points
    assert not callback.report.about
