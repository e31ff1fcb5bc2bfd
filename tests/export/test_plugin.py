"""The plug-in of transformers: what it reads, refuses, and adds to a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lrcompress.errors import CheckpointError
from lrcompress.export import CompressionConfig, CompressionQuantizer, save_pretrained
from lrcompress.export.plugin import NOTICE, check_read, check_version, markers, renamed, shape_
from lrcompress.nn import LowRankSparseLinear
from lrcompress.structure.plan import LayerPlan, Plan

from .conftest import give_structure_, made

PLAN = Plan((LayerPlan("a.b", "low_rank", {"in": 3, "out": 4, "rank": 2}),))


def test_the_entry_of_a_config_comes_back() -> None:
    entry = CompressionConfig(PLAN.to_dict()).to_dict()
    assert entry == {"quant_method": "lrcompress", "version": 1, "plan": PLAN.to_dict()}
    config, rest = CompressionConfig.from_dict(entry, return_unused_kwargs=True, x=1)
    assert Plan.from_dict(config.plan) == PLAN
    assert rest == {"x": 1}
    quantizer = CompressionQuantizer(config)
    assert quantizer.plan == PLAN
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "config.json is of version 2, this lrcompress reads 1; update it"),
        ({"version": "1"}, "config.json must have a version from 1 to 1, got '1'"),
        ({"version": 0}, "must have a version from 1 to 1, got 0"),
        ({"plan": None}, "config.json: expected a plan, got NoneType"),
        ({"plan": {"version": 2}}, "expected a plan of version 1, got version 2"),
        ({"more": 1}, "must have the keys plan, quant_method, version, got .*more"),
    ],
)
def test_an_entry_that_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    entry = CompressionConfig(PLAN.to_dict()).to_dict() | changes
    with pytest.raises(CheckpointError, match=message):
        CompressionConfig.from_dict(entry)


def test_the_checks_name_the_place() -> None:
    assert check_version(1, "here") == 1
    assert check_read(PLAN.to_dict(), "here") == PLAN
    with pytest.raises(CheckpointError, match="here must have a version"):
        check_version(True, "here")


def test_a_file_has_a_marker_for_every_layer_and_a_notice() -> None:
    found = markers(PLAN)
    assert set(found) == {NOTICE, "a.b.weight"}
    assert {tuple(x.shape) for x in found.values()} == {(1,)}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_plan_fits_other_classes_of_the_same_body(architecture: str) -> None:
    model = made(architecture)
    plan = Plan.of(model)
    body = type(model.base_model)(model.config)
    inner = renamed(plan, body)
    assert [f"{model.base_model_prefix}.{x.name}" for x in inner] == [x.name for x in plan]
    assert renamed(inner, model) == plan
    assert renamed(plan, model) == plan
    assert renamed(inner, body) == inner


def test_a_plan_gives_a_model_without_memory_its_structure() -> None:
    model = made("bert", "low_rank_sparse")
    with torch.device("meta"):
        empty = tf.BertForSequenceClassification(model.config)
        shape_(empty, Plan.of(model))
    assert Plan.of(empty) == Plan.of(model)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize("index", [[0, 0], [1, 0], [-1, 2], [3, 99]])
def test_an_index_that_does_not_rise_within_the_outputs_is_refused(
    index: list[int], tmp_path: Path
) -> None:
    model = tf.BertModel(made("bert").config)
    give_structure_(model, "low_rank_sparse")
    layer = model.encoder.layer[1].output.dense
    assert isinstance(layer, LowRankSparseLinear)
    layer.index[-2:] = torch.tensor(index)
    save_pretrained(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"layer\.1\.output\.dense: index must be int64 that rise"
    ):
        tf.BertModel.from_pretrained(tmp_path)


def test_from_pretrained_checks_the_plan_too(tmp_path: Path) -> None:
    save_pretrained(made("bert"), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"rank": 3', '"rank": 4', 1))
    with pytest.raises(CheckpointError, match=r"the plan needs a tensor .* the file has sizes"):
        tf.AutoModel.from_pretrained(tmp_path)
