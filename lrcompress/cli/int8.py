"""Validation metrics of int8 weights in onnxruntime, beside those of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.table import Table
from torch import Tensor, nn

from lrcompress.errors import RecipeError
from lrcompress.export.onnx import run_onnx
from lrcompress.export.torch_export import Run, outputs_of
from lrcompress.tasks import TextClassification


def check_measured(module: LightningModule) -> None:
    """Check that the module has metrics to compare int8 by.

    Raises:
        RecipeError: if the module is of another kind.
    """
    if not isinstance(module, TextClassification):
        raise RecipeError(
            f"model: --int8 is measured on a TextClassification, found a {type(module).__name__}; "
            "leave it out, or call lrcompress.export.onnx.quantize_onnx on the folder"
        )


def int8_table(
    module: LightningModule, model: nn.Module, data: LightningDataModule, files: Sequence[Path]
) -> Table:
    """Return a table of the validation metrics of torch and of every ONNX file.

    Its columns are the metrics of a :class:`TextClassification`, the share of answers equal to
    torch's, the largest absolute difference of a logit, and the bytes of each file.

    Args:
        module: whose metrics are taken.
        model: the ``transformers`` model in it.
        data: of the recipe.
        files: ONNX files of that model.

    Raises:
        RecipeError: if the module is no :class:`TextClassification`, or there is no validation
            data.
    """
    check_measured(module)
    assert isinstance(module, TextClassification)
    data.prepare_data()
    data.setup("validate")
    batches: Any = data.val_dataloader()
    if not batches:
        raise RecipeError("data: expected validation data to measure int8 on, found none")
    runs: dict[str, Run] = {"torch": lambda inputs: outputs_of(model, inputs)}
    runs |= {file.name: run_onnx(file) for file in files}
    logits: dict[str, list[Tensor]] = {name: [] for name in runs}
    labels = []
    module.eval()
    with torch.no_grad():
        for batch in batches:
            labels.append(batch.pop("labels"))
            for name, run in runs.items():
                logits[name].append(run(batch)["logits"])
    return _table(module, {k: torch.cat(x) for k, x in logits.items()}, torch.cat(labels), files)


def _table(
    module: TextClassification, logits: dict[str, Tensor], labels: Tensor, files: Sequence[Path]
) -> Table:
    metrics, own = module.scores["val"], logits["torch"]
    assert isinstance(metrics, nn.ModuleDict)
    columns = ["", *metrics, "same answer", "difference", "bytes"]
    table = Table(*columns, title=f"validation data, {len(labels)} rows")
    sizes = {file.name: f"{file.stat().st_size:,}" for file in files}
    for name, found in logits.items():
        answers = module.answers(found)
        scores = [f"{_score(metric, answers, labels):.4f}" for metric in metrics.values()]
        same = float((answers == module.answers(own)).float().mean())
        difference = float((found - own).abs().max())
        table.add_row(name, *scores, f"{same:.4f}", f"{difference:.2g}", sizes.get(name, ""))
    return table


def _score(metric: Any, answers: Tensor, labels: Tensor) -> float:
    metric.reset()
    metric.update(answers, labels)
    return float(metric.compute())
