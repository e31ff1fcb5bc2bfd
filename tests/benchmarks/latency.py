"""latency= on a fine-tuned MiniLM: what was asked for, and what eager torch and ONNX take.

    python tests/benchmarks/latency.py TASK FOLDER [--seed 0] [--latency .5] [--shape 32 128]

The encoder of encoder.py is compressed to so much of its own time, from 1024 sentences of the
training data, on one thread. It is then measured again in turns with the dense one by
``lrcompress.bench``, in eager torch and as an ONNX graph. Accuracy is of the development set, with
no training afterwards.
"""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from encoder import loss_of, options_of, predicted, prepared
from torch import nn

from lrcompress import compress
from lrcompress.bench import OnnxModel, TorchModel, compare
from lrcompress.export import export_onnx

CHOICES: dict[str, dict[str, Any]] = {
    "balanced": {},
    "pivoted": {"storage": "pivoted"},
    "narrowed": {"narrow_blocks": True},
    "narrowed, low rank, pivoted": {"narrow_blocks": "low_rank", "storage": "pivoted"},
}


def ratios(model: nn.Module, dense: nn.Module, shape: tuple[int, int]) -> list[float]:
    """Return the time of a model / that of the dense one, in eager torch and as ONNX graphs."""
    batch = {"input_ids": torch.randint(999, 9999, shape)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    both = [TorchModel(name, one) for name, one in (("model", model), ("dense", dense))]
    runs = [compare(*both, batch, device="cpu", rounds=15)]
    with tempfile.TemporaryDirectory() as folder:
        graphs = []
        for one in both:
            place = Path(folder) / one.name
            export_onnx(one.model, place, {key: value[:2, :8] for key, value in batch.items()})
            graphs.append(OnnxModel(one.name, place / "model.onnx", threads=1))
        runs.append(compare(*graphs, batch, device="cpu", rounds=15))
    return [1 / run.faster for run in runs if run.faster]


def main() -> None:
    """Print a line for every choice."""
    parser = options_of(__doc__)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--shape", type=int, nargs=2, default=[32, 128])
    options = parser.parse_args()
    dense, held, labels, seen = prepared(options)

    def accuracy(model: nn.Module) -> float:
        return (predicted(model, held).argmax(-1) == labels).float().mean().item()

    print(f"dense: accuracy {accuracy(dense):.4f}", flush=True)
    for name, choice in CHOICES.items():
        model, start = copy.deepcopy(dense), time.process_time()
        record = compress(
            model, seen, loss_of, latency=options.latency, latency_shape=options.shape, **choice
        )
        taken = time.process_time() - start
        assert record.latency is not None
        eager, onnx = ratios(model, dense, tuple(options.shape))
        print(
            f"{name}: keep {record.keep:.3f}, {record.latency.measured:.3f} at the point in "
            f"{len(record.latency.trials)} trials, eager {eager:.3f}, ONNX {onnx:.3f}, accuracy "
            f"{accuracy(model):.4f}, {taken:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
