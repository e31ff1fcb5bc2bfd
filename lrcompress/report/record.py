"""Report of a run, as data: its points, layers and validation figures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrcompress.errors import ReportError
from lrcompress.files import atomic_write
from lrcompress.report.trials import LatencyRecord, SearchRecord, latency_from, search_from

OBSERVED_LOSS = "observed_loss"  # of the batches of compress(), among the figures of its record
VERSION = 2  # of the JSON; 1 said nothing of it, and had neither curves nor a history

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LayerRecord:
    """One targeted layer at one point.

    Attributes:
        name: its path in the model.
        out_features: rows of its weight.
        in_features: columns of its weight.
        rank: of its factors; None if it was left dense.
        error: ``‖P (W − M) Q‖ / ‖P W Q‖`` in the method's metric; 0 for a dense layer, None before
            it is known.
        predicted_loss: increase of the loss per example that the metric predicts for this
            layer alone; None for metrics that do not know the loss.
        note: about statistics that could not be used, or why the layer stays; or "".
        rows: rows of its sparse part; None where there is none. Of rank 0, it is all of the layer.
        entries: entries of these rows that are not zero, where single ones were pruned.
        measured_loss: increase of the validation loss with this layer alone replaced; None if it
            was not measured.
        curve: ranks and the relative errors they would have, some of them, rising.
        parameters: of what stands there now, where it is no pair of factors; None where it is.
        first: sizes of the first factor of a sum of Kronecker products, of which ``rank`` counts
            the terms; None for other factors.
        stood: parameters that stood there just before the point, where it was replaced already;
            None where it was dense.
        narrow: inner features that are left of its feed-forward block, and of how many; None where
            the block is not narrowed. Its curve is over them.
        importance: how many units were at least as important, and the score of the last of them,
            when pruning began: some of the units that pruning chooses from, in falling order.

    Example:
        >>> layer = LayerRecord("0", 8, 8, rank=2, error=0.1, predicted_loss=None)
        >>> layer.before, layer.unit, layer.after
        (64, 16, 32)
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
    measured_loss: float | None = None
    curve: Curve = ()
    importance: Curve = ()
    parameters: int | None = None
    first: tuple[int, int] | None = None
    stood: int | None = None
    narrow: tuple[int, int] | None = None

    @property
    def dense(self) -> bool:
        """Whether it is as in the architecture."""
        return self.rank is None and self.narrow is None

    @property
    def before(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def start(self) -> int:
        """Parameters that stood there just before the point."""
        return self.before if self.stood is None else self.stood

    @property
    def unit(self) -> int:
        """Parameters of one rank, of one term, or of one inner feature."""
        if self.narrow is not None:
            return self.before // self.narrow[1]
        if self.first is None:
            return self.out_features + self.in_features
        size = self.first[0] * self.first[1]
        return size + self.before // size

    @property
    def after(self) -> int:
        """Parameters of what stands there now; of rows with single entries, those not zero."""
        if self.entries is None or self.rank is None:
            return self.stored
        return self.rank * self.unit + self.entries

    @property
    def stored(self) -> int:
        """Parameters that take up memory, zeros among them."""
        if self.parameters is not None:
            return self.parameters
        if self.narrow is not None:
            return self.narrow[0] * self.unit
        if self.rank is None:
            return self.before
        return self.rank * self.unit + (self.rows or 0) * self.in_features

    def _untouched(self) -> "LayerRecord":
        """Return the layer as it was before the point."""
        own = (self.name, self.out_features, self.in_features)
        if self.stood is None:
            return LayerRecord(*own, None, 0.0, 0.0)
        return LayerRecord(*own, 0, None, None, parameters=self.stood)


@dataclass
class PointRecord:
    """Record of one point: its layers, sizes, and validation figures before and after.

    Attributes:
        method: that factored, a key of :data:`lrcompress.objective.METHODS` or a callback's own.
        step: optimizer steps before it; None outside of a training run.
        layers: the targeted layers.
        model_before: parameters of the whole model just before: layers that were replaced earlier
            count as they were, layers that are being pruned or updated as dense.
        model_after: parameters of the whole model now.
        observed: steps, tokens and skipped steps behind the statistics, and their bytes.
        seconds: that solving and replacing layers took.
        metrics: ``"before"`` and ``"after"`` to validation figures just then, without retraining;
            of :func:`~lrcompress.compress` the ``observed_loss`` of its batches.
        bytes_before: of the whole model's parameters just before; None in records of version 1.
        bytes_after: of the whole model's parameters now.
        budget: steps of gradual pruning and what was kept of the layers after them.
        note: why ``keep`` was not met, and what optimizer state was dropped; or "".
        trained: parameters that are trained from there on; None where that is all of them.
        effective: parameters of the whole model that are not zero, updates merged; None where it
            was not counted.
        search: for the smallest model within a drop; None where ``keep`` was given.
        latency: what came of ``latency``; None where that was not given.

    Example:
        >>> layer = LayerRecord("0", 8, 8, rank=2, error=0.1, predicted_loss=0.5)
        >>> PointRecord("kfac", None, [layer], model_before=128, model_after=96).figures()
        {'keep': 0.5, 'keep_model': 0.75, 'seconds': 0.0, 'predicted_loss': 0.5}
    """

    method: str
    step: int | None
    layers: list[LayerRecord]
    model_before: int
    model_after: int
    observed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_before: int | None = None
    bytes_after: int | None = None
    budget: Curve = ()
    note: str = ""
    trained: int | None = None
    effective: int | None = None
    search: SearchRecord | None = None
    latency: LatencyRecord | None = None

    @property
    def keep(self) -> float:
        """Parameters that remain / parameters before, over the targeted layers."""
        return sum(x.after for x in self.layers) / sum(x.before for x in self.layers)

    @property
    def left_alone(self) -> bool:
        """Whether the layers stay as they were, for nothing that was tried would do."""
        if self.search is not None:
            return self.search.chosen is None
        return self.latency is not None and not self.latency.taken

    @property
    def predicted_loss(self) -> float | None:
        """Predicted increase of the loss, summed over layers; None if that of one is unknown."""
        return sum_or_none(layer.predicted_loss for layer in self.layers)

    def __str__(self) -> str:
        """Return what was done in a line; ``repr`` has every layer."""
        told = [
            f"{self.method}: {len(self.layers)} layers keep {self.keep:.3f} of their parameters, "
            f"the model {self.model_after / self.model_before:.3f}"
        ]
        before, after = (
            self.metrics.get(when, {}).get(OBSERVED_LOSS) for when in ("before", "after")
        )
        if before is not None and after is not None:
            told.append(f"loss of the observed batches {before:.4f} → {after:.4f}")
        elif self.predicted_loss is not None:
            told.append(f"predicted change of the loss {self.predicted_loss:+.4f}")
        return "; ".join([*told, *filter(None, [self.note])])

    def figures(self, whole: int | None = None) -> dict[str, float]:
        """Return name to number, for a logger.

        Args:
            whole: parameters of the model before the first change of the run; None where that is
                this one.
        """
        values = {
            "keep": self.keep,
            "keep_model": self.model_after / (whole or self.model_before),
            "seconds": self.seconds,
        }
        if self.predicted_loss is not None:
            values["predicted_loss"] = self.predicted_loss
        for when, metrics in self.metrics.items():
            values |= {f"{when}/{name}": figure for name, figure in metrics.items()}
        return values


@dataclass
class SampleText:
    """What a language model writes after a prompt.

    Attributes:
        prompt: the text that is given.
        before: how the model goes on just before the first point.
        after: how it goes on at the end of the run; "" until then.
    """

    prompt: str
    before: str
    after: str = ""


@dataclass
class Report:
    """Report of a run: its points, validation figures and step times.

    Attributes:
        points: in the order they were reached.
        final: validation figures after the last step of training; empty if none were taken then.
        seconds_per_step: ``"dense"`` before the first point, ``"factored"`` after the last and,
            where there was gradual pruning, ``"pruning"`` between them.
        history: validation figures during training: name to steps and values.
        about: what was run, and where: the model, its data, versions, seed, date; for readers.
        samples: what a language model writes after some prompts.
        cpu_seconds: whether seconds per step are those of CPU time, all threads together.

    Example:
        >>> layer = LayerRecord("0", 8, 8, rank=2, error=0.1, predicted_loss=0.5)
        >>> report = Report([PointRecord("kfac", 100, [layer], model_before=128, model_after=96)])
        >>> Report.from_dict(report.to_dict()) == report
        True
    """

    points: list[PointRecord] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    seconds_per_step: dict[str, float] = field(default_factory=dict)
    history: dict[str, Curve] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    samples: list[SampleText] = field(default_factory=list)
    cpu_seconds: bool = False

    @classmethod
    def joined(cls, reports: Iterable["Report"]) -> "Report":
        """Return the one report of a run in which several callbacks replaced layers.

        Reports without points are left out. Final figures and history are those of the callback
        with the first point, samples those of the one that took them. Steps are timed as dense
        until the first point of all, as factored after the last.

        Args:
            reports: in the order of the callbacks, which is that of their points at one step: the
                model before the first change is that before the first point of all.
        """
        held = [report for report in reports if report.points]
        if len(held) < 2:
            return held[0] if held else cls()
        first = min(held, key=lambda report: report.points[0].step or 0)
        last = max(held, key=lambda report: report.points[-1].step or 0)
        seconds = {k: v for k, v in first.seconds_per_step.items() if k != "factored"}
        seconds |= {k: v for k, v in last.seconds_per_step.items() if k != "dense"}
        points = sorted((p for one in held for p in one.points), key=lambda p: p.step or 0)
        own = dict(first.final), seconds, dict(first.history), dict(first.about)
        samples = next((one.samples for one in held if one.samples), [])
        return cls(points, *own, samples, first.cpu_seconds)

    @property
    def clock(self) -> str:
        """What seconds per step are called."""
        return "CPU seconds per step" if self.cpu_seconds else "seconds per step"

    def layers_after(self, point: int) -> list[LayerRecord]:
        """Return all layers that any point targets, as they stand after point number ``point``.

        Those that no point has reached yet are dense, or of rank 0 and as many parameters as
        stood there where they were replaced before the run.

        Args:
            point: from 0; −1 is before the first, and any above the last is after it.
        """
        now: dict[str, LayerRecord] = {}
        for layer in (one for record in self.points for one in record.layers):
            now.setdefault(layer.name, layer._untouched())
        for record in self.points[: point + 1]:
            now |= {layer.name: layer for layer in record.layers}
        return list(now.values())

    def note(self, step: int, figures: Mapping[str, float], gap: float) -> None:
        """Add validation figures to the history; the latest always stay.

        Args:
            step: optimizer steps before it.
            figures: name to value.
            gap: steps within which no three are kept.
        """
        for name, value in figures.items():
            self.history[name] = with_value(self.history.get(name, ()), step, value, gap)

    def finish(self, step: int) -> None:
        """Take the figures that were noted at the last step of training as the final ones."""
        taken = {name: curve[-1] for name, curve in self.history.items()}
        self.final = {name: value for name, (when, value) in taken.items() if when == step}

    def to_dict(self) -> dict[str, object]:
        """Return the report in plain types, with the ``version`` of their form."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Return the report that :meth:`to_dict` returned, in this version or an earlier one.

        Raises:
            ReportError: if ``data`` is no report, a point has no layers, or its version is later.
        """
        version = data.get("version", 1) if isinstance(data, Mapping) else None
        if version not in range(1, VERSION + 1):
            raise ReportError(
                f"expected a report of version 1 to {VERSION}, got {version!r}"
                if isinstance(version, int)
                else f"this is no report: expected a mapping with points, got {str(data)[:40]!r}"
            )
        try:
            points = [_point(point) for point in data["points"]]
            history = {name: _curve(pairs) for name, pairs in data.get("history", {}).items()}
            about = {str(name): str(value) for name, value in data.get("about", {}).items()}
            samples = [SampleText(**one) for one in data.get("samples", ())]
            own = dict(data["final"]), dict(data["seconds_per_step"]), history, about, samples
            return cls(points, *own, bool(data.get("cpu_seconds", False)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"this is no report: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically.

        Args:
            path: of the file; its folder is made if need be.

        Raises:
            OSError: if the file cannot be written; what was there before stays.
        """
        with atomic_write(path) as passing:
            passing.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Return the report in a file, or in the folder that holds it as ``report.json``.

        Raises:
            ReportError: if there is none, or it cannot be read.
        """
        file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            below = sorted(Path(path).glob("**/report.json"))
            near = f"; below it: {', '.join(map(str, below[:3]))}" if below else ""
            raise ReportError(f"{file}: there is no such report{near}") from None
        except (OSError, ValueError) as error:
            raise ReportError(f"{file} cannot be read as a report: {error}") from error


def _point(data: Mapping[str, Any]) -> PointRecord:
    layers = [
        LayerRecord(
            **{**one, "curve": _curve(one.get("curve", ()))}
            | {"importance": _curve(one.get("importance", ()))}
            | {key: _pair(one.get(key)) for key in ("first", "narrow")}
        )
        for one in data["layers"]
    ]
    own: dict[str, Any] = {"layers": layers, "budget": _curve(data.get("budget", ()))}
    own |= {"search": search_from(data.get("search")), "latency": latency_from(data.get("latency"))}
    point = PointRecord(**{**data, **own})
    if not layers:
        raise ValueError("a point without layers")
    return point


def _curve(pairs: Iterable[Sequence[float]]) -> Curve:
    return tuple((int(x), float(y)) for x, y in pairs)


def _pair(sizes: Sequence[int] | None) -> tuple[int, int] | None:
    if sizes is None:
        return None
    one, two = sizes
    return int(one), int(two)


def with_value(curve: Curve, step: int, value: float, gap: float) -> Curve:
    """Return the curve with one more value, in place of the last if three would be within ``gap``.

    Example:
        >>> with_value(((0, 1.0), (4, 0.5)), 6, 0.25, gap=5)
        ((0, 1.0), (4, 0.5), (6, 0.25))
        >>> with_value(((0, 1.0), (4, 0.5)), 6, 0.25, gap=8)
        ((0, 1.0), (6, 0.25))
    """
    crowded = len(curve) > 1 and step - curve[-2][0] < gap
    again = bool(curve) and curve[-1][0] == step
    return (*(curve[:-1] if crowded or again else curve), (step, value))


def sum_or_none(values: Iterable[float | None]) -> float | None:
    """Return the sum, or None if a part of it is unknown.

    Example:
        >>> sum_or_none([1.0, 2.0]), sum_or_none([1.0, None])
        (3.0, None)
    """
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None
