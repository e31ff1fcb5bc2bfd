"""A LightningModule around a tiny attention model, neither of which knows lrcompress."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS = 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in self.children())
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :].bool(), -1e4)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        x = x + self.dropout(self.attention(x, mask))
        return (x + self.dropout(self.down(self.up(x).relu())),)


class Encoder(nn.Module):
    """Called with a batch's tensors, as a transformers model is."""

    def __init__(
        self, width: int, depth: int, labels: int, words: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=heads)
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            (x,) = layer(x, attention_mask)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        logits = self.head((x * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Reader(L.LightningModule):
    def __init__(
        self,
        width: int = 8,
        depth: int = 2,
        labels: int = 3,
        words: int = 20,
        heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Encoder(width, depth, labels, words, heads, dropout)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.01,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StartAt(L.Callback):
    """Does what a callback that compresses does first."""

    def __init__(self, step: int = 2) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            pl_module.on_compression_start()


def sentences(num: int = STEPS, size: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num):
        ids = torch.randint(0, 20, (size, 6), generator=generator)
        lengths = torch.randint(2, 7, (size, 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3})
    return batches


@pytest.fixture
def reader() -> Callable[..., Reader]:
    def make(seed: int = 0, **kwargs: Any) -> Reader:
        L.seed_everything(seed, verbose=False)
        return Reader(**kwargs)

    return make


@pytest.fixture
def start_at() -> type[StartAt]:
    return StartAt


@pytest.fixture
def batches() -> Callable[..., list[dict[str, Tensor]]]:
    return sentences


@pytest.fixture
def loader() -> Callable[..., Any]:
    return lambda given=None: DataLoader(sentences() if given is None else given, batch_size=None)


@pytest.fixture
def trainer(trainer: Callable[..., L.Trainer]) -> Callable[..., L.Trainer]:
    return partial(trainer, max_epochs=2)
