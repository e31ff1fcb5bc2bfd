"""A gentle restart after a point: the learning rate rises again, schedulers untouched."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch.optim import Optimizer

from lrcompress.errors import SettingError
from lrcompress.schedules import Warmup


class Restart:
    """Multiplies every learning rate by a schedule, for the duration of each optimizer step.

    The rates are put back right after the step, so schedulers, which may compute a rate from
    the last one, never see the factor.

    Args:
        schedule: steps since the point to factor.
        taken: steps taken since the point already, on resuming.
    """

    def __init__(self, schedule: Warmup, taken: int = 0) -> None:
        self.schedule, self.taken = schedule, taken
        # a stack: torch runs hooks twice, one within the other, where a step calls its parent's
        self._held: dict[int, list[list[Any]]] = {}

    def attach(self, optimizers: Sequence[Optimizer], stack: ExitStack) -> None:
        """Watch the optimizers until ``stack`` closes."""
        for optimizer in optimizers:
            stack.callback(optimizer.register_step_pre_hook(self._before).remove)
            stack.callback(optimizer.register_step_post_hook(self._after).remove)
        self._first = optimizers[0] if optimizers else None

    @property
    def factor(self) -> float:
        """What rates are multiplied by in the next step."""
        return self.schedule(self.taken)

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        held = self._held.setdefault(id(optimizer), [])
        factor = 1.0 if held else self.factor
        held.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        held = self._held[id(optimizer)]
        for group, lr in zip(optimizer.param_groups, held.pop(), strict=True):
            group["lr"] = lr
        self.taken += optimizer is self._first and not held


def check_restart(steps: float, scale: float) -> None:
    """Check how the learning rate is to rise after a point.

    Raises:
        SettingError: unless ``steps`` is at least 0 and ``scale`` above 0 and at most 10.
    """
    if not steps >= 0:
        raise SettingError(f"restart_steps must not be negative, got {steps!r}")
    if not 0 < scale <= 10:
        raise SettingError(f"restart_scale must be above 0 and at most 10, got {scale!r}")
