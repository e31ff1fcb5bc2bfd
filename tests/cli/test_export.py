"""``lrcompress export``: from a checkpoint to a folder, in one command."""

import json
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file
from torch.distributed import checkpoint as distributed

from lrcompress.cli import main
from lrcompress.cli.int8 import int8_table
from lrcompress.errors import RecipeError
from lrcompress.export import load_pretrained, run_onnx
from lrcompress.nn import FactoredLinear
from lrcompress.structure.plan import LayerPlan, Plan
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
    assert sum(isinstance(m, FactoredLinear) for m in model.modules()) == 2
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


def test_a_checkpoint_becomes_a_folder_with_its_own_code(
    recipe: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = [f"--config={recipe}", "--format=remote-code"]
    assert main(["export", *options, str(checkpoint), str(out)]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    auto = {"AutoModelForSequenceClassification": "modeling_compressed.CompressedModel"}
    assert config["auto_map"] == auto
    assert len(config["compressed_layers"]) == 2
    code = (out / "modeling_compressed.py").read_text()
    assert "import lrcompress" not in code
    assert "BertForSequenceClassification" in code
    held = load_file(out / "model.safetensors")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(held[key.removeprefix("model.")].equal(value) for key, value in state.items())
    assert tf.AutoTokenizer.from_pretrained(out).model_max_length == 64


def test_low_rank_layers_are_stored_as_pivoted_rows(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    places = [str(checkpoint), "--config", str(recipe)]
    assert main(["export", *places, str(tmp_path / "factors")]) == 0
    assert main(["export", *places, str(tmp_path / "rows"), "--pivoted"]) == 0
    factors, rows = (load_pretrained(tmp_path / name) for name in ("factors", "rows"))
    ids = torch.arange(5, 25).reshape(2, 10)
    torch.testing.assert_close(rows(ids).logits, factors(ids).logits)
    assert {layer.kind for layer in Plan.of(rows)} == {"pivoted"}
    assert rows.num_parameters() == factors.num_parameters() - 2 * 5**2


def rows(path: Path, words: list[str]) -> str:
    path.write_text("".join(f"{i % 2}\t{words[i % 2]} film {i}\n" for i in range(20)))
    return str(path)


def test_a_checkpoint_becomes_a_graph_in_float32_and_int8(
    recipe: Path,
    checkpoint: Path,
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = rows(tmp_path / "train.tsv", ["bad", "good"])
    columns = {"text": [1], "label": 0, "header": False, "max_length": 32, "train": train}
    data = {"class_path": "lrcompress.tasks.TextData", "init_args": columns}
    (tmp_path / "with.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"data": data})
    )
    out = tmp_path / "out"
    options = ["export", str(checkpoint), str(out), f"--config={tmp_path / 'with.yaml'}"]
    val = rows(tmp_path / "other.tsv", ["dull", "fine"])
    assert main([*options, "--format", "onnx", "--int8", f"--data.val={val}"]) == 0
    told = capsys.readouterr().out
    assert "model.onnx: the largest difference to the model is" in told
    assert "validation data, 20 rows" in told
    names = ("torch", "model.onnx", "model.int8.onnx")
    table = {
        name: line.split("│")[2:-1]
        for line in told.splitlines()
        for name in names
        if line.startswith(f"│ {name} ")
    }
    module = factored(tiny_bert).eval()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    texts = [f"{['dull', 'fine'][i % 2]} film {i}" for i in range(20)]
    x = tokenizer(texts, padding=True, return_tensors="pt")
    right = module.model(**x).logits.argmax(-1).eq(torch.arange(20) % 2).double().mean()
    assert float(table["torch"][0]) == float(table["model.onnx"][0]) == float(right)
    assert table["model.onnx"][1].strip() == "1.0000"
    assert float(table["model.onnx"][2]) < 1e-5 < float(table["model.int8.onnx"][2]) < 0.1
    run = run_onnx(out / "model.onnx")
    torch.testing.assert_close(run(x)["logits"], module.model(**x).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        RecipeError, match="measured on a TextClassification, found a TwoModels; leave it out"
    ):
        int8_table(TwoModels(str(tiny_bert)), module.model, L.LightningDataModule(), [])
    assert main(["bench", str(out), "--shapes", "2x8", "--rounds", "1"]) == 0
    assert "2×8" in capsys.readouterr().out
    (tmp_path / "other.tsv").unlink()
    assert main([*options, "--format", "onnx", "--int8"]) == 1
    assert "there is no val split to validate on" in capsys.readouterr().err


def test_a_checkpoint_becomes_a_program(
    recipe: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = [str(out), f"--config={recipe}", "--format=torch-export"]
    assert main(["export", str(checkpoint), *options]) == 0
    told = capsys.readouterr().out
    assert "model.pt2: the largest difference to the model is" in told
    assert ".module()({'input_ids': …, " in told.replace("\n", "")
    assert main(["export", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: lrcompress export CHECKPOINT FOLDER --config")
    x = dict(tf.AutoTokenizer.from_pretrained(out)(["a good film"] * 3, return_tensors="pt"))
    module = factored(Path(yaml.safe_load(recipe.read_text())["model"]["init_args"]["path"]))
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(x)["logits"], module.eval().model(**x).logits)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as is meant
def test_a_sharded_checkpoint_is_exported_after_it_was_made_one_file(
    recipe: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    shards, out = tmp_path / "shards.ckpt", tmp_path / "out"
    distributed.save({"model": state}, checkpoint_id=shards, no_dist=True)
    torch.save({"epoch": 3}, shards / "meta.pt")
    script = "lightning.pytorch.utilities.consolidate_checkpoint"
    monkeypatch.setattr(sys, "argv", [script, str(shards)])
    runpy.run_module(script, run_name="__main__")
    one = f"{shards}.consolidated"
    assert main(["export", one, str(out), "--config", str(recipe)]) == 0
    model = load_pretrained(out)
    assert all(value.equal(state[f"model.{key}"]) for key, value in model.state_dict().items())


def test_what_was_typed_wrong_is_told(
    recipe: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [str(checkpoint), str(tmp_path / "out"), "--config", str(recipe)]
    for options, code, message in [
        ([*good, "--format", "densee"], 2, "--format: unknown format 'densee'; nearest: dense"),
        ([*good, "--int8"], 2, "--int8 is for --format onnx, got --format transformers"),
        ([*good, "--format", "onnx", "--int8"], 2, "has no data"),
        ([*good, "--format", "dense", "--pivoted"], 2, "--pivoted is for low-rank layers, of whi"),
        (
            [*good, "--formt", "dense"],
            2,
            "--formt; of the recipe only --model.KEY and --data.KEY count here, nearest: --fo",
        ),
        ([*good, "--format"], 2, "--format needs a value; usage: lrcompress export CHECKPOINT"),
        (good[:2], 2, "expected a checkpoint, a folder and --config; usage"),
        (good[1:], 2, "expected a checkpoint, a folder and --config; usage"),
        ([*good, "--model.pth", "x"], 2, "pth"),
        ([*good, "--model.num_labels", "3"], 1, "is not of this TextClassification: Error"),
        ([str(recipe), *good[1:]], 1, "cannot be read as a checkpoint"),
        ([str(tmp_path), *good[1:]], 1, "is a sharded checkpoint, whose .metadata can run"),
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
    assert main(["export", str(checkpoint), out, "--config", str(recipe)]) == 0
    for report in ({"points": 3}, {"points": [], "final": {}, "seconds_per_step": 3}, "x"):
        states = {"callbacks": {"Factorize": {"report": report}}}
        torch.save(torch.load(checkpoint, weights_only=True) | states, other)
        assert main(["export", str(other), out, "--config", str(recipe)]) == 1
        assert "the report in the checkpoint cannot be read: " in capsys.readouterr().err


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
