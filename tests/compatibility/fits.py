"""Small fits whose checkpoints are kept in ``files/``, and what writes them.

``python -m tests.compatibility.fits`` wrote them with version 0.1.0, at the commit before the
package's modules got their present names. They are not to be written anew: they stand for the
files that users have.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lrcompress

FILES = Path(__file__).parent / "files"
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
# The callbacks of a fit of 12 steps, and the steps after which its checkpoints are kept.
FITS: dict[str, tuple[Callable[[], list[L.Callback]], tuple[int, ...]]] = {
    "factorize": (  # within the window, and after the point
        lambda: [lrcompress.Factorize(0.4, "step:6", align=1, window="step:5", **QUIET)],
        (4, 8),
    ),
    "kronecker": (
        lambda: [
            lrcompress.Factorize(
                0.4, "step:6", "kronecker", align=1, shapes={"*.up": [4, 4]}, **QUIET
            )
        ],
        (8,),
    ),
    "embedding": (
        lambda: [
            lrcompress.FactorizeEmbedding(0.5, at="step:6", targets=["embed"], **QUIET),
            lrcompress.Factorize(0.4, "step:6", align=1, **QUIET),
        ],
        (4, 8),
    ),
    "losparse": (  # while it is pruned
        lambda: [lrcompress.LoSparse(0.5, mask_every=1, **QUIET)],
        (6,),
    ),
    "dsee": (
        lambda: [lrcompress.DSEE(0.5, 2, 4, updates=["*.up"], prune_at="step:5", **QUIET)],
        (4, 8),
    ),
}


class Classifier(L.LightningModule):
    """Two feed-forward blocks over padded sequences, with AdamW, or with momentum alone.

    Momentum is carried over a point exactly, so that runs which meet one end as they always did.
    """

    def __init__(self, momentum: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((x * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.momentum:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), 0.02)


class Batches:
    """The same four batches every epoch, and the position of the next one as state."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches, self.served, self.start = [], 0, 0
        for _ in range(4):
            ids = torch.randint(0, 12, (8, 5), generator=generator)
            mask = torch.arange(5) < torch.randint(2, 6, (8, 1), generator=generator)
            labels = ids[:, 0] % 3
            self.batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.served, self.start = self.start, 0
        while self.served < len(self.batches):
            self.served += 1
            yield self.batches[self.served - 1]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["served"]


class Saving(L.Callback):
    """Saves a checkpoint after every step; unlike ``ModelCheckpoint`` it notes no path in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def fitted(name: str, folder: Path, checkpoint: Path | None = None) -> Classifier:
    """Run a fit from its start, or on from a checkpoint, and save it after every step."""
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*FITS[name][0](), Saving(folder)],
    )
    module = Classifier(momentum=name in ("factorize", "embedding"))
    trainer.fit(module, Batches(), ckpt_path=checkpoint and str(checkpoint))
    return module.eval()


@torch.no_grad()
def answers(module: Classifier) -> Tensor:
    """What a module says of all batches, ``(texts, 3)``."""
    return torch.cat([module(batch) for batch in Batches().batches])


def bert() -> BertForSequenceClassification:
    """A tiny random BERT."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def plan() -> lrcompress.Plan:
    """One layer of every kind."""
    square, first = {"in": 16, "out": 16}, {"first_out": 4, "first_in": 2, "terms": 3}
    layer = "bert.encoder.layer.{}.{}"
    kinds = {
        layer.format(0, "attention.self.query"): ("low_rank", square | {"rank": 3}),
        layer.format(0, "attention.self.key"): ("low_rank_sparse", square | {"rank": 2, "rows": 5}),
        layer.format(0, "attention.self.value"): ("kronecker", square | first),
        layer.format(1, "attention.self.query"): (
            "updated",
            square | {"rank": 2, "entries": 4, "heads": 2, "masked": 1},
        ),
        layer.format(1, "intermediate.dense"): (
            "narrow",
            {"in": 16, "out": 32, "rows": 20, "columns": 16},
        ),
        layer.format(1, "output.dense"): (
            "narrow",
            {"in": 32, "out": 16, "rows": 16, "columns": 20},
        ),
        "bert.embeddings.word_embeddings": (
            "low_rank_embedding",
            {"in": 16, "out": 24, "rank": 6},
        ),
    }
    layers = [{"name": name, "kind": kind, "sizes": sizes} for name, (kind, sizes) in kinds.items()]
    return lrcompress.Plan.from_dict({"version": 1, "layers": layers})


def tokens() -> Tensor:
    """Texts of a BERT, ``(4, 9)``."""
    return torch.randint(0, 24, (4, 9), generator=torch.Generator().manual_seed(1))


def write() -> None:
    """Write all files anew."""
    expected = {}
    FILES.mkdir(exist_ok=True)
    for name, (_, steps) in FITS.items():
        folder = FILES / "passing"
        expected[name] = answers(fitted(name, folder))
        for step in steps:
            shutil.copy(folder / f"step={step}.ckpt", FILES / f"{name}-{step}.ckpt")
        shutil.rmtree(folder)
    model = plan().apply_(bert())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        expected["folder"] = model(tokens()).logits
    lrcompress.save_pretrained(model, FILES / "folder")
    save_file(expected, FILES / "expected.safetensors")
    (FILES / "plan.json").write_text(json.dumps(lrcompress.Plan.of(model).to_dict(), indent=1))


if __name__ == "__main__":
    write()
