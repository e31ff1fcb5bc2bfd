"""A gentle restart after a point: the learning rate rises again, schedulers untouched."""

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

from torch.optim import Optimizer

from lrcompress.errors import SettingError
from lrcompress.schedules import Warmup


class Restart:
    """Multiplies every learning rate by a schedule, for the duration of each optimizer step.

    The rates are put back right after the step, so schedulers, which may compute a rate from
    the last one, never see the factor. Of several callbacks the scales multiply, and the lowest
    rise counts.

    Args:
        schedule: steps since the point to factor.
        taken: steps taken since the point already, on resuming.
    """

    def __init__(self, schedule: Warmup, taken: int = 0) -> None:
        self.schedule, self.taken = schedule, taken

    def attach(self, optimizers: Sequence[Optimizer], stack: ExitStack) -> None:
        """Watch the optimizers until ``stack`` closes."""
        for number, optimizer in enumerate(optimizers):
            rates = _RATES.get(optimizer) or _Rates(optimizer)
            rates.restarts[self] = number == 0  # whose steps are counted
            stack.callback(rates.leave, self)


class _Rates:
    """The rates of an optimizer for as long as anyone restarts it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.restarts: dict[Restart, bool] = {}
        # a stack: torch runs hooks twice, one within the other, where a step calls its parent's
        self._held: list[list[Any]] = []
        self._hooks = ExitStack()
        self._hooks.callback(optimizer.register_step_pre_hook(self._before).remove)
        self._hooks.callback(optimizer.register_step_post_hook(self._after).remove)
        _RATES[optimizer] = self
        self._hooks.callback(_RATES.pop, optimizer)

    def leave(self, restart: Restart) -> None:
        del self.restarts[restart]
        if not self.restarts:
            self._hooks.close()

    def _factor(self) -> float:
        scale = prod(restart.schedule.scale for restart in self.restarts)
        return scale * min(restart.schedule.rise(restart.taken) for restart in self.restarts)

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        factor = 1.0 if self._held else self._factor()
        self._held.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        for group, lr in zip(optimizer.param_groups, self._held.pop(), strict=True):
            group["lr"] = lr
        if not self._held:
            for restart, counts in self.restarts.items():
                restart.taken += counts


_RATES: dict[Optimizer, _Rates] = {}  # while restarts are attached


def check_restart(steps: float, scale: float) -> None:
    """Check how the learning rate is to rise after a point.

    Raises:
        SettingError: unless ``steps`` is at least 0 and ``scale`` above 0 and at most 10.
    """
    if not steps >= 0:
        raise SettingError(f"restart_steps must not be negative, got {steps!r}")
    if not 0 < scale <= 10:
        raise SettingError(f"restart_scale must be above 0 and at most 10, got {scale!r}")
