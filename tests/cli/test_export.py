"""``lrcompress export``: from a checkpoint to a folder, in one command."""

from pathlib import Path

import lightning as L
import pytest
import torch
import transformers as tf
import yaml

from lrcompress.cli import main
from lrcompress.export import load_pretrained
from lrcompress.nn import Factored
from lrcompress.plan import LayerPlan, Plan
from lrcompress.tasks import TextClassification


class TwoModels(L.LightningModule):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.one, self.other = (tf.AutoModel.from_pretrained(path) for _ in range(2))


@pytest.fixture
def recipe(tiny_bert: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    model = {"class_path": "TextClassification", "init_args": {"path": str(tiny_bert)}}
    path.write_text(yaml.safe_dump({"model": model, "trainer": {"max_epochs": 3}}))
    return path


def factored(path: Path) -> TextClassification:
    task = TextClassification(str(path))
    names = [f"model.bert.encoder.layer.{i}.output.dense" for i in range(2)]
    sizes = {"in": 64, "out": 32, "rank": 5}
    Plan(tuple(LayerPlan(name, "low_rank", sizes) for name in names)).apply_(task)
    return task


@pytest.fixture
def checkpoint(tiny_bert: Path, tmp_path: Path) -> Path:
    """A file of weights only, as Lightning's trainer writes it."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(factored(tiny_bert))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    return tmp_path / "last.ckpt"


def test_a_checkpoint_becomes_a_folder(recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--config", str(recipe)]) == 0
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = load_pretrained(out)
    assert sum(isinstance(m, Factored) for m in model.modules()) == 2
    assert all(value.equal(state[f"model.{key}"]) for key, value in model.state_dict().items())
    assert tf.AutoTokenizer.from_pretrained(out).model_max_length == 64


def test_a_checkpoint_becomes_a_plain_model(recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--config={recipe}", "--format=dense"]
    assert main(["export", *options, str(checkpoint), str(out)]) == 0
    model = tf.AutoModelForSequenceClassification.from_pretrained(out)
    assert "lrcompress" not in (out / "config.json").read_text()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    name = "bert.encoder.layer.1.output.dense"
    product = state[f"model.{name}.left.weight"] @ state[f"model.{name}.right.weight"]
    torch.testing.assert_close(model.get_submodule(name).weight, product)


def test_what_was_typed_wrong_is_told(
    recipe: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [str(checkpoint), str(tmp_path / "out"), "--config", str(recipe)]
    for options, code, message in [
        ([*good, "--format", "densee"], 2, "--format: unknown format 'densee'; nearest: dense"),
        ([*good, "--formt", "dense"], 2, "unknown option --formt; nearest: --format"),
        ([*good, "--format"], 2, "--format needs a value; usage: lrcompress export CHECKPOINT"),
        (good[:2], 2, "expected a checkpoint, a folder and --config; usage"),
        (good[1:], 2, "expected a checkpoint, a folder and --config; usage"),
        ([*good, "--model.pth", "x"], 2, "pth"),
        ([*good, "--model.num_labels", "3"], 1, "is not of the recipe's model: Error"),
        ([str(recipe), *good[1:]], 1, "cannot be read as a checkpoint"),
        (
            [str(tmp_path), *good[1:]],
            1,
            "is a sharded checkpoint; make one file of it first: python -m torch",
        ),
    ]:
        assert main(["export", *options]) == code, options
        assert message in capsys.readouterr().err, options
    assert not (tmp_path / "out").exists()


def test_what_the_files_lack_is_told(
    recipe: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = str(tmp_path / "out"), tmp_path / "other"
    torch.save({"weights": 3}, other)
    assert main(["export", str(other), out, "--config", str(recipe)]) == 1
    assert "is no checkpoint of Lightning: it has no state_dict" in capsys.readouterr().err
    for text, message in [("trainer: {}", "has no model"), ("a: [", "while parsing")]:
        other.write_text(text)
        assert main(["export", str(checkpoint), out, "--config", str(other)]) == 2
        assert message in capsys.readouterr().err


def test_a_module_with_two_models_is_refused(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = TwoModels(str(tiny_bert))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "two.ckpt")
    model = {"class_path": f"{__name__}.TwoModels", "init_args": {"path": str(tiny_bert)}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"model": model}))
    places = [str(tmp_path / "two.ckpt"), str(tmp_path / "out")]
    assert main(["export", *places, "--config", str(tmp_path / "two.yaml")]) == 1
    assert "must hold one transformers model to export, it holds one, other" in (
        capsys.readouterr().err
    )
