"""The report in a terminal."""

import itertools
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrcompress.report.record import LayerRecord, PointRecord, Report, sum_or_none


def ranks_table(layers: Iterable[LayerRecord], title: str) -> Table:
    """Return one row per kind of layer: the same path in every block, numbers aside."""
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", layer.name), []).append(layer)
    shared = _shared_path(kinds)
    table = plain_table(title + (f"; layers of {shared}" if shared else ""))
    table.add_column("layer", no_wrap=True)
    sparse = any(x.rows is not None for members in kinds.values() for x in members)
    found = ("rows", "kept") if sparse else ("kept", "error", "loss +")
    for heading in ("n", "dense", "out×in", "rank", *found):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, members in kinds.items():
        error = sum_or_none(x.error for x in members)
        figures = [
            "" if error is None else f"{error / len(members):.3f}",
            _loss(sum_or_none(x.predicted_loss for x in members)),
        ]
        table.add_row(
            kind[len(shared) :].removeprefix("."),
            str(len(members)),
            str(sum(x.rank is None for x in members) or ""),
            f"{members[0].out_features}×{members[0].in_features}",
            _span(x.rank for x in members),
            *([_span(x.rows for x in members)] if sparse else []),
            f"{sum(x.after for x in members) / sum(x.before for x in members):.3f}",
            *([] if sparse else figures),
        )
    return table


def plain_table(title: str) -> Table:
    """Return an empty table, in the style of all of them."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _shared_path(kinds: Iterable[str]) -> str:
    """Return the modules that all paths begin with, so that they need not be repeated."""
    paths = [kind.split(".")[:-1] for kind in kinds]
    parts = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in parts)


def plan_table(
    layers: Sequence[LayerRecord], title: str, whole: int, nbytes: int, notes: Iterable[str]
) -> RenderableType:
    """Return what would become of the layers of a model of ``whole`` parameters."""
    before, after = sum(x.before for x in layers), sum(x.after for x in layers)
    smaller = whole - before + after
    lines = [
        f"targeted layers: {before:,} → {after:,} parameters ({after / before:.3f})",
        f"whole model: {whole:,} → {smaller:,} ({smaller / whole:.3f})",
        f"statistics: at most {nbytes / 2**20:.1f} MiB",
        *notes,
    ]
    return Group(ranks_table(layers, title), Text("\n".join(lines)))


def point_table(point: PointRecord) -> RenderableType:
    """Return what one point did, by kind of layer, and in total."""
    where = "" if point.step is None else f" at step {point.step}"
    table = ranks_table(point.layers, f"lrcompress: {point.method}{where}, {point.seconds:.1f} s")
    lines = [
        f"targeted layers keep {point.keep:.3f}, the whole model "
        f"{point.model_after / point.model_before:.3f} of its parameters"
    ]
    if point.observed.get("steps"):
        lines.append(
            f"statistics of {point.observed['tokens']:,} tokens in {point.observed['steps']} steps"
            + (f", {point.observed['skipped']} skipped" if point.observed.get("skipped") else "")
            + f", {point.observed['bytes'] / 2**20:.0f} MiB"
        )
    lines += [point.note] if point.note else []
    lines += [f"{layer.name}: {layer.note}" for layer in point.layers if layer.note]
    return Group(table, Text("\n".join(lines)))


def summary_table(report: Report) -> Table:
    """Return what was lost and gained: dense beside factored, each point, and the end."""
    first, last = report.points[0], report.points[-1]
    table = plain_table("lrcompress: what was lost and gained")
    table.add_column("", no_wrap=True)
    table.add_column("dense", justify="right")
    for point in report.points:
        step = "" if point.step is None else f" at {point.step}"
        table.add_column(f"factored{step}", justify="right")
    table.add_column("at the end", justify="right")
    targeted = sum(x.before for x in last.layers)
    sizes = [
        ("targeted", targeted, [round(p.keep * targeted) for p in report.points]),
        ("all", first.model_before, [p.model_after for p in report.points]),
    ]
    for name, dense, now in sizes:
        table.add_row(f"{name} parameters", *(f"{n:,}" for n in (dense, *now, now[-1])))
        table.add_row("  kept", *(f"{n / dense:.3f}" for n in (dense, *now, now[-1])))
    names = list(first.metrics.get("before", {})) or list(report.final)
    for name in names:
        before = first.metrics.get("before", {}).get(name)
        after = [point.metrics.get("after", {}).get(name) for point in report.points]
        table.add_row(name, *map(_figure, (before, *after, report.final.get(name))))
    _loss_rows(table, report)
    speed = report.seconds_per_step
    if speed:
        blank = [""] * len(report.points)
        figures = [_figure(speed.get(key)) for key in ("dense", "factored")]
        table.add_row("seconds per step", figures[0], *blank, figures[1])
    return table


def _loss_rows(table: Table, report: Report) -> None:
    predicted = [point.predicted_loss for point in report.points]
    if any(value is not None for value in predicted):
        table.add_row("predicted change of loss", "", *map(_loss, predicted), "")
    name = next((n for n in report.points[0].metrics.get("before", {}) if "loss" in n), None)
    if name is not None:
        measured = [_change(point, name) for point in report.points]
        start = report.points[0].metrics["before"][name]
        end = report.final.get(name)
        change = None if end is None else end - start
        table.add_row(f"measured change of {name}", "", *map(_loss, measured), _loss(change))


def _change(point: PointRecord, name: str) -> float | None:
    before, after = (point.metrics.get(when, {}).get(name) for when in ("before", "after"))
    return None if before is None or after is None else after - before


def _span(sizes: Iterable[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    if not known:
        return ""
    return f"{min(known)}" if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
