"""Distilled in a recipe: nested classes, overrides, the tokenizer's link, checkpoints."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lrcompress.cli import main
from lrcompress.tasks import TextClassification

from .test_module import same

RECIPE = """
trainer:
  max_epochs: 2
  accelerator: cpu
  default_root_dir: {root}
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: {here}.Start
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {root}/saved, filename: end}}
model:
{model}
data:
  class_path: lrcompress.tasks.TextData
  init_args:
    train: {root}/train.tsv
    text: [sentence]
    label: label
    max_length: 16
    batch_size: 8
"""
STUDENT = """
class_path: lrcompress.tasks.TextClassification
init_args:
  path: {path}
  lr: 1.0e-3
"""
DISTILLED = """
class_path: lrcompress.Distilled
init_args:
  student:
{student}
  task: {{0: 1.0, 0.5: [1.0, 0.5], 1.0: 0.25}}
  losses:
    - class_path: lrcompress.distill.Logits
      init_args: {{weight: {{"epoch:1": 1.0}}, temperature: 3.0}}
    - lrcompress.distill.HiddenStates
"""
SEEN: list[Any] = []
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


class Start(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and hasattr(module, "on_compression_start"):
            module.on_compression_start()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        SEEN.append((module, trainer.datamodule))


def indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.strip("\n").splitlines())


@pytest.fixture
def recipes(tmp_path: Path, tiny_bert: Path) -> dict[str, str]:
    SEEN.clear()
    for name in ("train", "dev"):
        with (tmp_path / f"{name}.tsv").open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow(["sentence", "label"])
            rows = [(f"a very {('good', 'dull')[row % 2]} film", row % 2) for row in range(24)]
            table.writerows(rows)
    student = STUDENT.format(path=tiny_bert)
    models = {"plain": student, "distilled": DISTILLED.format(student=indented(student, 4))}
    for name, model in models.items():
        text = RECIPE.format(root=tmp_path, here=__name__, model=indented(model, 2))
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: str(tmp_path / f"{name}.yaml") for name in models}


def run(recipe: str, *overrides: str) -> tuple[Any, Any]:
    assert main(["fit", "--config", recipe, *overrides]) == 0
    return SEEN[-1]


def test_a_distilled_run_leaves_the_checkpoint_of_a_plain_one(
    recipes: dict[str, str], tmp_path: Path
) -> None:
    saved = {}
    for name, recipe in recipes.items():
        module, data = run(recipe, f"--trainer.callbacks.filename={name}")
        assert data.tokenizer is not None
        saved[name] = torch.load(tmp_path / "saved" / f"{name}.ckpt", weights_only=True)
        again = TextClassification.load_from_checkpoint(tmp_path / "saved" / f"{name}.ckpt")
        assert type(again) is TextClassification
        assert again.lr == 1e-3
        assert same(again, module)
    assert type(SEEN[1][0]).__name__ == "DistilledTextClassification"
    plain, distilled = saved["plain"], saved["distilled"]
    for key in ("hyper_parameters", "hparams_name", "datamodule_hyper_parameters"):
        assert plain.get(key) == distilled.get(key)
    assert distilled.keys() - plain.keys() == {"lrcompress_teacher"}
    assert plain["state_dict"].keys() == distilled["state_dict"].keys()


def test_keys_of_the_student_can_be_given_on_the_command_line(
    recipes: dict[str, str], tiny_bert: Path
) -> None:
    module, _ = run(recipes["distilled"], "--model.student.init_args.lr=0.5")
    assert module.lr == module.hparams["lr"] == 0.5
    other = f"--model.student.path={tiny_bert}/"
    module, _ = run(recipes["distilled"], "--model.student.lr=0.25", other, "--model.task=0.75")
    assert module.lr == 0.25
    assert module.hparams["path"] == f"{tiny_bert}/"
    assert module._distillation.task.constant == 0.75


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.losess=[]", "model.losess: unknown key; nearest valid: losses"),
        ("--model.student.lrr=1", "model.student.lrr: unknown key; nearest valid: lr"),
        ("--model.losses.init_args.wieght=1", "wieght: unknown key; nearest valid: weight"),
        ("--model.task=-1", "task must be a number that is not negative"),
        ("--model.teacher=strat", "got 'strat', which is none; nearest: start"),
    ],
)
def test_faults_are_found_in_what_is_nested(
    option: str, message: str, recipes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", recipes["distilled"], option]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_teacher_is_given_as_a_class(recipes: dict[str, str], tiny_bert: Path) -> None:
    teacher = (
        '{"class_path": "lrcompress.tasks.TextClassification", '
        f'"init_args": {{"path": "{tiny_bert}"}}}}'
    )
    module, _ = run(recipes["distilled"], f"--model.teacher={teacher}")
    assert type(module._distillation.teacher.module) is TextClassification
    assert module.hparams["lr"] == 1e-3
