"""Base LightningModule of all tasks: optimizer, learning-rate schedule and reloading."""

from abc import abstractmethod
from collections.abc import Mapping
from inspect import isabstract
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import get_scheduler

from lrcompress.errors import SettingError, nearest
from lrcompress.structure.plan import restore_structure
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.split_data import SplitData

Schedule = Literal["linear", "constant", "cosine"]


class FineTuning(L.LightningModule):
    """Base class: trains the ``transformers`` model in ``self.model`` by its own loss, with AdamW.

    Args:
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; biases, norms and other vectors have none.
        fused: let AdamW update in one kernel: a tenth of the step's time on a CPU. Lightning
            refuses to clip gradients for it under mixed precision.
        warmup: share of all steps over which the learning rate rises to ``lr``, 0 to 1.
        schedule: what follows the warm-up: ``linear`` or ``cosine`` decay to zero, or
            ``constant``.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if the data is of
            another kind or does not fit the model; from ``configure_optimizers``, if the trainer
            has no end.
    """

    model: nn.Module
    reads: ClassVar[type[SplitData]]
    """The data whose batches a subclass takes, among those of this package."""
    figures: ClassVar[Mapping[str, str]] = {}
    """Names to log at an epoch's end, and what ``self.scores`` of the stage calls them."""

    def __init__(
        self, lr: float, weight_decay: float, fused: bool, warmup: float, schedule: Schedule
    ) -> None:
        super().__init__()
        if not 0 <= warmup <= 1:
            raise SettingError(f"warmup is a share of all steps, from 0 to 1, got {warmup}")
        if schedule not in get_args(Schedule):
            near = nearest(schedule, get_args(Schedule))
            raise SettingError(f"unknown schedule {schedule!r}; nearest: {near}")
        self.lr = lr
        self.weight_decay = weight_decay
        self.fused = fused
        self.warmup = warmup
        self.schedule = schedule

    def forward(self, batch: Batch) -> Any:
        return self.model(**batch)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:  # noqa: ARG002
        loss: Tensor = self(batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate(batch, "test")

    def setup(self, stage: str) -> None:  # noqa: ARG002
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, self.reads):
            self._check(data)
        elif isinstance(data, SplitData):
            kinds = (self.reads, *self.reads.__subclasses__())
            names = " or ".join(kind.__name__ for kind in kinds if not isabstract(kind))
            raise SettingError(
                f"{type(self).__name__} reads the batches of {names}, got the data "
                f"{type(data).__name__}"
            )

    @abstractmethod
    def _check(self, data: Any) -> None:
        """Check that the model can read data of its kind.

        Raises:
            SettingError: if it cannot.
        """

    @abstractmethod
    def _evaluate(self, batch: Batch, stage: str) -> None:
        """Log the loss and the metrics of a batch; ``stage`` is ``val`` or ``test``."""

    def _check_positions(self, data: object, *names: str) -> None:
        """Check that no text of the data is longer than the model has positions.

        Raises:
            SettingError: if the entry of one of these names is.
        """
        most = getattr(self.model.config, "max_position_embeddings", None)
        for name in names:
            if most is not None and getattr(data, name) > most:
                raise SettingError(
                    f"the data has {name}={getattr(data, name)}, the model has {most} positions; "
                    f"set {name} to at most {most}"
                )

    def on_validation_epoch_end(self) -> None:
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        """Log a metric of several values over the epoch, and reset it."""
        if not self.figures:
            return
        metric: Metric = self.scores[stage]  # type: ignore[index, assignment]
        if metric.update_called:
            found = metric.compute()
            figures = {f"{stage}_{name}": found[key] for name, key in self.figures.items()}
            self.log_dict({k: v.to(self.device) for k, v in figures.items()}, prog_bar=True)
            with torch.inference_mode(False):  # a metric's sums are for later epochs too
                metric.reset()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_structure(self, checkpoint)  # for load_from_checkpoint, which knows no callback

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = decay_groups(self.model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=self.fused)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise SettingError(
                f"schedule {self.schedule!r} needs to know when training ends, got a trainer "
                "without max_epochs and max_steps; set one of them"
            )
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        warmup = round(self.warmup * steps)
        scheduler = get_scheduler(name, optimizer, warmup, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices, which decay, and vectors, which do not.

    Biases and norms are vectors in every architecture. The rule looks at shapes rather than
    names, so that the factors of a layer replaced later belong where its weight did.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
