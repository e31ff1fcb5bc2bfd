"""Schedules: points in training, and ``step -> value`` functions such as warmup and cubic."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lrcompress.errors import SettingError

# Optimizer steps of every epoch, or of each where they differ; the last also of those after it.
StepsPerEpoch = float | tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """A moment in training: a fraction of all steps, an epoch or a step.

    Attributes:
        unit: ``"fraction"`` of all steps, ``"epoch"`` or ``"step"``.
        value: the fraction, or how many epochs or steps have passed.
    """

    unit: str
    value: float

    @classmethod
    def parse(cls, text: float | str, name: str = "a point") -> "Point":
        """Read ``0.4`` (fraction of all steps), ``"epoch:2"`` or ``"step:500"``.

        Args:
            text: what was given.
            name: of the argument, for the error message.

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
                    f"{name} is {expected}, got {text}"
                    + (f"; did you mean 'epoch:{text:g}'?" if text >= 1 and text % 1 == 0 else "")
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
            raise SettingError(f"{name} is {expected}, got {text!r}{hint}") from None
        return cls.parse(fraction, name)

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")
        return number if self.unit == "fraction" else f"{self.unit}:{number}"

    def step(self, total_steps: float, steps_per_epoch: StepsPerEpoch) -> int:
        """Return how many optimizer steps come before this moment.

        Args:
            total_steps: of the whole run; ``inf`` if unknown.
            steps_per_epoch: ``inf`` if unknown; a tuple where epochs differ.

        Raises:
            SettingError: if the moment is at or beyond the end of training, or cannot be
                placed because the run's length is not known in advance.

        Example:
            >>> Point.parse(0.5).step(total_steps=30, steps_per_epoch=10)
            15
        """
        step = self.place(total_steps, steps_per_epoch)
        if step >= total_steps:
            raise SettingError(
                f"point {self} is step {step}, at or beyond the end of training "
                f"({total_steps:g} steps): nothing would be trained after it"
            )
        return step

    def place(self, total_steps: float, steps_per_epoch: StepsPerEpoch) -> int:
        """Return the same as :meth:`step`, also at the end of training or beyond it.

        Args:
            total_steps: of the whole run; ``inf`` if unknown.
            steps_per_epoch: ``inf`` if unknown; a tuple where epochs differ.

        Raises:
            SettingError: if the run's length is needed and not known in advance.
        """
        if self.value == 0:  # the start, of a run of any length
            return 0
        if self.unit == "epoch":
            place = _steps_before(self.value, steps_per_epoch)
        else:
            place = self.value * (total_steps if self.unit == "fraction" else 1)
        if math.isinf(place):
            raise SettingError(
                f"point {self} cannot be placed: the run's length is not known in advance; "
                "set max_steps on the Trainer or write 'step:N'"
            )
        return math.floor(place + 1e-9)


def _steps_before(epoch: float, steps_per_epoch: StepsPerEpoch) -> float:
    each = steps_per_epoch if isinstance(steps_per_epoch, tuple) else (steps_per_epoch,)
    known = each[: int(epoch)]
    more = epoch - len(known)  # 0 of unknown length are none
    return sum(known) + (more * each[min(int(epoch), len(each) - 1)] if more else 0)


def window_steps(window: Point, total_steps: float, steps_per_epoch: StepsPerEpoch) -> int:
    """Return how many steps a window is long; of epochs of unknown length, as many as there are.

    Args:
        window: its length.
        total_steps: of the run; infinite where unknown.
        steps_per_epoch: as for :meth:`Point.step`.

    Raises:
        SettingError: if the run's length is needed and not known.

    Example:
        >>> window_steps(Point("fraction", 0.25), 100, 10), window_steps(Point("step", 7), 100, 10)
        (25, 7)
    """
    if window.unit == "epoch" and steps_per_epoch == math.inf:
        return sys.maxsize
    total = total_steps if window.unit == "fraction" else math.inf
    return max(1, window.step(total, steps_per_epoch))


def squeeze(steps: Sequence[int], gaps: Sequence[int], total: int, first: int = 0) -> list[int]:
    """Return steps moved as little as it takes to lie within a short run, in the same order.

    A step is left after the last one where there are enough, else it is the run's end. Where even
    so there are too few, the last ones lie beyond the end.

    Args:
        steps: of the moments.
        gaps: between each and the next, the least.
        total: steps of the run.
        first: the least step.

    Example:
        >>> squeeze([500, 900], [1], total=4), squeeze([500, 900], [1], total=1)
        ([2, 3], [0, 1])
    """
    moved = list(steps)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], total - 1 - sum(gaps[i:]))
    for i in range(len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gaps[i - 1] if i else first)
    return moved


