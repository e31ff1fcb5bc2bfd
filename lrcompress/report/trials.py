"""Records of sizes that were tried at a point, by what they lose and by their time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrialRecord:
    """A share of parameters that was tried at a point, and validated.

    Attributes:
        keep: that was asked for.
        kept: that it amounts to over the targeted layers.
        value: of the metric; None where it was not finite.
        lost: by how much it is worse than the dense model's; below 0 where it is better.
        within: whether no more is lost than the point allows.
        share: of the validation data that it was validated on. Where it is less than 1, what is
            lost is what the model just before the point has lost on all of it, and what is lost
            beside that model on the share.
    """

    keep: float
    kept: float
    value: float | None
    lost: float | None
    within: bool
    share: float = 1.0


@dataclass(frozen=True)
class SearchRecord:
    """The search for the smallest model within a drop, at one point.

    Attributes:
        monitor: name of the metric.
        mode: ``"max"`` where higher values are better, ``"min"`` where lower ones are.
        reference: its value for the dense model, just before the first point.
        drop: by how much it may be worse in the end.
        allowed: by how much it may be worse just after this point.
        before: its value just before this point.
        chosen: the share that was taken; None where the layers stay as they were.
        trials: in their order.
    """

    monitor: str
    mode: str
    reference: float
    drop: float
    allowed: float
    before: float | None
    chosen: float | None = None
    trials: tuple[TrialRecord, ...] = ()


@dataclass(frozen=True)
class LatencyTrial:
    """Sizes of the layers that were tried for their time.

    Attributes:
        kept: share of the targeted layers' parameters.
        measured: time of the whole model / that just before the point.
    """

    kept: float
    measured: float


@dataclass(frozen=True)
class LatencyRecord:
    """Sizes chosen by the time of the whole model, at one point.

    Attributes:
        asked: greatest time of the model / that just before the point.
        measured: the same of the sizes that were taken, or of the fastest if none was.
        shape: leading sizes of the batch it was measured on: examples, and length if it has one.
        seconds: that the model took just before the point.
        trials: in their order.
        taken: whether sizes were taken; if not, the least take longer, and the layers stay as
            they were.
    """

    asked: float
    measured: float
    shape: tuple[int, ...]
    seconds: float
    trials: tuple[LatencyTrial, ...] = ()
    taken: bool = True

    @property
    def note(self) -> str:
        """What came of it, in words."""
        at = " × ".join(map(str, self.shape))
        said = f"{self.measured:.2f} of its time before, measured on a batch of {at}"
        if not self.taken:
            kept = next((x.kept for x in self.trials if x.measured == self.measured), 0.0)
            near = math.ceil(100 * self.measured + 1) / 100
            return (
                f"latency={self.asked:g} cannot be reached, and the layers stay as they were: with "
                f"the least sizes, {kept:.3f} of the parameters, the model takes {said}; "
                + (f"nearest: latency={near:g}" if near < 1 else "give keep= in place of it")
            )
        if self.measured > self.asked:
            return f"latency={self.asked:g} is missed: the model takes {said}"
        return f"the model takes {said}, for latency={self.asked:g}"


def search_from(data: Mapping[str, Any] | None) -> SearchRecord | None:
    """Return the record from plain types, as ``dataclasses.asdict`` gives them."""
    if data is None:
        return None
    return SearchRecord(**{**data, "trials": tuple(TrialRecord(**x) for x in data["trials"])})


def latency_from(data: Mapping[str, Any] | None) -> LatencyRecord | None:
    """Return the record from plain types, as ``dataclasses.asdict`` gives them."""
    if data is None:
        return None
    trials = tuple(LatencyTrial(**x) for x in data["trials"])
    return LatencyRecord(**{**data, "shape": tuple(data["shape"]), "trials": trials})
