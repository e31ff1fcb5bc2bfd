"""A model comes back from its folder bit for bit, and training goes on from there."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompress
from lrcompress.errors import CheckpointError, SettingError
from lrcompress.export import CompressionQuantizer, load_pretrained, merge_dense, save_pretrained
from lrcompress.nn import FactoredLinear, LowRankLinear, LowRankSparseLinear
from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.structure.plan import LayerPlan, Plan
from lrcompress.tasks import TextClassification, TextData

from .conftest import ARCHITECTURES, KINDS, inputs, made, train_step_


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs(model)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("trained", [False, True], ids=["before training", "after a step"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_gives_the_model_back_bit_for_bit(
    architecture: str, kind: str, trained: bool, tmp_path: Path
) -> None:
    model = made(architecture, kind)
    if trained:
        train_step_(model)
    expected = logits(model)
    save_pretrained(model, tmp_path)
    forms = {"low_rank": "in low-rank form", "pivoted": "in low-rank form, as pivoted rows"}
    form = forms.get(kind, f"replaced: {len(Plan.of(model))} {kind}")
    assert f"of its layers {form}".replace("_", " ") in (tmp_path / "README.md").read_text()
    again = load_pretrained(tmp_path)
    assert type(again) is type(model)
    assert Plan.of(again) == Plan.of(model)
    assert same_state(again, model)
    assert logits(again).equal(expected)
    assert not again.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    assert len(list(again.parameters())) == len(list(model.parameters())), "ties are kept"
    train_step_(again)
    train_step_(model)
    assert logits(again).equal(logits(model)), "training goes on as it would have"


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_transformers_itself_loads_the_folder(architecture: str, tmp_path: Path) -> None:
    model = made(architecture)
    save_pretrained(model, tmp_path)
    again, found = type(model).from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert logits(again).equal(logits(model))
    assert {key: list(keys) for key, keys in found.items() if keys} == {}
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert logits(half.float()).allclose(logits(model), atol=0.1)
    assert {p.dtype for p in half.half().parameters()} == {torch.float16}


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = made("bert")
    before = copy.deepcopy(model.state_dict())
    save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_loaded_model_is_saved_again_by_either_way(tmp_path: Path) -> None:
    save_pretrained(made("bert", "low_rank_sparse"), tmp_path / "first")
    model = load_pretrained(tmp_path / "first")
    train_step_(model)
    save_pretrained(model, tmp_path / "ours")
    assert isinstance(model.hf_quantizer, CompressionQuantizer)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for folder in ("ours", "theirs"):
        assert same_state(load_pretrained(tmp_path / folder), model)


def test_a_changed_structure_is_saved_as_it_is_now(tmp_path: Path) -> None:
    save_pretrained(made("bert"), tmp_path / "first")
    model = load_pretrained(tmp_path / "first")
    name = "bert.encoder.layer.0.output.dense"
    Plan((LayerPlan(name, "dense", {"in": 24, "out": 16}),)).apply_(model)
    save_pretrained(model, tmp_path / "second")
    again = load_pretrained(tmp_path / "second")
    assert isinstance(again.get_submodule(name), nn.Linear)
    assert same_state(again, model)


def test_another_class_of_the_same_body_loads_it(tmp_path: Path) -> None:
    model = made("bert")
    save_pretrained(model, tmp_path / "classifier")
    body = load_pretrained(tmp_path / "classifier", tf.AutoModel)
    assert same_state(body, model.bert)
    save_pretrained(body, tmp_path / "body")
    classes = tf.AutoModelForSequenceClassification, tf.BertForTokenClassification
    for model_class in classes:
        again = load_pretrained(tmp_path / "body", model_class)
        assert Plan.of(again) == Plan.of(model)
        assert again.bert.encoder.layer[1].output.dense.left.weight.equal(
            body.encoder.layer[1].output.dense.left.weight
        )


def test_layers_of_a_head_that_is_not_loaded_are_left_out(tmp_path: Path) -> None:
    model = made("roberta")
    Plan((LayerPlan("lm_head.dense", "low_rank", {"in": 16, "out": 16, "rank": 2}),)).apply_(model)
    save_pretrained(model, tmp_path)
    assert same_state(load_pretrained(tmp_path), model)
    body = load_pretrained(tmp_path, tf.RobertaModel)
    assert sum(isinstance(m, FactoredLinear) for m in body.modules()) == 12
    assert load_pretrained(tmp_path, tf.RobertaForSequenceClassification).num_labels == 2


def test_a_head_untied_by_factoring_stays_untied(tmp_path: Path) -> None:
    model = made("llama")
    Plan((LayerPlan("lm_head", "low_rank", {"in": 16, "out": 50, "rank": 4}),)).apply_(model)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert same_state(again, model)
    assert logits(again).equal(logits(model))


def test_the_trainer_of_transformers_goes_on_from_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    save_pretrained(made("bert"), tmp_path / "first")
    model = load_pretrained(tmp_path / "first")
    before = copy.deepcopy(model.state_dict())
    batch = inputs(model)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    settings = tf.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    tf.Trainer(model, settings, train_dataset=rows).train()
    assert not any(
        value.equal(before[key]) for key, value in model.state_dict().items() if "left" in key
    )


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_lightning_goes_on_from_the_folder(
    tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tf.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_bert)
    plan = Plan(
        tuple(
            LayerPlan(
                f"bert.encoder.layer.{i}.output.dense", "low_rank", {"in": 64, "out": 32, "rank": 5}
            )
            for i in range(2)
        )
    )
    plan.apply_(model)
    save_pretrained(model, tmp_path / "folder", tokenizer)
    lines = [f"{i % 2}\ta {'good' if i % 2 else 'dull'} film" for i in range(8)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    task = TextClassification(str(tmp_path / "folder"))
    assert Plan.of(task.model) == plan
    assert same_state(task.model, model)
    train = str(tmp_path / "train.tsv")
    data = TextData(
        str(tmp_path / "folder"), [1], 0, train=train, header=False, batch_size=8, max_length=16
    )
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    save_pretrained(task.model, tmp_path / "after")
    after = load_pretrained(tmp_path / "after")
    assert same_state(after, task.model)
    assert not same_state(after, model)


def test_without_the_plugin_loading_ends_in_what_to_import(tmp_path: Path) -> None:
    save_pretrained(made("bert"), tmp_path)
    code = f"import transformers as t; t.AutoModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "to load this model: import lrcompress.export" in done.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes`" in done.stderr


def test_a_strict_load_of_a_dense_model_refuses_the_file_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_pretrained(made("bert"), tmp_path)
    dense = ARCHITECTURES["bert"]()
    with pytest.raises(RuntimeError, match=r"size mismatch for bert\.encoder\.layer\.0"):
        dense.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_the_folder_holds_plan_report_and_checksums(tmp_path: Path) -> None:
    model = made("bert")
    layer = LayerRecord("bert.encoder.layer.0.output.dense", 16, 24, 3, 0.1, 0.01)
    point = PointRecord("kfac", 5, [layer], 900, 600)
    save_pretrained(model, tmp_path, report=Report([point]))
    record = json.loads((tmp_path / "lrcompress.json").read_text())
    assert Plan.from_dict(record["plan"]) == Plan.of(model)
    assert Report.from_dict(record["report"]) == Report([point])
    assert set(record["sha256"]) == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["plan"] == record["plan"]
    save_pretrained(model, tmp_path, report=point)
    assert json.loads((tmp_path / "lrcompress.json").read_text())["report"] == record["report"]


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = made("bert")


def test_what_cannot_be_saved_is_told_the_way_out(tmp_path: Path) -> None:
    plain = nn.Sequential(LowRankLinear(4, 4, 2))
    with pytest.raises(SettingError, match=r"got a Sequential; keep its state_dict .*Plan\.apply_"):
        save_pretrained(plain, tmp_path)
    with pytest.raises(SettingError, match="got a Wrapper; give its 'inner'"):
        save_pretrained(Wrapper(), tmp_path)
    model = made("bert")
    model.hf_quantizer = object()
    with pytest.raises(SettingError, match="quantised by object; export it before"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_load_pretrained_fixes_some_arguments(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trust_remote_code is fixed in load_pretrained"):
        load_pretrained(tmp_path, trust_remote_code=True)


def edit(folder: Path, **changes: Any) -> None:
    """Change a config.json as somebody would who knows about the checksums."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "lrcompress.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["os"]}, r"architectures must name a model class .* got \['os'\]"),
        ({"architectures": ["BertForSequenceClasification"]}, "nearest: BertForSequenceClass"),
        ({"architectures": None}, "got None"),
        ({"hidden_size": 32}, r"does not fit together: layer .* has sizes \{'in': 32"),
        ({"vocab_size": 51}, r"'bert\.embeddings\.word_embeddings\.weight' has sizes \[51, 16\]"),
        ({"hidden_size": "x"}, "transformers cannot load .*hidden_size"),
        ({"hidden_act": "nothing"}, "transformers cannot load .*nothing"),
        ({"model_type": "nothing"}, "transformers cannot load .*nothing"),
        ({"num_hidden_layers": 3}, "has tensors that are not in the weights, such as 'bert"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pretrained(made("bert"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_a_tensor_under_another_name_is_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_pretrained(made("bert"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.wait"] = tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "lrcompress.json").unlink()
    with pytest.raises(CheckpointError, match="1 tensors of the model are not in the weights"):
        load_pretrained(tmp_path)


def test_pruned_components_stay_pruned(tmp_path: Path) -> None:
    model = made("bert", "low_rank_sparse")
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    train_step_(again)
    layers = [m for m in again.modules() if isinstance(m, LowRankSparseLinear)]
    pruned = [m for m in layers if not bool(m.kept.all())]
    assert len(pruned) == 6
    assert all(not m.inner.weight[~m.kept].any() for m in pruned)


def test_the_public_names_are_these_functions() -> None:
    assert lrcompress.save_pretrained is save_pretrained
    assert lrcompress.load_pretrained is load_pretrained
    assert lrcompress.merge_dense is merge_dense


@st.composite
def bert_plans(draw: st.DrawFn) -> Plan:
    """Any layers of a tiny BERT, of any sizes."""
    layers, block = [], "bert.encoder.layer.0"
    for name, out, in_ in (
        (f"{block}.attention.self.query", 16, 16),
        (f"{block}.intermediate.dense", 24, 16),
        (f"{block}.output.dense", 16, 24),
    ):
        kind = draw(st.sampled_from(["dense", "low_rank", "pivoted", "low_rank_sparse"]))
        sizes = {"in": in_, "out": out, "rank": draw(st.integers(1, 16))}
        if kind == "low_rank_sparse":
            sizes["rows"] = draw(st.integers(0, out))
        if kind != "dense":
            layers.append(LayerPlan(name, kind, sizes))
    return Plan(tuple(layers))


@settings(max_examples=5)
@given(plan=bert_plans())
def test_a_folder_of_any_plan_is_written_again_as_it_was(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    model = plan.apply_(ARCHITECTURES["bert"]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_pretrained(model, one)
    again = load_pretrained(one)
    assert Plan.of(again) == plan
    save_pretrained(again, other)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
