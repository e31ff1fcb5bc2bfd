"""Matplotlib plots of a report, sized for a phone.

Colours have the names of :data:`COLOURS`; a page replaces them in dark mode.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import LayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lrcompress.report.keep_curves import MeasuredKeep, PredictedLoss
from lrcompress.report.layer_groups import block_number, by_layer_type, is_in_block
from lrcompress.report.record import Curve, LayerRecord, PointRecord, Report

COLOURS = {
    "ink": "#1d1d21",
    "line": "#dcdce1",
    "c0": "#0b6bb0",
    "c1": "#cc4c02",
    "c2": "#0a8f68",
    "c3": "#a83279",
    "c4": "#b07c00",
    "c5": "#5a4fcf",
    "c6": "#4b7d12",
    "c7": "#6e6e78",
}
_SERIES = [colour for name, colour in COLOURS.items() if name.startswith("c")]
_MARKERS = "os^DvPX*"
_HEIGHT = 2.8  # of a figure without a legend, in inches
_POINTS = 11
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOURS["line"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": _POINTS,
    "legend.frameon": False,
    "legend.fontsize": _POINTS,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Plot:
    """One matplotlib figure of a report, with title and caption.

    Attributes:
        name: short and unique among those of a report.
        title: what it shows.
        caption: how to read it.
        figure: to be drawn on any of matplotlib's canvases.
        detail: whether it is for those who look closer.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    detail: bool = False


def plots(report: Report) -> list[Plot]:
    """Return the plots of a run with at least one point."""
    with rc_context(STYLE):
        details = [
            *_over_depth(report.layers_after(len(report.points))),
            *_measured(report),
            *_curves(report.points[-1]),
            *_importance(report),
        ]
        first = [*_history(report), _budget(report)]
        return [*first, *(replace(one, detail=True) for one in details)]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as an image ``(height, width, 3)`` on white."""
    canvas: Any = FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


class _Margins(LayoutEngine):
    """Leaves the labels the room that their number of letters asks for.

    Matplotlib's own layouts draw every text twice more, longer than the rest of a page takes.
    """

    _adjust_compatible = _colorbar_gridspec = True

    def execute(self, fig: Figure) -> None:
        (axes,) = fig.axes
        letter, line = 0.68 * _POINTS, 1.3 * _POINTS
        ticks = axes.yaxis.get_major_formatter().format_ticks(list(axes.get_yticks()))
        left = 2 * line + letter * max(map(len, ticks), default=0)
        below = 2.8 * line + 72 * (fig.get_figheight() - _HEIGHT)  # the rest is the legend's
        width, height = 72 * fig.get_size_inches()
        fig.subplots_adjust(left / width, below / height, 1 - line / width, 1 - line / height)


def new_axes(x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure 5 inches wide with labelled axes."""
    figure = Figure(figsize=(5.0, _HEIGHT), layout=_Margins())
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def look(number: int) -> dict[str, Any]:
    """Return the colour and the marker of a series."""
    colour = _SERIES[number % len(_SERIES)]
    return {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "markeredgecolor": colour}


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def name_series(figure: Figure, axes: Axes) -> None:
    """Add a legend below the axes, where there is more than one series."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        columns = 2 if max(map(len, names)) < 28 else 1
        figure.set_figheight(_HEIGHT + 0.22 * math.ceil(len(names) / columns))
        figure.legend(handles, names, loc="lower center", ncols=columns, borderaxespad=0)


def loss_curves_figure(found: Sequence[PredictedLoss]) -> Figure:
    """Return a figure of predicted loss over ``keep``, for methods that predict it."""
    with rc_context(STYLE):
        figure, axes = new_axes("keep", "predicted change of loss")
        known = [one for one in found if one.predicted_loss is not None]
        for number, method in enumerate(dict.fromkeys(one.method for one in known)):
            pairs = [(x.keep, x.predicted_loss or 0.0) for x in known if x.method == method]
            axes.plot(*_columns(pairs), label=method, **look(number))
        _logarithmic(axes)
        name_series(figure, axes)
        figure.set_facecolor("white")
    return figure


def measured_curve_figure(found: Sequence[MeasuredKeep]) -> Figure:
    """Return a figure of a validation's figures over ``keep``, one below the other."""
    with rc_context(STYLE):
        names = list(dict.fromkeys(name for one in found for name in one.figures))
        methods = list(dict.fromkeys(x.method for x in found))
        figure = Figure(figsize=(5.0, 2.4 * len(names) + 0.4), layout="constrained")
        every = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
        for number, (name, axes) in enumerate(zip(names, every, strict=True)):
            known = [x for x in found if name in x.figures]
            for place, method in enumerate(methods):
                seen = [x for x in known if x.method == method or x.keep == 1]
                series = look(place if len(methods) > 1 else number)
                axes.plot(
                    *_columns([(x.keep, x.figures[name]) for x in seen]), label=method, **series
                )
            dense = known[0].figures[name]
            axes.axhline(dense, color=COLOURS["ink"], linewidth=1, linestyle=":")
            axes.set_ylabel(name)
        if len(methods) > 1:
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=3)
        every[-1].set_xlabel("keep, without retraining; dotted: the model as it is")
        figure.set_facecolor("white")
    return figure


