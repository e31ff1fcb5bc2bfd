"""Dry runs: start a fit and stop before its first step, or observe without training."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import trainer_state
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.sampling import Sampling
from lrcompress.engine.settings import Settings
from lrcompress.engine.solved_model import solve_model
from lrcompress.errors import ObservationError, SettingError
from lrcompress.report.keep_curves import MeasuredKeep
from lrcompress.statistics.moments import Statistics

# By name: of both Lightnings, and of the command line's own. What only shows or saves.
_ONLY_SHOW_OR_SAVE = {"Checkpoint", "ProgressBar", "ModelSummary", "SaveConfigCallback"}


Then = Callable[[pl.Trainer, pl.LightningModule, Observation], None]


class _DryRunEndError(Exception):
    """Raised to end a dry run."""


class _StopBeforeFirstStep(pl.Callback):
    """Ends a fit before its first step."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise _DryRunEndError


class _ObserveOnly(pl.Callback):
    """Observes training batches and lets no optimizer step change anything."""

    def __init__(
        self, settings: Settings, sampling: Sampling, num_batches: int, then: Then | None = None
    ) -> None:
        self.observation = Observation(sampling)
        self._settings, self._left, self._then = settings, num_batches, then

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        self.observation = Observation(self.observation.sampling.for_data(data))
        self.observation.watch(pl_module, self._settings)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._left:
            self._end(trainer, pl_module)
        self._left -= 1
        self.observation.open_step(batch)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module)  # of a fit with fewer batches

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.observation.check("of this pass")
        if self._then is not None:
            self._then(trainer, module, self.observation)
        raise _DryRunEndError

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self.observation.before_backward(loss, trainer_state.loss_factor(trainer))

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
    return looking.observation.statistics


def measure_curve(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: Settings,
    sampling: Sampling,
    num_batches: int,
    methods: Sequence[str],
    keeps: Sequence[float],
    **fit: Any,
) -> list[MeasuredKeep]:
    """Return what a validation gives at several ``keep`` without retraining.

    Layers are solved once a method, all from the same first training batches; each ``keep`` is
    installed for one validation and taken back. The model is as it was afterwards.

    Args:
        trainer: whose callbacks are left out.
        module: as for ``trainer.fit``.
        settings: what is done; their ``keep`` is left out.
        sampling: what to observe, for all the methods.
        num_batches: how many batches to observe; fewer if the fit is shorter.
        methods: that are measured, low-rank ones; each allocates ranks as it does by default, that
            of the settings as they request.
        keeps: shares of the targeted layers' parameters; what layers cannot meet is left out.
        **fit: as for ``trainer.fit``.

    Returns:
        The model as it was, and of each method every ``keep`` that can be met.

    Raises:
        ObservationError: if no batch had a finite loss, or there is nothing to validate.

    Cost:
        A method, that of solving all layers once, and a validation a ``keep``.
    """
    found: list[MeasuredKeep] = []

    def measured(method: str, keep: float, kept: float, predicted: float | None) -> None:
        started = time.perf_counter()
        figures = trainer_state.run_validation(trainer)
        if not figures:
            raise ObservationError(
                "there is nothing to measure by: expected a validation that logs a figure"
            )
        seconds = time.perf_counter() - started
        count = sum(p.numel() for p in module.parameters())
        found.append(MeasuredKeep(method, keep, kept, count, predicted, figures, seconds))

    def measure(_: pl.Trainer, module: pl.LightningModule, seen: Observation) -> None:
        trainer_state.drop_gradients(module)
        trainer_state.run_validation(trainer)  # which warms up what is timed
        for method in methods:
            own = settings.of_method(method)
            blocks = seen.blocks if own.narrow_blocks else None
            solved = solve_model(module, seen.statistics, own, blocks=blocks)
            if not found:
                measured(method, 1.0, solved.kept(solved.standing), 0.0)
            for keep in keeps:
                try:
                    sizes = solved.choose(keep)
                except SettingError:  # less than the layers' least ranks take
                    continue
                with solved.on_trial(sizes):
                    measured(method, keep, solved.kept(sizes), solved.predicted_loss(sizes))

    _fit_with(trainer, module, [_ObserveOnly(settings, sampling, num_batches, measure)], fit)
    return found


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
    telling = [one for one in callbacks if getattr(one, "verbose", None) is True]
    for one in telling:
        one.verbose = False  # type: ignore[attr-defined]
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer.num_sanity_val_steps = 0
    try:
        trainer.fit(module, **fit)
    except _DryRunEndError:
        pass
    finally:
        for one in telling:
            one.verbose = True  # type: ignore[attr-defined]
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = held  # type: ignore[attr-defined]
