"""Folders, checkpoints and recipes that version 0.1.0 wrote are read as it read them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lrcompress
from lrcompress.cli import main

from .fits import FILES, FITS, Classifier, answers, fitted, tokens

EXPECTED = load_file(FILES / "expected.safetensors")
CHECKPOINTS = [f"{name}-{step}" for name, (_, steps) in FITS.items() for step in steps]
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_run_goes_on_from_its_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    name = checkpoint.split("-")[0]
    ended = fitted(name, tmp_path, FILES / f"{checkpoint}.ckpt")
    torch.testing.assert_close(answers(ended), EXPECTED[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_dense_module_gets_the_structure_of_a_checkpoint(checkpoint: str) -> None:
    path = FILES / f"{checkpoint}.ckpt"
    module = lrcompress.restore_structure(Classifier(), path)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    replaced = len(lrcompress.Plan.of(module))
    assert bool(replaced) == (checkpoint not in {"factorize-4", "embedding-4"})


def test_an_exported_folder_is_loaded() -> None:
    model = lrcompress.load_pretrained(FILES / "folder")
    assert lrcompress.Plan.of(model).to_dict() == json.loads((FILES / "plan.json").read_text())
    assert len({layer.kind for layer in lrcompress.Plan.of(model)}) == 6
    with torch.no_grad():
        logits = model(tokens()).logits
    torch.testing.assert_close(logits, EXPECTED["folder"], atol=1e-5, rtol=1e-5)


def test_a_recipe_is_run(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"a {word} film\t{int(word == 'good')}" for word in ("good", "bad", "dull", "good")]
    for split in ("train", "val"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows * 8]))
    recipe, train = FILES / "recipe.yaml", tmp_path / "train.tsv"
    told = ["--config", str(recipe), "--model.student.path", str(tiny_bert)]
    told += ["--data.train", str(train), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *told]) == 0, capsys.readouterr().err
    report = lrcompress.Report.load(tmp_path / "report.json")
    assert [point.method for point in report.points] == [
        "low_rank embedding by fisher",
        "weighted_kfac",
        "weighted_kfac",
    ]