# Over the depth of the model


def _over_depth(layers: Sequence[LayerRecord]) -> Iterator[Plot]:
    shown: dict[str, tuple[str, str, Callable[[LayerRecord], float | None]]] = {
        "ranks": ("Ranks over depth", "rank", lambda x: x.rank),
        "rows": ("Kept rows over depth", "rows", lambda x: x.rows),
        "kept": ("Share of each layer that stays", "kept", lambda x: x.after / x.before),
        "losses": (
            "Where the loss is predicted to rise",
            "predicted change of loss",
            lambda x: x.predicted_loss,
        ),
    }
    placed = [layer for layer in layers if is_in_block(layer)]
    if len(set(map(block_number, placed))) < 2:  # no depth to speak of
        return
    for name, (title, label, value) in shown.items():
        if any(value(layer) for layer in placed if not layer.dense):
            caption = _of_kinds(layers) + (" Hollow: left dense." if name == "kept" else "")
            yield Plot(name, title, caption, _by_depth(placed, label, value))


def _of_kinds(layers: Sequence[LayerRecord]) -> str:
    shared, _ = by_layer_type(layers)
    return f"Layers of {shared}, by kind." if shared else "Layers by kind."


def _by_depth(
    layers: Sequence[LayerRecord], label: str, value: Callable[[LayerRecord], float | None]
) -> Figure:
    figure, axes = new_axes("block", label)
    for number, (kind, members) in enumerate(by_layer_type(layers)[1].items()):
        placed = [(block_number(x), value(x)) for x in members if not x.dense]
        known = [(x, y) for x, y in placed if y is not None]
        axes.plot(*_columns(known), label=kind or "layer", **look(number))
        if label == "kept":
            dense = [block_number(x) for x in members if x.dense]
            hollow = look(number) | {"linestyle": "none", "markerfacecolor": "none"}
            axes.plot(dense, [1.0] * len(dense), **hollow)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_series(figure, axes)
    return figure


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


# Over training


def _budget(report: Report) -> Plot:
    figure, axes = new_axes("step", "kept of the targeted layers")
    end = _last_step(report)
    groups = groupby(
        sorted(report.points, key=_targets), key=_targets
    )  # points of one callback target the same layers
    for number, (_, group) in enumerate(groups):
        points = sorted(group, key=lambda point: point.step or 0)
        layers = points[0].layers
        xs, ys = [0.0], [sum(x.start for x in layers) / sum(x.before for x in layers)]
        for point in points:
            gradual = list(point.budget)
            xs += [step for step, _ in gradual]
            ys += [kept for _, kept in gradual]
            xs += [point.step or 0] * (1 if gradual else 2)
            ys += [point.keep] if gradual else [ys[-1], point.keep]
        xs, ys = [*xs, end], [*ys, ys[-1]]
        names = dict.fromkeys(point.method for point in points)
        colour = look(number)["color"]
        axes.plot(xs, ys, color=colour, label=", ".join(names))
        axes.plot(
            [point.step or 0 for point in points],
            [point.keep for point in points],
            **look(number) | {"linestyle": "none"},
        )
    axes.set_ylim(bottom=0)
    name_series(figure, axes)
    caption = "Parameters that remain, over those before. Dots: points at which structure changes."
    return Plot("budget", "The budget over training", caption, figure)


def _targets(point: PointRecord) -> list[str]:
    return sorted(layer.name for layer in point.layers)


def _last_step(report: Report) -> int:
    steps = [point.step or 0 for point in report.points]
    steps += [curve[-1][0] for curve in report.history.values()]
    return max(steps) if report.history else round(1.1 * max(steps))


def _history(report: Report) -> Iterator[Plot]:
    for number, (name, curve) in enumerate(report.history.items()):
        figure, axes = new_axes("step", name)
        axes.plot(*_columns(_with_drops(report, name, curve)), **look(number))
        for point in report.points:
            if point.step is not None:
                axes.axvline(point.step, color=COLOURS["ink"], linewidth=1, linestyle="--")
        dense = report.points[0].metrics.get("before", {}).get(name)
        if dense is not None:
            axes.axhline(dense, color=COLOURS["ink"], linewidth=1, linestyle=":")
        caption = (
            "Dashed line: layers were replaced at this step, and the curve jumps to what the model "
            "gave right after it. Dotted line: the model just before the first replacement."
        )
        yield Plot(f"history{number}", f"{name} over training", caption, figure)


