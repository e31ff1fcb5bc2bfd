"""When things happen: points in training and ``step -> value`` schedules."""

import math
from dataclasses import dataclass

from lrcompress.errors import SettingError


@dataclass(frozen=True)
class Point:
    """A moment in training, as the user wrote it.

    Attributes:
        unit: ``"fraction"`` of all steps, ``"epoch"`` or ``"step"``.
        value: how many of them have passed at the moment meant.
    """

    unit: str
    value: float

    @classmethod
    def parse(cls, text: float | str) -> "Point":
        """Read ``0.4`` (fraction of all steps), ``"epoch:2"`` or ``"step:500"``.

        Raises:
            SettingError: if the text is none of these or its number is out of range.

        Example:
            >>> Point.parse("epoch:2")
            Point(unit='epoch', value=2)
        """
        expected = "a fraction of training between 0 and 1, 'epoch:N' or 'step:N'"
        if isinstance(text, int | float) and not isinstance(text, bool):
            if not 0 <= text < 1:
                raise SettingError(
                    f"a point is {expected}, got {text}"
                    + (f"; did you mean 'epoch:{text:g}'?" if text >= 1 else "")
                )
            return cls("fraction", float(text))
        unit, _, number = str(text).partition(":")
        if unit in ("epoch", "step") and number.isdecimal():
            return cls(unit, int(number))
        try:
            fraction = float(str(text))  # float(False) is a number
        except ValueError:
            number = "".join(c for c in str(text) if c.isdigit())
            hint = f"; did you mean 'epoch:{number}' or 'step:{number}'?" if number else ""
            raise SettingError(f"a point is {expected}, got {text!r}{hint}") from None
        return cls.parse(fraction)

    def __str__(self) -> str:
        return f"{self.value:g}" if self.unit == "fraction" else f"{self.unit}:{self.value:g}"

    def step(self, total_steps: float, steps_per_epoch: float) -> int:
        """Return how many optimizer steps come before this moment.

        Args:
            total_steps: of the whole run; ``inf`` where nobody knows.
            steps_per_epoch: ``inf`` where nobody knows.

        Raises:
            SettingError: if the moment lies at or beyond the end of training, or cannot be
                placed because the run's length is not known in advance.

        Example:
            >>> Point.parse(0.5).step(total_steps=30, steps_per_epoch=10)
            15
        """
        length = {"fraction": total_steps, "epoch": steps_per_epoch, "step": 1}[self.unit]
        if math.isinf(length):
            raise SettingError(
                f"point {self} cannot be placed: the run's length is not known in advance; "
                "set max_steps on the Trainer or write 'step:N'"
            )
        step = math.floor(self.value * length + 1e-9)
        if step >= total_steps:
            raise SettingError(
                f"point {self} is step {step}, at or beyond the end of training "
                f"({total_steps:g} steps): nothing would be trained after it"
            )
        return step


@dataclass(frozen=True)
class Warmup:
    """A rise from near 0 to ``scale`` over ``steps`` steps, then ``scale``.

    Example:
        >>> [Warmup(4, 1.0)(step) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """

    steps: int
    scale: float

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``, counted from 0."""
        return self.scale * min(1.0, (step + 1) / max(1, self.steps))
