"""What a run lost and gained, as data."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lrcompress.files import whole


@dataclass(frozen=True)
class LayerRecord:
    """One targeted layer at one point.

    Attributes:
        name: its path in the model.
        out_features: rows of its weight.
        in_features: columns of its weight.
        rank: of its factors; None if it was left dense.
        error: relative error in the method's metric; 0 for a dense layer, None before it is known.
        predicted_loss: increase of the loss per example that the metric predicts for this
            layer alone; None for metrics that do not know the loss.
        note: what was done about ill-conditioned statistics, or "".
        rows: rows of its sparse part; None where there is none.
        entries: entries of these rows that are not zero, where single ones were pruned.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    error: float | None
    predicted_loss: float | None
    note: str = ""
    rows: int | None = None
    entries: int | None = None

    @property
    def before(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def after(self) -> int:
        """Parameters of what stands there now."""
        if self.rank is None:
            return self.before
        rows = (self.rows or 0) * self.in_features
        sparse = rows if self.entries is None else self.entries
        return self.rank * (self.out_features + self.in_features) + sparse


@dataclass
class PointRecord:
    """What one point did.

    Attributes:
        method: that factored.
        step: optimizer steps before it; None outside of a training run.
        layers: the targeted layers.
        model_before: parameters of the whole model, dense.
        model_after: parameters of the whole model now.
        observed: steps, tokens and skipped steps behind the statistics, and their bytes.
        seconds: the solves and the surgery took.
        metrics: validation figures just before and just after, without any retraining.
    """

    method: str
    step: int | None
    layers: list[LayerRecord]
    model_before: int
    model_after: int
    observed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def keep(self) -> float:
        """Parameters that remain of the targeted layers."""
        return sum(x.after for x in self.layers) / sum(x.before for x in self.layers)

    @property
    def predicted_loss(self) -> float | None:
        """Increase of the loss that the metric predicts, summed over layers."""
        return sum_or_none(layer.predicted_loss for layer in self.layers)

    def figures(self) -> dict[str, float]:
        """Return what a logger takes: one number a name."""
        values = {
            "keep": self.keep,
            "keep_model": self.model_after / self.model_before,
            "seconds": self.seconds,
        }
        if self.predicted_loss is not None:
            values["predicted_loss"] = self.predicted_loss
        for when, metrics in self.metrics.items():
            values |= {f"{when}/{name}": figure for name, figure in metrics.items()}
        return values


@dataclass
class Report:
    """What happened in a run: its points, and how it ended.

    Attributes:
        points: in the order they were reached.
        final: validation figures at the end of training.
        seconds_per_step: of training before the first and after the last point.
    """

    points: list[PointRecord] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    seconds_per_step: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the report in plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Report":
        """Return the report that :meth:`to_dict` described."""
        points = [
            PointRecord(**{**point, "layers": [LayerRecord(**layer) for layer in point["layers"]]})
            for point in data["points"]  # type: ignore[attr-defined]
        ]
        return cls(points, dict(data["final"]), dict(data["seconds_per_step"]))  # type: ignore[call-overload]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole(path) as passing:
            passing.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def sum_or_none(values: Iterable[float | None]) -> float | None:
    """Return the sum, or None if a part of it is unknown.

    Example:
        >>> sum_or_none([1.0, 2.0]), sum_or_none([1.0, None])
        (3.0, None)
    """
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None
