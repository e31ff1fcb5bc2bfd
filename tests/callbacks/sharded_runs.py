"""Runs of one process among several: sharded by FSDP2, or under DDP, from the same script."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

import lrcompress
from lrcompress.distill import Distilled, HiddenStates, Logits

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Loader, Tagger, sentences

NUMBER, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Block(nn.ModuleDict):
    """A block that can be a unit of FSDP2, which asks for a forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self["down"](self["up"](x).relu())


class Model(nn.Module):
    def __init__(self, tagger: Tagger) -> None:
        super().__init__()
        self.embed, self.dropout, self.head = tagger.embed, tagger.dropout, tagger.head
        self.blocks = nn.ModuleList(Block(block) for block in tagger.blocks)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + self.dropout(block(x))
        mask = attention_mask.unsqueeze(-1)
        return self.head((x * mask).sum(1) / mask.sum(1))


class Sharded(Tagger):
    """The tagger in blocks: each a unit under FSDP2, and plain under any other strategy."""

    def __init__(self, checkpoint: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.model = Model(self)
        del self.embed, self.blocks, self.dropout, self.head

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch)

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self.model, FSDPModule):
            return
        if self.checkpoint is not None:
            lrcompress.restore_structure(self, self.checkpoint)
        for block in self.model.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def tagger(seed: int = 0, **kwargs: Any) -> Sharded:
    """Return a module, the same in all processes, whose dropout is not."""
    L.seed_everything(seed + 1000 * NUMBER, verbose=False)
    torch.manual_seed(seed)
    model = Sharded(**kwargs)
    torch.manual_seed(1000 * NUMBER)
    return model


def distilled(model: L.LightningModule, root: str) -> Distilled:
    return Distilled(model, losses=[Logits(), HiddenStates()], teacher_dir=root)


def loader() -> Loader:
    """Give this process its rows of batches that all processes share."""
    return Loader([{k: v[NUMBER::SIZE] for k, v in batch.items()} for batch in sentences()])


def fsdp(*, distributed: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=SIZE, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )


def trainer(
    *callbacks: L.Callback, root: str, save_to: str | None = None, every: int = 1, **kwargs: Any
) -> L.Trainer:
    """Return a trainer that saves a checkpoint ``step=N.ckpt`` every so many steps."""
    saving = []
    if save_to is not None:
        saving = [
            ModelCheckpoint(
                save_to,
                "{step}",
                every_n_train_steps=every,
                save_top_k=-1,
                save_on_train_epoch_end=False,
            )
        ]
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": SIZE,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": save_to is not None,
        "use_distributed_sampler": False,
        "default_root_dir": root,
        "strategy": "ddp",
    }
    return L.Trainer(callbacks=[*callbacks, *saving], **(defaults | kwargs))


def kept(trainer: L.Trainer, model: nn.Module) -> dict[str, Any]:
    """Return all that a run ends with, whole and by name, the same under every strategy."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, optimizer = get_state_dict(model, trainer.optimizers, options=options)
    return {
        "model": state,
        "optimizer": optimizer["state"] if optimizer else {},
        "plan": lrcompress.Plan.of(model).to_dict(),
    }