def _with_drops(report: Report, name: str, curve: Curve) -> list[tuple[float, float]]:
    """Return a curve that goes through the figures just before and just after every point."""
    parts: list[tuple[float, int, float]] = [(step, 0, value) for step, value in curve]
    for point in report.points:
        taken = [point.metrics.get(when, {}).get(name) for when in ("before", "after")]
        if point.step is not None and None not in taken:
            # what is noted at the step of a point was taken before it
            parts += [(point.step, order, y) for order, y in enumerate(taken, 1) if y is not None]
    return [(step, value) for step, _, value in sorted(parts, key=lambda part: part[:2])]


# What was predicted


def _measured(report: Report) -> Iterator[Plot]:
    """Yield predicted against measured changes of the loss, where they were measured by layer."""
    layers = [x for point in report.points for x in point.layers if x.measured_loss is not None]
    known = [layer for layer in layers if layer.predicted_loss is not None]
    if not known:
        return
    figure, axes = new_axes("predicted change of loss", "measured")
    for number, (kind, members) in enumerate(by_layer_type(known)[1].items()):
        pairs = [(x.predicted_loss or 0.0, x.measured_loss or 0.0) for x in members]
        style = look(number) | {"linestyle": "none"}
        axes.plot(*_columns(pairs), label=kind or "layer", **style)
    low, high = axes.get_xlim()
    axes.axline((0, 0), slope=1, color=COLOURS["ink"], linewidth=1, linestyle="--")
    axes.set_xlim(low, high)
    name_series(figure, axes)
    caption = "Each layer replaced alone, without any retraining. Dashed: as predicted."
    yield Plot("measured", "Predicted and measured, by layer", caption, figure)


# Per layer


def _curves(point: PointRecord) -> Iterator[Plot]:
    layers = [layer for layer in point.layers if layer.curve]
    for number, (kind, members) in enumerate(by_layer_type(layers)[1].items()):
        figure, axes = new_axes("kept of the layer's parameters", "relative error")
        for layer in members:
            shares = [(_share(layer, rank), error) for rank, error in layer.curve]
            _faded(axes, shares, layer, members, number)
            place = layer.rank if layer.narrow is None else layer.narrow[0]
            if place is not None and layer.error is not None:
                dot = look(number) | {"linestyle": "none"}
                axes.plot([_share(layer, place)], [layer.error], **dot)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        caption = f"In the metric of {point.method}. {_SHADES} Dots: the chosen cuts."
        yield Plot(f"curves{number}", f"Error curves: {kind or 'layer'}", caption, figure)


_SHADES = "One line a layer, the stronger the deeper."


def _share(layer: LayerRecord, rank: int) -> float:
    return rank * layer.unit / layer.before


def _faded(
    axes: Axes,
    pairs: Sequence[tuple[float, float]],
    layer: LayerRecord,
    members: Sequence[LayerRecord],
    number: int,
) -> None:
    """Draw a layer's line, the stronger the deeper the layer."""
    deepest = max(map(block_number, members))
    alpha = 0.3 + 0.7 * (block_number(layer) / deepest if deepest else 1)
    axes.plot(*_columns(pairs), color=look(number)["color"], alpha=alpha, linewidth=1.2)


def _importance(report: Report) -> Iterator[Plot]:
    layers = [x for point in report.points for x in point.layers if x.importance]
    for number, (kind, members) in enumerate(by_layer_type(layers)[1].items()):
        figure, axes = new_axes("units in falling order", "score when pruning began")
        alone = not any(layer.rows for layer in layers)  # low rank alone: units are components
        for layer in members:
            scores = [(count, score) for count, score in layer.importance if score > 0]
            _faded(axes, scores, layer, members, number)
            kept = layer.rank if alone else (layer.rows if layer.entries is None else layer.entries)
            if kept and scores:
                dot = look(number) | {"linestyle": "none"}
                axes.plot([kept], [_at(layer.importance, kept)], **dot)
        _logarithmic(axes)
        caption = f"{_SHADES} Dots: as many as were kept in the end."
        yield Plot(f"importance{number}", f"Importance: {kind or 'layer'}", caption, figure)


def _at(curve: Curve, x: float) -> float:
    """Return the value at ``x``, between two of the curve on the logarithmic line through them."""
    places, values = zip(*((place, value) for place, value in curve if value > 0), strict=True)
    return float(np.exp(np.interp(x, places, np.log(values))))
