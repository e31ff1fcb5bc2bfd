"""Summary of a run in rows: figures before, after each point, and at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lrcompress.report.formatting import change, mebibytes, number, share
from lrcompress.report.record import PointRecord, Report

PREDICTED = "predicted change of loss"
PREDICTED_NOTE = (
    "predicted: of the training loss, for small cuts near a minimum; large cuts lose more"
)


@dataclass(frozen=True)
class Summary:
    """A table of figures of a run.

    Attributes:
        headings: of the columns after the first.
        rows: a label and a text for every column.
        notes: lines of text below the table.
    """

    headings: list[str]
    rows: list[tuple[str, list[str]]]
    notes: list[str]


def summary(report: Report) -> Summary:
    """Return the sizes, figures and times of a run with at least one point.

    What was predicted of the loss stands there only where nothing was measured: of a model that
    has fitted its data a tenth may be predicted of what is lost.
    """
    points = report.points
    when, last = final_figures(report)
    columns = ["before", *(_heading(point) for point in points), when]
    found = _Rows([], len(columns))
    _sizes(found, report)
    _metrics(found, report, last)
    seconds = report.seconds_per_step
    if seconds:
        found.add(report.clock, [seconds.get("dense")], [seconds.get("factored")])
    if "pruning" in seconds:
        found.add("… while pruning", [None] * len(points) + [seconds["pruning"]])
    notes = []
    if not last:
        notes.append("not validated after the last point")
    dense = sum(layer.dense for layer in report.layers_after(len(points)))
    if dense:
        notes.append(f"{dense} of the targeted layers {'is' if dense == 1 else 'are'} left dense")
    notes += [point.note for point in report.points if point.note]
    if any(label == PREDICTED for label, _ in found.rows):
        notes.append(PREDICTED_NOTE)
    return Summary(columns, found.rows, notes)


def final_figures(report: Report) -> tuple[str, dict[str, float]]:
    """Return the figures that a run ended with, and when they were taken.

    They are those of the last validation after the last point, none if there was none.
    """
    if report.final:
        return "at the end", report.final
    steps = [curve[-1][0] for curve in report.history.values()]
    last = max(steps, default=0)
    if last <= (report.points[-1].step or 0):
        return "at the end", {}
    figures = {name: dict(curve).get(last) for name, curve in report.history.items()}
    return f"at {last:,}", {name: x for name, x in figures.items() if x is not None}


@dataclass(frozen=True)
class _Rows:
    rows: list[tuple[str, list[str]]]
    columns: int

    def add(
        self,
        label: str,
        first: Sequence[float | None],
        last: Sequence[float | None] = (),
        say: Callable[[Any], str] = number,
    ) -> None:
        """Add a row of figures from the left and from the right, blank between them."""
        blank = [None] * (self.columns - len(first) - len(last))
        self.rows.append((label, [say(value) for value in (*first, *blank, *last)]))


def _heading(point: PointRecord) -> str:
    return "after" if point.step is None else f"after, at {point.step:,}"


def _sizes(found: _Rows, report: Report) -> None:
    stages = [report.layers_after(i) for i in range(-1, len(report.points))]
    single = any(layer.entries is not None for layer in stages[-1])
    targeted = _both_ends([sum(x.after for x in layers) for layers in stages])
    found.add("targeted parameters" + (", not zero" if single else ""), targeted)
    dense = sum(layer.before for layer in stages[0])
    found.add("  kept", [size / dense for size in targeted], say=share)
    if single:
        found.add("… stored", _both_ends([sum(x.stored for x in layers) for layers in stages]))
    first, last = report.points[0], report.points[-1]
    if last.effective is not None:
        effective = [one.effective for one in (*report.points, last)]
        found.add("parameters that are not zero", [None, *effective])
    if last.trained is not None:
        found.add("parameters that are trained", [None, *(one.trained for one in report.points)])
    whole = _both_ends([first.model_before, *(point.model_after for point in report.points)])
    found.add("all parameters" + (", stored" if single else ""), whole)
    found.add("  kept", [size / whole[0] for size in whole], say=share)
    if first.bytes_before is not None:
        sizes = [first.bytes_before, *(point.bytes_after for point in report.points)]
        found.add("size, MiB", [*sizes, sizes[-1]], say=mebibytes)


def _both_ends(sizes: list[int]) -> list[int]:
    return [*sizes, sizes[-1]]


def _metrics(found: _Rows, report: Report, last: dict[str, float]) -> None:
    points = report.points
    before = points[0].metrics.get("before", {})
    after = [point.metrics.get("after", {}) for point in points]
    names = dict.fromkeys([*before, *(name for one in after for name in one), *last])
    for name in names:
        found.add(name, [before.get(name), *(one.get(name) for one in after)], [last.get(name)])
    losses = _losses(before)
    known = [any(measured_change(point, loss) is not None for loss in losses) for point in points]
    pairs = zip(points, known, strict=True)
    predicted = [None if measured else point.predicted_loss for point, measured in pairs]
    if any(value is not None for value in predicted):
        found.add(PREDICTED, [None, *predicted], say=change)
    for loss in losses:
        end = last.get(loss)
        found.add(
            f"measured change of {loss}",
            [None, *(measured_change(point, loss) for point in points)],
            [None if end is None else end - before[loss]],
            say=change,
        )


def loss_name(figures: dict[str, float]) -> str | None:
    """Return the figure that is a loss, of several loaders that of the first; or None."""
    return next((name for name in figures if "loss" in name), None)


def _losses(figures: dict[str, float]) -> list[str]:
    """Return the figure that is a loss, of every loader."""
    first = loss_name(figures)
    return [name for name in figures if first and _without_loader(name) == _without_loader(first)]


def _without_loader(name: str) -> str:
    return name.partition("/dataloader_idx_")[0]  # which Lightning appends


def measured_change(point: PointRecord, name: str) -> float | None:
    """Return by how much a point changed a validation figure; None where it was not measured."""
    before, after = (point.metrics.get(when, {}).get(name) for when in ("before", "after"))
    return None if before is None or after is None else after - before


def trials(point: PointRecord) -> Summary | None:
    """Return what was tried at a point to find its ``keep``; None where nothing was."""
    found = point.search
    if found is None or not found.trials:
        return None
    rows = [
        (
            f"keep {trial.keep:g}",
            [
                share(trial.kept),
                "not finite" if trial.value is None else number(trial.value),
                "" if trial.lost is None else change(trial.lost),
                ("within" if trial.within else "too much")
                + (", taken" if (trial.keep, trial.share) == (found.chosen, 1) else "")
                + ("" if trial.share == 1 else f", on {trial.share:g} of the data"),
            ],
        )
        for trial in found.trials
    ]
    better = "higher" if found.mode == "max" else "lower"
    notes = [
        f"{found.monitor}, of which {better} values are better: {number(found.reference)} of the "
        f"dense model before the first point, {number(found.before)} before this one; at most "
        f"{number(found.allowed)} may be lost here, and {number(found.drop)} in the end",
        "keep was chosen on these validation data: they are no test of the result",
    ]
    return Summary(["kept", found.monitor, "lost", ""], rows, notes)
