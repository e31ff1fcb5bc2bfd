"""A LightningModule and a loader that know nothing of lrcompress."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

STEPS = 6


class Tagger(L.LightningModule):
    """Two feed-forward blocks over padded sequences, with dropout, AdamW and a schedule."""

    def __init__(self, width: int = 16, lr: float = 0.01, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
            for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)
        self.lr = lr

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = x + self.dropout(block["down"](block["up"](x).relu()))
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((x * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch), batch["labels"]))

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.lr,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def sharding() -> Iterator[ModelParallelStrategy]:
    """FSDP2 in this process alone, of which nothing is left behind."""
    before = dict(os.environ)
    yield ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class Loader:
    """The same batches every epoch, and the position of the next one as state."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.served, self.start = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.served, self.start = self.start, 0
        while self.served < len(self.batches):
            self.served += 1
            yield self.batches[self.served - 1]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["served"]


def sentences(num: int = STEPS, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num):
        ids = torch.randint(0, 20, (size, 7), generator=generator)
        lengths = torch.randint(2, 8, (size, 1), generator=generator)
        mask = (torch.arange(7) < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3})
    return batches


@pytest.fixture
def tagger() -> Callable[..., Tagger]:
    def make(**kwargs: Any) -> Tagger:
        L.seed_everything(0, verbose=False)
        return Tagger(**kwargs)

    return make


@pytest.fixture
def batches() -> Callable[..., list[dict[str, Tensor]]]:
    return sentences


@pytest.fixture
def loader() -> Callable[..., Loader]:
    return lambda given=None: Loader(sentences() if given is None else given)
