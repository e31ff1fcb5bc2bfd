"""Search for the smallest model within a drop: metrics and their directions, bisection, recovery.

What is lost is counted in units of the metric, above 0 where it is worse than the reference: of a
loss ``value − reference``, of an accuracy ``reference − value``.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lrcompress.errors import SettingError

GRID = tuple(hundredths / 100 for hundredths in range(1, 100))  # of keep; 1 is the dense model
MODES = ("max", "min")
# Words of a metric's name, by which users of Lightning mean that lower, or higher, is better.
_LOWER = (
    *("loss", "losses", "ppl", "perplexity", "error", "err", "mse", "rmse", "mae", "mape", "nll"),
    *("wer", "cer", "ter", "bpb", "bpc", "bits", "entropy", "divergence", "kl", "fid", "brier"),
    *("ece", "regret", "distance"),
)
_HIGHER = (
    *("acc", "accuracy", "f1", "fbeta", "auc", "auroc", "auprc", "precision", "recall", "map"),
    *("mcc", "matthews", "bleu", "rouge", "rouge1", "rouge2", "rougel", "meteor", "em", "exact"),
    *("match", "iou", "miou", "dice", "psnr", "ssim", "r2", "pearson", "spearman", "kappa"),
    *("correlation", "ndcg", "mrr", "hits", "specificity", "sensitivity", "ap"),
)
_HOPED = 0.5  # share of a loss that training is taken to bring back before any was measured
_MOST = 0.75  # share that is relied on at most: four times the drop may be lost at a point
_ROUNDING = 1e-6  # of float32 metrics, relative


def better_direction(name: str) -> str | None:
    """Return whether higher values of a metric are better, ``"max"``, or lower ones, ``"min"``.

    By the words of its name, of which the last that is known counts, ``score`` only where no other
    is; None if none is.

    Example:
        >>> [better_direction(x) for x in ("val_loss", "val/Accuracy", "error_rate", "val_x")]
        ['min', 'max', 'min', None]
    """
    words = re.findall(r"[a-z]+[0-9]?", name.lower())
    known = [x for x in words if x in _LOWER + _HIGHER] or [x for x in words if x == "score"]
    return None if not known else "min" if known[-1] in _LOWER else "max"


@dataclass(frozen=True)
class Drop:
    """By how much a metric may get worse: in its own units, or relative to the reference.

    Attributes:
        value: the amount, or the share.
        relative: whether it is a share.
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, drop: object) -> "Drop":
        """Read a number in units of the metric, or a share of the reference such as ``"1%"``.

        Raises:
            SettingError: if it is neither, or below 0.

        Example:
            >>> Drop.parse("1%"), Drop.parse(0.01)
            (Drop(value=0.01, relative=True), Drop(value=0.01, relative=False))
        """
        text = str(drop).strip()
        relative = text.endswith("%")
        try:
            value = float(text.removesuffix("%"))  # float(True) is a number, "True" is none
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise SettingError(
                "drop is by how much monitor may get worse, a number from 0 in its own units, such "
                f"as 0.01, or a share of the dense model's figure, such as '1%'; got {drop!r}"
            )
        return cls(value / 100 if relative else value, relative)

    def amount(self, reference: float) -> float:
        """Return the drop in units of the metric."""
        return self.value * abs(reference) if self.relative else self.value


def check_leaves_some(drop: Drop, monitor: str, mode: str, most: float = math.inf) -> None:
    """Check, before the dense model's figure is known, that not all of it may be lost.

    Args:
        drop: that is allowed.
        monitor: name of the metric.
        mode: ``"max"`` where higher values are better; where lower ones are, there is no such end.
        most: the greatest figure that there can be.

    Raises:
        SettingError: if all may be lost, whatever the figure will be.

    Example:
        >>> check_leaves_some(Drop.parse("1%"), "val_accuracy", "max", most=1.0)
    """
    if mode == "min" or (drop.value < 1 if drop.relative else not 0 < most <= drop.value):
        return
    amount = f"'{100 * drop.value:g}%'" if drop.relative else f"{drop.value:g}"
    bound = "" if drop.relative else f", which is at most {most:g}"
    raise SettingError(
        f"drop={amount} allows all of {monitor} to be lost{bound}; give drop='1%' for a hundredth "
        "of the dense model's figure, 0.01 for a hundredth of 1"
    )


@dataclass(frozen=True)
class Target:
    """What a model may lose at most.

    Attributes:
        mode: ``"max"`` where higher values are better, ``"min"`` where lower ones are.
        reference: the value of the dense model.
        drop: by how much a value may be worse, in units of the metric.

    Example:
        >>> target = Target("max", reference=0.93, drop=0.01)
        >>> [target.is_within(target.lost(value)) for value in (0.95, 0.92, 0.91, float("nan"))]
        [True, True, False, False]
    """

    mode: str
    reference: float
    drop: float

    @classmethod
    def of(cls, monitor: str, mode: str, reference: float, drop: Drop) -> "Target":
        """Return the target from the dense model's figure.

        Raises:
            SettingError: if all of the figure may be lost, which was hardly meant.
        """
        amount = drop.amount(reference)
        if mode == "max" and amount >= abs(reference) > 0:
            raise SettingError(
                f"drop={amount:g} allows all of {monitor} to be lost, which is {reference:.4g} for "
                "the dense model; give drop='1%' for a hundredth of that, 0.01 for a hundredth of 1"
            )
        return cls(mode, reference, amount)

    def lost(self, value: float) -> float:
        """Return by how much a value is worse than the reference; below 0 where it is better."""
        return (self.reference - value) * (1 if self.mode == "max" else -1)

    def is_within(self, lost: float, allowed: float | None = None) -> bool:
        """Return whether no more is lost than ``allowed``, by default the drop, to rounding."""
        limit = self.drop if allowed is None else allowed
        return lost <= limit + _ROUNDING * max(abs(self.reference), limit)


