"""Dry runs: start a fit and stop before its first step, or observe without training."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import trainer_state
from lrcompress.callbacks.observation import Observation, Sampling
from lrcompress.engine.settings import Settings
from lrcompress.statistics.moments import Statistics

# By name: of both Lightnings, and of the command line's own. What only shows or saves.
_ONLY_SHOW_OR_SAVE = {"Checkpoint", "ProgressBar", "ModelSummary", "SaveConfigCallback"}


class _DryRunEndError(Exception):
    """Raised to end a dry run."""


class _StopBeforeFirstStep(pl.Callback):
    """Ends a fit before its first step."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise _DryRunEndError


class _ObserveOnly(pl.Callback):
    """Observes training batches and lets no optimizer step change anything."""

    def __init__(self, settings: Settings, sampling: Sampling, num_batches: int) -> None:
        self.observation = Observation(sampling)
        self._settings, self._left = settings, num_batches

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observation.watch(pl_module, self._settings)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._left:
            raise _DryRunEndError
        self._left -= 1
        self.observation.open_step(batch)

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        finite = bool(loss.isfinite())
        self.observation.before_backward(loss, finite, trainer_state.loss_factor(trainer))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        optimizer.zero_grad(set_to_none=True)  # parameters without a gradient stay as they are

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.observation.close_step()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.observation.close_step()


def dry_run(trainer: pl.Trainer, module: pl.LightningModule, **fit: Any) -> None:
    """Start a fit and stop before its first step, so that all its checks are made.

    Nothing is trained, shown, logged or saved; data and optimizers are set up.

    Args:
        trainer: whose callbacks know afterwards at which steps their points are.
        module: as for ``trainer.fit``.
        **fit: as for ``trainer.fit``.
    """
    _fit_with(trainer, module, [*_callbacks_that_check(trainer), _StopBeforeFirstStep()], fit)


def observe_batches(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: Settings,
    sampling: Sampling,
    num_batches: int,
    **fit: Any,
) -> Statistics:
    """Return statistics of the first training batches; the model is not changed.

    Args:
        trainer: whose callbacks are left out.
        module: as for ``trainer.fit``.
        settings: which layers.
        sampling: what to observe of them.
        num_batches: how many; fewer if the fit is shorter.
        **fit: as for ``trainer.fit``.

    Raises:
        ObservationError: if no batch had a finite loss.
    """
    looking = _ObserveOnly(settings, sampling, num_batches)
    _fit_with(trainer, module, [looking], fit)
    looking.observation.check("of this pass")
    return looking.observation.statistics


def _callbacks_that_check(trainer: pl.Trainer) -> list[pl.Callback]:
    held: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        one
        for one in held
        if not _ONLY_SHOW_OR_SAVE & {kind.__name__ for kind in type(one).__mro__}
    ]


def _fit_with(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    fit: Mapping[str, Any],
) -> None:
    held = trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps  # type: ignore[attr-defined]
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer.num_sanity_val_steps = 0
    try:
        trainer.fit(module, **fit)
    except _DryRunEndError:
        pass
    finally:
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = held  # type: ignore[attr-defined]
