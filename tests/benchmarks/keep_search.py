"""keep="auto" on SST-2 with a small BERT of its own: what is chosen, what it costs, what is left.

    python tests/benchmarks/keep_search.py DATA [MONITOR DROP [SEED ...]]

DATA is the folder of SST-2 as ``train.tsv``, ``dev.tsv`` and ``test.tsv``. A BERT of 2 layers of
width 64 is trained from nothing on the training sentences; keep is chosen on ``dev.tsv``, and
``test.tsv``, which nothing was chosen on, is the test.
"""

import csv
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import lrcompress

EPOCHS, LENGTH, WORDS = 3, 24, 6_000
Rows = list[tuple[int, list[str]]]


def rows(path: Path) -> Rows:
    with path.open(encoding="utf-8") as file:
        read = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(int(label), text.split()) for label, text in read]


def loader(given: Rows, words: dict[str, int], *, shuffle: bool = False) -> DataLoader[Any]:
    def encoded(label: int, text: list[str]) -> dict[str, Tensor]:
        ids = [1, *(words.get(word, 2) for word in text)][:LENGTH]
        padding = LENGTH - len(ids)
        return {
            "input_ids": torch.tensor(ids + [0] * padding),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
            "labels": torch.tensor(label),
        }

    return DataLoader([encoded(*row) for row in given], batch_size=64, shuffle=shuffle)  # type: ignore[arg-type]


class Classifier(L.LightningModule):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=LENGTH,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.bert(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        found = self.bert(**batch)
        right = (found.logits.argmax(-1) == batch["labels"]).float().mean()
        self.log("val_loss", found.loss, batch_size=len(batch["labels"]))
        self.log("val_accuracy", right, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        right = (self.bert(**batch).logits.argmax(-1) == batch["labels"]).float().mean()
        self.log("test_accuracy", right, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-4, weight_decay=0.01)


class Validated(L.Callback):
    """How many passes over the validation data there were, and the seconds they took."""

    def __init__(self) -> None:
        self.passes, self.seconds, self.started = 0, 0.0, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.passes, self.seconds = (
            self.passes + 1,
            self.seconds + time.perf_counter() - self.started,
        )


def contestants(monitor: str, drop: str) -> dict[str, dict[str, Any] | None]:
    auto = {"keep": "auto", "drop": drop, "monitor": monitor}
    return {
        "dense": None,
        "one point": auto | {"at": 0.6},
        "two points": auto | {"at": [0.5, 0.75]},
        "keep 0.2": {"keep": 0.2, "at": 0.6},
        "keep 0.05": {"keep": 0.05, "at": 0.6},
    }


def run(data: Path, name: str, options: dict[str, Any] | None, seed: int) -> str:
    L.seed_everything(seed, verbose=False)
    train = rows(data / "train.tsv")
    counts = Counter(word for _, text in train for word in text).most_common(WORDS)
    words = {word: i + 3 for i, (word, _) in enumerate(counts)}
    model, watch = Classifier(len(words) + 3), Validated()
    quiet: dict[str, Any] = {"verbose": False, "report_path": None, "align": 1}
    callback = None if options is None else lrcompress.Factorize(**options, **quiet)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch, *([callback] if callback else [])],
    )
    started = time.perf_counter()
    dev = loader(rows(data / "dev.tsv"), words)
    trainer.fit(model, loader(train, words, shuffle=True), dev)
    seconds = time.perf_counter() - started
    (last,) = trainer.validate(model, dev, verbose=False)
    (test,) = trainer.test(model, loader(rows(data / "test.tsv"), words), verbose=False)
    cells = [f"{name}, seed {seed}", f"{last['val_loss']:.4f}", f"{last['val_accuracy']:.4f}"]
    cells += [f"{test['test_accuracy']:.4f}"]
    points = callback.report.points if callback else []
    cells += [" → ".join(f"{point.keep:.3f}" for point in points)]
    cells += [
        f"{seconds:.0f} s, {watch.passes} validations of {watch.seconds / watch.passes:.2f} s"
    ]
    for point in points:
        if point.search is not None:
            found = point.search
            cells.append(
                f"step {point.step}: {len(found.trials)} trials, {found.before:.4f} before, "
                f"allowed {found.allowed:.4f}"
                + (", went back" if "went back" in point.note else "")
            )
    return " | ".join(cells)


def main(data: str, monitor: str = "val_accuracy", drop: str = "0.01", *seeds: str) -> None:
    for seed in seeds or ("0",):
        for name, options in contestants(monitor, drop).items():
            print(run(Path(data), name, options, int(seed)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
