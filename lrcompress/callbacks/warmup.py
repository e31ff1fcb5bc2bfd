"""Learning-rate warmup after a point, without a change of the schedulers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from math import prod
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lrcompress.callbacks.trainer_state import class_names
from lrcompress.errors import SettingError
from lrcompress.schedules import Warmup


class LearningRateWarmup:
    """Multiplies every learning rate by a schedule, for the duration of each optimizer step.

    The rates are restored right after the step, so schedulers, which may compute a rate from
    the last one, never see the factor; :func:`show_true_rates` shows it to those who log. Of
    several callbacks the scales multiply, and the lowest rise counts.

    Args:
        schedule: maps steps since the point to a factor.
        taken: steps taken since the point already, on resuming.
    """

    def __init__(self, schedule: Warmup, taken: int = 0) -> None:
        self.schedule, self.taken = schedule, taken

    def attach(self, optimizers: Sequence[Optimizer], stack: ExitStack) -> None:
        """Scale the rates of the optimizers until ``stack`` closes."""
        for number, optimizer in enumerate(optimizers):
            rates = _RATES.get(optimizer) or _OptimizerRates(optimizer)
            rates.warmups[self] = number == 0  # whose steps are counted
            stack.callback(rates.remove, self)


class Restart:
    """The warmup after the points of a fit; each point begins it anew."""

    def __init__(self) -> None:
        self._warmup: LearningRateWarmup | None = None

    def begin(
        self, schedule: Warmup, optimizers: Sequence[Optimizer], stack: ExitStack, taken: int = 0
    ) -> None:
        """Scale rates from here on, until ``stack`` closes.

        Args:
            schedule: maps steps since the point to a factor.
            optimizers: whose rates they are.
            stack: of the fit.
            taken: steps taken since the point already.
        """
        if self._warmup is None:
            self._warmup = LearningRateWarmup(schedule, taken)
            self._warmup.attach(optimizers, stack)
        self._warmup.schedule, self._warmup.taken = schedule, taken

    def state_dict(self) -> dict[str, Any] | None:
        """Return what :meth:`resume` needs; None where nothing was begun."""
        if self._warmup is None:
            return None
        return {"schedule": vars(self._warmup.schedule).copy(), "taken": self._warmup.taken}

    def resume(
        self, state: Mapping[str, Any] | None, optimizers: Sequence[Optimizer], stack: ExitStack
    ) -> None:
        """Go on where :meth:`state_dict` was taken."""
        if state is not None:
            self.begin(Warmup(**state["schedule"]), optimizers, stack, state["taken"])


class _OptimizerRates:
    """The learning rates of an optimizer while a warmup is attached."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self.warmups = optimizer, dict[LearningRateWarmup, bool]()
        # a stack: torch runs hooks twice, one within the other, where a step calls its parent's
        self._held: list[list[Any]] = []
        self._hooks = ExitStack()
        self._hooks.callback(optimizer.register_step_pre_hook(self._before).remove)
        self._hooks.callback(optimizer.register_step_post_hook(self._after).remove)
        _RATES[optimizer] = self
        self._hooks.callback(_RATES.pop, optimizer)

    def remove(self, warmup: LearningRateWarmup) -> None:
        del self.warmups[warmup]
        if not self.warmups:
            self._hooks.close()

    def _factor(self) -> float:
        scale = prod(warmup.schedule.scale for warmup in self.warmups)
        return scale * min(warmup.schedule.rise(warmup.taken) for warmup in self.warmups)

    @contextmanager
    def as_stepped(self) -> Iterator[None]:
        """Have the rates inside the block that the next step will be made with."""
        self._before(self._optimizer)
        try:
            yield
        finally:
            self._restore()

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        factor = 1.0 if self._held else self._factor()
        self._held.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _restore(self) -> None:
        for group, lr in zip(self._optimizer.param_groups, self._held.pop(), strict=True):
            group["lr"] = lr

    def _after(self, *_: object) -> None:
        self._restore()
        if not self._held:
            for warmup, counts in self.warmups.items():
                warmup.taken += counts


_RATES: dict[Optimizer, _OptimizerRates] = {}  # while warmups are attached


def show_true_rates(trainer: pl.Trainer, stack: ExitStack) -> None:
    """Let ``LearningRateMonitor`` log the rates that steps are made with, until ``stack`` closes.

    It reads them as a batch or an epoch begins; the factor is there while it does.
    """
    for monitor in trainer.callbacks:  # type: ignore[attr-defined]
        if "LearningRateMonitor" not in class_names(type(monitor)):
            continue
        for name in {"on_train_batch_start", "on_train_epoch_start"} - vars(monitor).keys():
            setattr(monitor, name, _as_stepped(getattr(monitor, name)))
            stack.callback(partial(delattr, monitor, name))


def _as_stepped(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def with_true_rates(trainer: pl.Trainer, *args: Any) -> None:
        with ExitStack() as stack:
            for optimizer in trainer.optimizers:
                if optimizer in _RATES:
                    stack.enter_context(_RATES[optimizer].as_stepped())
            hook(trainer, *args)

    return with_true_rates


def check_warmup(steps: float, scale: float) -> None:
    """Check the settings of a warmup.

    Raises:
        SettingError: unless ``steps`` is at least 0 and ``scale`` above 0 and at most 10.
    """
    if not steps >= 0:
        raise SettingError(f"restart_steps must not be negative, got {steps!r}")
    if not 0 < scale <= 10:
        raise SettingError(f"restart_scale must be above 0 and at most 10, got {scale!r}")
