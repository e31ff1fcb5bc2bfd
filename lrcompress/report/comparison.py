"""Comparison of several runs: figures side by side, and quality against size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from lrcompress.report.formatting import mebibytes, number, share
from lrcompress.report.page import Table, drawn, render
from lrcompress.report.plots import COLOURS, STYLE, Plot, look, name_series, new_axes
from lrcompress.report.record import Report
from lrcompress.report.summary import final_figures


@dataclass(frozen=True)
class _Cell:
    """A figure of a run: its value, how it is written, and when it was taken."""

    value: float
    say: Callable[[Any], str] = number
    when: str = ""

    def text(self, first: "_Cell | None") -> str:
        """Return it as text, with the difference to that of the first run."""
        written = self.say(self.value) + self.when
        if first is None or first.value == self.value:
            return written
        change = self.value - first.value
        return f"{written} ({'−' if change < 0 else '+'}{self.say(abs(change))})"


def side_by_side(reports: Mapping[str, Report]) -> Table:
    """Return the sizes, the last figures and the times of runs, a column each.

    Figures of the second run and later ones have the difference to the first run's. What was run
    is there as far as it differs.
    """
    every = list(reports.values())
    methods = [", ".join(dict.fromkeys(point.method for point in one.points)) for one in every]
    rows = [("method", methods)]
    columns = [_figures(report) for report in every]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label) for column in columns]
        later = [None if x is None else x.text(cells[0]) for x in cells[1:]]
        texts = [None if cells[0] is None else cells[0].text(None), *later]
        rows.append((label, [text or "" for text in texts]))
    for what in dict.fromkeys(what for one in every for what in one.about):
        told = [one.about.get(what, "") for one in every]
        if len(set(told)) > 1:
            rows.append((what, told))
    return Table("", list(reports), rows)


def _figures(report: Report) -> dict[str, _Cell]:
    first, last = report.points[0], report.points[-1]
    now = report.layers_after(len(report.points))
    size = sum(x.before for x in now)
    column = {
        "targeted parameters kept": _Cell(sum(x.after for x in now) / size, share),
        "all parameters": _Cell(last.model_after),
        "  kept": _Cell(last.model_after / first.model_before, share),
    }
    if last.bytes_after is not None:
        column["size, MiB"] = _Cell(last.bytes_after, mebibytes)
    before, after = first.metrics.get("before", {}), last.metrics.get("after", {})
    when, end = final_figures(report)
    late = "" if when == "at the end" else f" ({when})"
    for name in dict.fromkeys([*before, *after, *end]):
        for what, held, told in (
            ("before", before, ""),
            ("just after", after, ""),
            ("at the end", end, late),
        ):
            if name in held:
                column[f"{name} {what}"] = _Cell(held[name], when=told)
    for phase, seconds in report.seconds_per_step.items():
        column[f"{report.clock}, {phase}"] = _Cell(seconds)
    return column


def fronts(reports: Mapping[str, Report]) -> list[Plot]:
    """Return a plot for each validation figure: its final value over the model's parameters."""
    names = dict.fromkeys(name for report in reports.values() for name in final_figures(report)[1])
    with rc_context(STYLE):
        return [_front(reports, name, number) for number, name in enumerate(names)]


def _front(reports: Mapping[str, Report], name: str, index: int) -> Plot:
    figure, axes = new_axes("parameters of the model, millions", name)
    better = min if "loss" in name or "error" in name else max
    ends = {}
    for number_, (run, report) in enumerate(reports.items()):
        end = final_figures(report)[1]
        if name not in end:
            continue
        first, last = report.points[0], report.points[-1]
        ends[run] = (last.model_after / 1e6, end[name])
        style = look(number_) | {"linestyle": "none"}
        axes.plot(*([x] for x in ends[run]), label=run, **style)
        dense = first.metrics.get("before", {}).get(name)
        if dense is not None:
            hollow = style | {"markerfacecolor": "none"}
            axes.plot([first.model_before / 1e6], [dense], **hollow)
    best = front(list(ends.values()), better is max)
    axes.plot(*zip(*best, strict=True), color=COLOURS["ink"], linewidth=1, linestyle="--")
    name_series(figure, axes)
    caption = (
        "Full: at the end. Hollow: before the first point. Dashed: runs that no other beats in "
        "both."
    )
    return Plot(f"front{index}", f"{name} against size", caption, figure)


def front(ends: Sequence[tuple[float, float]], more_is_better: bool) -> list[tuple[float, float]]:
    """Return the Pareto front of (size, figure) pairs, in rising order of size.

    It holds those that no pair of smaller or equal size beats.

    Example:
        >>> front([(2.0, 0.8), (1.0, 0.7), (3.0, 0.75), (2.0, 0.6)], more_is_better=True)
        [(1.0, 0.7), (2.0, 0.8)]
    """
    sign = 1 if more_is_better else -1
    best: list[tuple[float, float]] = []
    for size, figure in sorted(ends, key=lambda end: (end[0], -sign * end[1])):
        if not best or sign * figure > sign * best[-1][1]:
            best.append((size, figure))
    return best


def write_comparison(reports: Mapping[str, Report], path: str | Path) -> None:
    """Write the comparison of several runs as one HTML page."""
    page = render(
        "comparison.html",
        title=f"{len(reports)} runs side by side",
        compared=side_by_side(reports),
        drawn=drawn(fronts(reports)),
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")
