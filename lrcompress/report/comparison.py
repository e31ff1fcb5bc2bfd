"""Comparison of several runs: figures side by side, and quality against size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context

from lrcompress.report.formatting import mebibytes, number, share
from lrcompress.report.page import Table, drawn, render
from lrcompress.report.plots import COLOURS, STYLE, Plot, look, name_series, new_axes
from lrcompress.report.record import Report
from lrcompress.report.summary import final_figures


def side_by_side(reports: Mapping[str, Report]) -> Table:
    """Return the sizes, the last figures and the times of runs, a column each."""
    columns = {name: _figures(report) for name, report in reports.items()}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    rows = [(label, [column.get(label, "") for column in columns.values()]) for label in labels]
    return Table("", list(columns), rows)


def _figures(report: Report) -> dict[str, str]:
    first, last = report.points[0], report.points[-1]
    now = report.layers_after(len(report.points))
    size = sum(x.before for x in now)
    column = {
        "method": ", ".join(dict.fromkeys(point.method for point in report.points)),
        "targeted parameters kept": share(sum(x.after for x in now) / size),
        "all parameters": number(last.model_after),
        "  kept": share(last.model_after / first.model_before),
        "size, MiB": mebibytes(last.bytes_after),
    }
    before, after = first.metrics.get("before", {}), last.metrics.get("after", {})
    when, end = final_figures(report)
    for name in dict.fromkeys([*before, *after, *end]):
        column[f"{name} before"] = number(before.get(name))
        column[f"{name} just after"] = number(after.get(name))
        value = number(end.get(name))
        column[f"{name} at the end"] = value if when == "at the end" else f"{value} ({when})"
    for phase, seconds in report.seconds_per_step.items():
        column[f"seconds per step, {phase}"] = number(seconds)
    return {label: text for label, text in column.items() if text}


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
