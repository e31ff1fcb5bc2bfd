"""HTML page of a report: one file, no network, light and dark, readable on a phone.

It holds every figure of the report, formatted by :mod:`lrcompress.report.formatting`.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lrcompress.report.formatting import change, number, share
from lrcompress.report.headline import headline, name_of_run
from lrcompress.report.layer_groups import common_path
from lrcompress.report.plots import COLOURS, Plot, plots
from lrcompress.report.record import Curve, LayerRecord, PointRecord, Report
from lrcompress.report.summary import PREDICTED, PREDICTED_NOTE, summary, trials

_DARK = {
    "ink": "#ececf1",
    "line": "#3a3a42",
    "c0": "#5db4f0",
    "c1": "#ff9457",
    "c2": "#45d0a2",
    "c3": "#f08cc8",
    "c4": "#efc14a",
    "c5": "#a79fff",
    "c6": "#a5d65f",
    "c7": "#b4b4be",
}
_PAGES = Environment(
    loader=PackageLoader("lrcompress.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

_ROW = 5  # cards of the headline, where there is room; more stand in two rows

# A column of the layers' table -> what its figures are.
_MEANING = {
    "first": "first: rows×columns of the first factor of a Kronecker product; rank is then the "
    "number of terms",
    "narrowed to": "narrowed to: inner features of its feed-forward block that stay; what that "
    "costs stands at the layer that reads them",
    "before": "before: parameters that stood there, where the layer was replaced already; kept is "
    "of the dense weight all the same",
    "error": "error: of the layer's weight, relative, in what the method measures errors in",
    "predicted change": "predicted change: of the training loss an example, if this layer alone "
    "were replaced; right for small cuts near a minimum, too small for large cuts, above all of "
    "classifiers that have fitted their data",
    "measured change": "measured change: of the validation loss, with this layer alone replaced",
}


@dataclass(frozen=True)
class Table:
    """A table of texts, for a template.

    Attributes:
        corner: heading of the labels.
        headings: of the columns after the first.
        rows: a label and a text for every column.
        notes: lines of text below the table.
    """

    corner: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = field(default_factory=tuple)


def write_page(report: Report, path: str | Path) -> None:
    """Write the report of a run with at least one point as HTML.

    It is titled by the model and the data, as far as they are known, and by its folder.
    """
    found, shown = summary(report), plots(report)
    points = [
        {
            "title": _title(point),
            "figures": _scalars(point),
            "trials": _trials(point),
            "layers": _layers(point),
        }
        for point in report.points
    ]
    folder, name = Path(path).resolve().parent.name, name_of_run(report.about)
    page = render(
        "run.html",
        title=f"{name} · {folder}" if name else folder,
        heading=name or folder,
        lead=_lead(report),
        headline=(facts := headline(report)),
        columns=len(facts) if len(facts) <= _ROW else math.ceil(len(facts) / 2),
        about=Table("", [""], [(what, [text]) for what, text in report.about.items()]),
        summary=Table("", found.headings, found.rows, found.notes),
        drawn=drawn(plot for plot in shown if not plot.detail),
        details=drawn(plot for plot in shown if plot.detail),
        samples=report.samples,
        points=points,
        data=[*_history(report), *_curves(report)],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def render(template: str, **values: object) -> str:
    """Return the HTML of one of the package's templates, filled in."""
    return _PAGES.get_template(template).render(light=COLOURS, dark=_DARK, **values)


def drawn(figures: Iterable[Plot]) -> list[dict[str, object]]:
    """Return title, caption and SVG of each plot, for a template."""
    return [
        {"title": plot.title, "caption": plot.caption, "svg": Markup(to_svg(plot.figure, plot))}
        for plot in figures
    ]