@dataclass(frozen=True)
class Recovery:
    """What training has brought back of the loss of a point.

    Attributes:
        share: of what was lost just after the point; from 0, and at most what is relied on.
        steps: of training in which it did.
    """

    share: float
    steps: int

    @classmethod
    def measured(cls, after: float, later: float, steps: int) -> "Recovery | None":
        """Return the share, or None where nothing was lost that could be brought back.

        Args:
            after: what was lost just after a point.
            later: what was lost before the next one.
            steps: between them.

        Example:
            >>> Recovery.measured(after=0.04, later=0.03, steps=100)
            Recovery(share=0.25, steps=100)
        """
        if not after > 0 or not math.isfinite(later):
            return None
        return cls(min(max(0.0, 1 - later / after), _MOST), steps)

    def over(self, steps: float) -> float:
        """Return the share that so many steps bring back: ``1 − (1 − share)^(steps / measured)``.

        More steps than were measured are not relied on to bring back more.

        Example:
            >>> Recovery(share=0.75, steps=100).over(50), Recovery(0.75, 100).over(1000)
            (0.5, 0.75)
        """
        return float(1 - (1 - self.share) ** min(1.0, steps / max(1, self.steps)))


def allowed_loss(
    drop: float, measured: Iterable[Recovery], steps: float, *, last: bool, left: float = 0.0
) -> float:
    """Return what may be lost at a point so that no more than ``drop`` is lost in the end.

    Training after it brings back a share ``r`` of what is lost anew, and nothing of what is
    ``left`` of earlier losses, which it has had its time for: ``left + (drop − left) / (1 − r)``.
    ``r`` is the least that points before have measured, over the steps that are left until the
    next point or the end. Where nothing was measured, it is half at a point that another one
    follows, which then judges it, and nothing at the last.

    Args:
        drop: that is allowed in the end.
        measured: at the points before.
        steps: until the next point, or until the end; ``inf`` if unknown.
        last: whether no other point follows.
        left: what is lost just before the point; above ``drop``, no more may be.

    Example:
        >>> allowed_loss(0.01, [], 100, last=True), allowed_loss(0.01, [], 100, last=False)
        (0.01, 0.02)
        >>> allowed_loss(0.01, [Recovery(0.75, 100), Recovery(0.5, 100)], 100, last=True)
        0.02
        >>> allowed_loss(0.01, [Recovery(0.5, 100)], 100, last=True, left=0.006)
        0.014
    """
    left = max(0.0, left)
    if left >= drop:
        return drop
    share = min([one.over(steps) for one in measured], default=0.0 if last else _HOPED)
    return left + (drop - left) / (1 - share)


def smallest_within(
    size: int,
    possible: Callable[[int], bool],
    within: Callable[[int], bool],
    more: Callable[[], bool],
    guess: int | None = None,
) -> int:
    """Return the least number that is possible and within, by bisection.

    Both are taken to hold from some number on. What is returned was tried itself, so it is within
    whether that is so or not.

    Args:
        size: how many there are, from 0; of ``size`` itself it is known that it is within.
        possible: costs little.
        within: tries a number.
        more: whether another may be tried; if not, the least so far is returned.
        guess: is tried first, then numbers 1, 3, 7, … away from it on the side where the least
            lies, until it lies between two of them.

    Cost:
        ``log₂(size)`` trials at most, rounded up; from a guess that is ``d`` off,
        ``2 + 2 log₂(d + 1)``.

    Example:
        >>> tried = []
        >>> smallest_within(99, lambda i: i > 3, lambda i: tried.append(i) or i >= 37, lambda: True)
        37
        >>> tried
        [51, 27, 39, 33, 36, 37]
    """
    low = bisect_left(range(size), True, key=possible) - 1
    high, far, side = size, 1, 0
    while high - low > 1 and more():
        near = (low + high) // 2 if guess is None else min(max(guess, low + 1), high - 1)
        found = within(near)
        low, high = (low, near) if found else (near, high)
        beyond = side in (0, -1 if found else 1)  # the least lies further that way
        side = -1 if found else 1
        guess, far = (near + side * far, 2 * far) if guess is not None and beyond else (None, far)
    return high


def check_monitor(monitor: str, mode: str | None) -> str:
    """Return the direction of a metric: the one given, else that its name tells.

    Raises:
        SettingError: if ``mode`` is no direction, or the name tells none.

    Example:
        >>> check_monitor("val_accuracy", None)
        'max'
    """
    if mode is not None and mode not in MODES:
        raise SettingError(
            "monitor_mode must be 'max' (higher is better) or 'min' (lower is better), got "
            f"{mode!r}"
        )
    found = mode or better_direction(monitor)
    if found is None:
        raise SettingError(
            f"monitor_mode is missing: {monitor!r} does not say whether higher or lower is better; "
            "give monitor_mode='max' or monitor_mode='min'"
        )
    return found


def grid_below(kept: float) -> Sequence[float]:
    """Return the shares that are tried of a model that keeps ``kept``: hundredths below it."""
    return [keep for keep in GRID if keep < kept - 1e-9]
