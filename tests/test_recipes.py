"""Every recipe, loaded and run for a few steps on stand-ins for its model and its data."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrcompress.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
FOUND = sorted(RECIPES.glob("*.yaml"))
SAID = {"text": ["dull"], "answer_start": [7]}
JSON_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "QuestionData": (
        {"question": "the film was", "context": "a very dull film", "answers": SAID},
        ["--data.max_length=16", "--data.stride=4"],
    ),
    "TokenData": (
        {"tokens": ["a", "dull", "film"], "ner_tags": [0, 1, 6]},
        ["--data.max_length=32"],
    ),
}


def test_every_recipe_is_found() -> None:
    assert [path.stem for path in FOUND] == [
        "cola_kfac",
        "mnli_fwsvd",
        "mnli_losparse_distil",
        "mrpc_drone",
        "mrpc_dsee_heads",
        "mrpc_kroneckerbert",
        "mrpc_losparse",
        "mrpc_svd_then_distil",
        "quickstart",
        "squad_losparse",
        "sst2_dsee",
        "sst2_embedding",
        "sst2_kfac",
        "sst2_kfac_distil",
        "sst2_losparse",
        "sst2_losparse_then_distil",
        "sst2_safe_embedding",
        "stsb_row_fisher",
        "wikiann_kfac",
        "wikitext2_gpt2_kfac",
        "wikitext2_gpt2_kngpt2",
        "wikitext2_smollm2_heal",
        "xsum_losparse",
    ]


def stand_ins(recipe: dict[str, Any], model: Path, writer: Path, folder: Path) -> list[str]:
    """Overrides that put a tiny model and a few local rows in place of the recipe's own."""
    data, given = recipe["data"]["init_args"], recipe["model"]["init_args"]
    inner = "student." if "student" in given else ""
    kind = recipe["data"]["class_path"].rpartition(".")[2]
    if kind in JSON_ROWS:
        return of_rows(*JSON_ROWS[kind], model, folder)
    if kind == "LanguageData":
        shutil.copytree(model, folder / "causal")
        config = json.loads((model / "config.json").read_text()) | {"is_decoder": True}
        (folder / "causal" / "config.json").write_text(json.dumps(config))
        for name in ("train", "valid", "test"):
            (folder / f"{name}.txt").write_text("a very good film\na very dull film\n" * 200)
        train = f"--data.train={folder / 'train.txt'}"
        return [f"--model.{inner}path={folder / 'causal'}", train, "--data.length=32"]
    if kind == "SequenceData":
        for name, count in (("train", 96), ("dev", 4)):
            rows = [f"a {word} film\tvery {word}" for word in ("good", "dull")] * (count // 2)
            (folder / f"{name}.tsv").write_text("\n".join(["document\tsummary", *rows]) + "\n")
        lengths = ["--data.max_length=32", "--data.max_target=8", "--model.max_written=4"]
        few = ["--data.batch_size=8", "--trainer.callbacks.mask_every=2", "--trainer.max_epochs=2"]
        train = f"--data.train={folder / 'train.tsv'}"
        return [f"--model.path={writer}", train, *lengths, *few]
    if kind == "DocstringData":
        rows = ["--data.train_size=96", "--data.val_size=12", "--data.test_size=12"]
        return [f"--model.path={model}", *rows, "--data.max_length=32"]
    return labelled(data, given, model, folder)


def labelled(data: Any, given: Any, model: Path, folder: Path) -> list[str]:
    inner = "student." if "student" in given else ""
    classes = (given["student"]["init_args"] if inner else given)["num_labels"]
    for name, count in (("train", 96), ("dev", 12), ("test", 12)):
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow([*data["text"], data["label"]])
            for row in range(count):
                texts = [f"a very {('good', 'dull')[row % 2]} film" for _ in data["text"]]
                table.writerow([*texts, row % classes if classes > 1 else row / 4])
    train = f"--data.train={folder / 'train.tsv'}"
    return [f"--model.{inner}path={model}", train, "--data.max_length=32"]


def of_rows(row: object, overrides: list[str], model: Path, folder: Path) -> list[str]:
    for name, count in (("train", 96), ("dev", 4)):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * count)
    return [f"--model.path={model}", f"--data.train={folder / 'train.jsonl'}", *overrides]


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_a_recipe_runs_on_stand_ins(
    path: Path, tiny_bert: Path, tiny_bart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = stand_ins(yaml.safe_load(path.read_text()), tiny_bert, tiny_bart, tmp_path)
    arguments = ["--config", str(path), *overrides, f"--trainer.default_root_dir={tmp_path}"]
    quick = [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]

    assert main(["fit", *arguments, *quick, "--trainer.limit_val_batches=1"]) == 0, (
        capsys.readouterr().err
    )

    shown = capsys.readouterr().out
    assert "what was lost and gained" in shown
    assert "targeted parameters" in shown


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_a_recipe_starts_with_its_command(path: Path) -> None:
    assert f"lrcompress fit --config recipes/{path.name}" in path.read_text()


def test_plan_says_what_a_recipe_would_do(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(RECIPES / "quickstart.yaml"), f"--model.path={tiny_bert}"]
    rows = ["--data.train_size=96", "--data.val_size=12", "--data.test_size=12"]
    assert main(["plan", *arguments, *rows]) == 0
    shown = capsys.readouterr().out
    assert "attention.self.query" in shown
    assert "targeted layers:" in shown
    assert "statistics: at most" in shown


def test_settings_of_a_callback_that_are_wrong_end_with_a_clear_error(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = str(RECIPES / "quickstart.yaml")
    for option, message in (
        ("--trainer.callbacks.method=kfca", "got 'kfca', nearest: kfac"),
        ("--trainer.callbacks.keep=30", "did you mean 0.3?"),
        ("--trainer.callbacks.targets=[nothing]", "pattern 'nothing' matches none"),
    ):
        arguments = ["--config", quickstart, f"--model.path={tiny_bert}", option]
        assert main(["plan", *arguments]) in (1, 2)
        assert message in capsys.readouterr().err
