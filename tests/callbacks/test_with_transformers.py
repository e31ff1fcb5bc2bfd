"""The ready task, a real architecture with dropout: the whole way, and back from any step."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lrcompress
from lrcompress.nn import LowRankLinear
from lrcompress.tasks import TextClassification, TextData

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks")


@pytest.fixture
def bert(tiny_bert: Path, tmp_path: Path) -> str:
    """The tiny BERT, with dropout."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    words = ["good", "dull", "warm", "awful", "fine", "bad"]
    lines = [f"{i % 2}\ta {'very ' * (i % 4)}{words[i % 6]} film" for i in range(24)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.tsv"


def fit(bert: str, rows: Path, *callbacks: L.Callback, **kwargs: Any) -> TextClassification:
    torch.manual_seed(0)
    model = TextClassification(bert, lr=1e-3)
    data = TextData(bert, [1], 0, train=str(rows), header=False, batch_size=8, max_length=32)
    factorize = lrcompress.Factorize(
        keep=0.4, at="step:5", every_n_steps=2, verbose=False, report_path=None
    )
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        callbacks=[factorize, *callbacks],
    )
    trainer.fit(model, data, **kwargs)
    return model


def test_a_transformers_model_resumed_at_any_step_ends_bit_identical(
    bert: str, rows: Path, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(
        tmp_path / "saved",
        "{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    whole = fit(bert, rows, saving)
    assert sum(isinstance(m, LowRankLinear) for m in whole.modules()) >= 10
    saved = sorted((tmp_path / "saved").glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 9
    for path in saved[:-1]:
        resumed = fit(bert, rows, ckpt_path=path)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (path.name, name)


def test_a_transformers_model_resumed_between_epochs_ends_bit_identical(
    bert: str, rows: Path, tmp_path: Path
) -> None:
    whole = fit(bert, rows, ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1))
    for epoch in (0, 1):
        resumed = fit(bert, rows, ckpt_path=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (epoch, name)


def test_load_from_checkpoint_needs_no_helper_with_the_ready_task(
    bert: str, rows: Path, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "end", save_weights_only=True)
    whole = fit(bert, rows, saving)
    again = TextClassification.load_from_checkpoint(saving.best_model_path, weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
