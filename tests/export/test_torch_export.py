"""A graph of torch.export computes what the model does, whatever the batch and the length."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lrcompress.errors import ExportError, SettingError
from lrcompress.export import export_program
from lrcompress.export.torch_export import compare, outputs_of, traced
from lrcompress.nn import LowRankLinear, LowRankSparseLinear
from lrcompress.structure.plan import LayerPlan, Plan

from .conftest import TEXT, inputs, made


def example(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    return {name: x for name, x in inputs(model).items() if name != "labels"}


def other(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bert(forward: Callable[..., Any]) -> tf.PreTrainedModel:
    """A BERT whose forward is another."""
    kind = type("Strange", (tf.BertForSequenceClassification,), {"forward": forward})
    model: tf.PreTrainedModel = kind(tf.BertConfig(**TEXT))
    return model


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("bert", "low_rank_sparse"),
        ("vit", "low_rank"),
        ("gpt2", "kronecker"),
        ("bert", "pivoted"),
        ("llama", "narrow"),
        ("llama", "narrow_pivoted"),
    ],
)
def test_a_program_gives_what_the_model_gives(architecture: str, kind: str, tmp_path: Path) -> None:
    model = made(architecture, kind).train()
    assert export_program(model, tmp_path / "new", example(model)) < 1e-6
    assert all(module.training for module in model.modules())
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == ["config.json", "model.pt2"]
    program = torch.export.load(tmp_path / "new" / "model.pt2").module()
    model.eval()
    for size in (1, 3, 13):
        pixels = {"pixel_values": torch.randn(size, 3, 8, 8)}
        x = pixels if architecture == "vit" else other(size, 14 - size)
        torch.testing.assert_close(program(x)["logits"], model(**x).logits)


def test_a_compiled_model_gives_and_learns_what_the_model_does() -> None:
    model = made("bert", "low_rank_sparse")
    sizes = {"in": 16, "out": 24, "rank": 3}
    Plan((LayerPlan("bert.encoder.layer.1.intermediate.dense", "low_rank", sizes),)).apply_(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = inputs(model)
    own, theirs = model(**x), compiled(**x)
    torch.testing.assert_close(theirs.logits, own.logits)
    expected, found = (
        torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        for output in (own, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes g++")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
def test_layers_are_compiled_to_kernels_that_give_the_same() -> None:
    layers = LowRankLinear(16, 24, 3), nn.GELU(), LowRankSparseLinear(24, 16, 3, num_rows=5)
    layers[2].prune_(torch.arange(8) % 3 != 1)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="inductor", dynamic=True)
        for tokens in (7, 300):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(compiled(x), model(x))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = made("bert")
    x = example(model)
    with pytest.raises(SettingError, match="expected a transformers model, got a Linear"):
        export_program(nn.Linear(2, 2), tmp_path, x)
    for strange, message in [
        ({}, "expected tensors of one batch, got none"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"one batch, got \{'a': \(2,\), 'b': \(3,\)"),
        ({"input_ids": x["input_ids"][:1]}, r"expected input_ids to be .* at least; got \(1, 7\)"),
        ({"input_ids": x["input_ids"][:, :3]}, r"four of a length if .*; got \(2, 3\)"),
        ({"input_ids": [[1, 2, 3, 4]] * 2}, "got list"),
    ]:
        with pytest.raises(SettingError, match=message):
            export_program(model, tmp_path, strange)
    with pytest.raises(SettingError, match=r"in float32 on the CPU, got torch.bfloat16 on cpu"):
        export_program(model.to(torch.bfloat16), tmp_path, x)
    assert not list(tmp_path.iterdir())


def test_a_model_that_asks_for_values_cannot_be_traced(tmp_path: Path) -> None:
    def forward(self: Any, input_ids: Tensor, return_dict: bool) -> dict[str, Tensor]:
        return {"logits": input_ids + 1 if input_ids.sum() > 3 else input_ids}

    model = bert(forward)
    with pytest.raises(ExportError, match=r"torch\.export cannot trace Strange for any batch and"):
        export_program(model, tmp_path / "new", {"input_ids": torch.ones(2, 5).long()})
    assert model.training
    assert not (tmp_path / "new").exists()


def test_a_graph_that_is_not_the_model_is_told() -> None:
    model = made("bert").eval()
    x = example(model)
    with traced(model, x) as (_, program):
        graph = program.module()

    def off(given: Any) -> dict[str, Tensor]:
        return {"logits": outputs_of(model, given)["logits"] + 1e-3}

    def broken(given: Any) -> dict[str, Tensor]:
        return {"logits": torch.full((len(given["input_ids"]), 3), torch.nan)}

    def fixed(given: Any) -> dict[str, Tensor]:
        return outputs_of(model, x)

    with torch.no_grad():
        assert compare(graph, model, x) < 1e-6
        with pytest.raises(ExportError, match=r"logits of the graph are 0.001 off for inputs of"):
            compare(off, model, x)
        with pytest.raises(ExportError, match="logits of the graph are nan off"):
            compare(broken, model, x)
        with pytest.raises(
            ExportError, match=r"gives \{'logits': \(2, 3\)\}, the model .*\(1, 3\)"
        ):
            compare(fixed, model, x)
        with pytest.raises(ExportError, match=r"the graph fails for inputs of sizes .*flatten"):
            compare(lambda given: graph({"input_ids": given["input_ids"]}), model, x)