@dataclass(frozen=True)
class Piecewise:
    """A piecewise linear schedule: linear between points, constant before and after them.

    Attributes:
        points: moments with the value just before and the value from there on, which differ
            where the value jumps.
    """

    points: tuple[tuple[Point, float, float], ...]

    @classmethod
    def parse(cls, value: object, name: str = "value") -> "Piecewise":
        """Read a number, or a mapping from points to numbers such as ``{0: 0.0, 0.5: 1.0}``.

        A pair in place of a number is a jump: ``{"epoch:3": [1.0, 0.0]}`` is 1 before the
        fourth epoch and 0 from there on. ``1.0`` as a point is the end of training.

        Args:
            value: of which every number must be finite and not negative.
            name: what messages call the value.

        Raises:
            SettingError: if it is none of these.

        Example:
            >>> [Piecewise.parse({0: 0.0, 0.5: 1.0}).at(step, 20, 5) for step in (0, 5, 10, 15)]
            [0.0, 0.5, 1.0, 1.0]
        """
        if isinstance(value, Mapping):
            if not value:
                raise SettingError(f"{name} is a mapping without a point, such as {{0.5: 1.0}}")
            return cls(tuple((_moment(at), *_sides(one, name)) for at, one in value.items()))
        return cls(((Point("fraction", 0.0), *_sides(value, name)),))

    def counts(self, total_steps: float, steps_per_epoch: StepsPerEpoch) -> bool:
        """Return whether the value is above 0 at any step of a run of that length.

        Raises:
            SettingError: if points do not rise, or cannot be placed in this run.
        """
        if self.constant is not None:
            return self.constant > 0
        placed = [point.place(total_steps, steps_per_epoch) for point, _, _ in self.points]
        last = max(placed) if math.isinf(total_steps) else int(total_steps) - 1
        # between points a line is 0 throughout if it is just before the later one
        turns = {last, *(min(max(place - 1, 0), last) for place in placed)}
        return any(self.at(step, total_steps, steps_per_epoch) > 0 for step in turns)

    @property
    def constant(self) -> float | None:
        """The value if it never changes, else None."""
        values = {value for _, *sides in self.points for value in sides}
        return values.pop() if len(values) == 1 else None

    def at(self, step: int, total_steps: float, steps_per_epoch: StepsPerEpoch) -> float:
        """Return the value at ``step``.

        Args:
            step: counted from 0.
            total_steps: of the whole run; ``inf`` if unknown.
            steps_per_epoch: ``inf`` if unknown; a tuple where epochs differ.

        Raises:
            SettingError: if points do not rise, or cannot be placed in this run.
        """
        if self.constant is not None:
            return self.constant
        placed = [point.place(total_steps, steps_per_epoch) for point, _, _ in self.points]
        if sorted(set(placed)) != placed:
            names = ", ".join(str(point) for point, _, _ in self.points)
            raise SettingError(f"points of a schedule must rise, got {names}: steps {placed}")
        later = next((i for i, place in enumerate(placed) if place > step), len(placed))
        if later == 0:
            return self.points[0][1]
        if later == len(placed):
            return self.points[-1][2]
        start, end = placed[later - 1 : later + 1]
        first, last = self.points[later - 1][2], self.points[later][1]
        return first + (last - first) * (step - start) / (end - start)


def _moment(text: object) -> Point:
    """Return the point; unlike that of a change of structure it may be the end of training."""
    if text in (1, 1.0, "1", "1.0") and not isinstance(text, bool):
        return Point("fraction", 1.0)
    return Point.parse(text)  # type: ignore[arg-type]


def _sides(value: Any, name: str) -> tuple[float, float]:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    for side in sides:
        number = isinstance(side, int | float) and not isinstance(side, bool)
        if not number or not 0 <= side < math.inf:
            raise SettingError(
                f"{name} must be a number that is not negative, a mapping from points to such "
                f"numbers, or there a pair of them for a jump; got {value!r}"
            )
    return float(sides[0]), float(sides[1])


@dataclass(frozen=True)
class Warmup:
    """Linear warmup from near 0 to ``scale``: ``scale · min(1, (step + 1) / steps)``.

    Attributes:
        steps: how long it takes; 0 is as 1.
        scale: the factor after it.

    Example:
        >>> [Warmup(4, 1.0)(step) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """

    steps: int
    scale: float

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``, counted from 0."""
        return self.scale * self.rise(step)

    def rise(self, step: int) -> float:
        """Return the factor's share of ``scale`` at ``step``."""
        return min(1.0, (step + 1) / max(1, self.steps))


@dataclass(frozen=True)
class Cubic:
    """Cubic pruning schedule of the kept share: 1 until ``start``, ``final`` from ``stop`` on.

    Between them ``final + (1 − final)·(1 − (step − start)/(stop − start))³``: fast while
    much is left to choose from, slow towards the end.

    Attributes:
        start: step at which pruning starts.
        stop: step at which it ends.
        final: share that is kept in the end.

    Source:
        Zhu & Gupta, "To prune, or not to prune" (2017); used by LoSparse (2023).

    Example:
        >>> [Cubic(10, 20, 0.2)(step) for step in (10, 15, 20, 99)]
        [1.0, 0.30000000000000004, 0.2, 0.2]
    """

    start: int
    stop: int
    final: float

    def __call__(self, step: int) -> float:
        """Return the share kept after ``step`` steps."""
        if step < self.start:
            return 1.0
        if step >= self.stop:
            return self.final
        left = 1 - (step - self.start) / (self.stop - self.start)
        return self.final + (1 - self.final) * left**3


def parse_points(
    at: float | str | list[float | str], keep: float | list[float] | list[None] | None
) -> tuple[list[Point], list[float | None]]:
    """Return one or several points, and the keep of each.

    Args:
        at: a point or a list of them.
        keep: the share of each, not checked; a list, falling, if ``at`` is one. None is unknown.

    Raises:
        SettingError: if one is no point, there is none, or not a falling keep for each.

    Example:
        >>> parse_points(["epoch:1", "epoch:2"], [0.5, 0.2])[1]
        [0.5, 0.2]
    """
    points = [Point.parse(one) for one in (at if isinstance(at, list) else [at])]
    if not points:
        raise SettingError("at is a list without a point; give one or more, such as at=[0.3, 0.6]")
    keeps: list[float | None] = [*keep] if isinstance(keep, list) else [keep]
    if len(keeps) != len(points):
        raise SettingError(
            f"give one keep for every point, such as keep=[0.5, 0.2] for at=[0.3, 0.6]; "
            f"got keep={keep!r} for at={at!r}"
        )
    if any(b >= a for a, b in pairwise(keeps) if a and b):
        raise SettingError(f"keep must fall from point to point, got {keep!r}")
    return points, keeps