def to_svg(figure: Figure, plot: Plot) -> str:
    """Return a figure as an ``<svg>`` element with the page's fonts and colours."""
    file = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        canvas.print_svg(file, metadata=without)  # savefig would draw twice
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # of the same names in every figure
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = Markup.escape(plot.title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _lead(report: Report) -> str:
    first, last = report.points[0], report.points[-1]
    now = report.layers_after(len(report.points))
    kept = sum(x.after for x in now) / sum(x.before for x in now)
    methods = ", ".join(dict.fromkeys(point.method for point in report.points))
    return (
        f"{methods}: the {len(now)} targeted layers keep {share(kept)} of their parameters, the "
        f"whole model {share(last.model_after / first.model_before)}."
    )


def _title(point: PointRecord) -> str:
    return point.method + ("" if point.step is None else f", at step {point.step:,}")


def _scalars(point: PointRecord) -> Table:
    sizes = {
        "parameters of the model": (point.model_before, point.model_after),
        "bytes of its parameters": (point.bytes_before, point.bytes_after),
    }
    rows = [
        (name, [number(before), number(after)])
        for name, (before, after) in sizes.items()
        if before is not None
    ]
    before, after = (point.metrics.get(when, {}) for when in ("before", "after"))
    names = dict.fromkeys([*before, *after])
    rows += [(name, [number(before.get(name)), number(after.get(name))]) for name in names]
    for what, count in point.observed.items():
        label = "bytes of statistics" if what == "bytes" else f"observed {what}"
        rows.append((label, ["", number(count)]))
    rows.append(("seconds it took", ["", number(point.seconds)]))
    notes = []
    if point.predicted_loss is not None:
        rows.append((PREDICTED, ["", change(point.predicted_loss)]))
        notes.append(PREDICTED_NOTE)
    return Table("", ("before", "after"), rows, notes)


def _trials(point: PointRecord) -> Table | None:
    found = trials(point)
    return None if found is None else Table("tried", found.headings, found.rows, found.notes)


def _layers(point: PointRecord) -> Table:
    columns: dict[str, Callable[[LayerRecord], str]] = {
        "out": lambda x: number(x.out_features),
        "in": lambda x: number(x.in_features),
        "first": lambda x: "×".join(map(str, x.first or ())),
        "rank": lambda x: "dense" if x.dense else number(x.rank),
        "narrowed to": lambda x: number(None if x.narrow is None else x.narrow[0]),
        "rows": lambda x: number(x.rows),
        "entries": lambda x: number(x.entries),
        "before": lambda x: number(x.stood),
        "kept": lambda x: share(x.after / x.before),
        "error": lambda x: number(x.error),
        "predicted change": lambda x: change(x.predicted_loss),
        "measured change": lambda x: change(x.measured_loss),
        "note": lambda x: x.note,
    }
    shown = {name: [say(layer) for layer in point.layers] for name, say in columns.items()}
    shown = {name: cells for name, cells in shown.items() if any(cells)}
    within = common_path([layer.name for layer in point.layers])
    rows = [
        (layer.name.removeprefix(within), [cells[i] for cells in shown.values()])
        for i, layer in enumerate(point.layers)
    ]
    corner = f"layer of {within.rstrip('.')}" if within else "layer"
    return Table(corner, list(shown), rows, [_MEANING[name] for name in shown if name in _MEANING])


def _history(report: Report) -> list[Table]:
    tables = []
    if report.history:
        steps = sorted({step for curve in report.history.values() for step, _ in curve})
        known = {name: dict(curve) for name, curve in report.history.items()}
        rows = [(number(s), [number(curve.get(s)) for curve in known.values()]) for s in steps]
        tables.append(Table("Validation, by step", list(known), rows))
    for point in report.points:
        if point.budget:
            rows = [(number(step), [number(kept)]) for step, kept in point.budget]
            tables.append(Table(f"Budget of {_title(point)}, by step", ["kept"], rows))
    return tables


def _curves(report: Report) -> list[Table]:
    tables = []
    for point in report.points:
        for what, label in (("curve", "Error at each rank"), ("importance", "Score of each unit")):
            held: dict[tuple[int, ...], list[tuple[LayerRecord, Curve]]] = {}
            for layer in point.layers:
                curve: Curve = getattr(layer, what)
                if curve:
                    held.setdefault(tuple(x for x, _ in curve), []).append((layer, curve))
            within = common_path([layer.name for layer in point.layers])
            for places, members in held.items():
                rows = [
                    (one.name.removeprefix(within), [number(y) for _, y in curve])
                    for one, curve in members
                ]
                tables.append(Table(f"{label}: {_title(point)}", [*map(number, places)], rows))
    return tables
