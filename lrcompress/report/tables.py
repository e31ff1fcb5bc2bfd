"""Terminal tables of a report."""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrcompress.report.formatting import change, count, number, share
from lrcompress.report.keep_curves import MeasuredKeep, PredictedLoss
from lrcompress.report.layer_groups import by_layer_type
from lrcompress.report.record import LayerRecord, PointRecord, Report, sum_or_none
from lrcompress.report.summary import summary, trials

WIDTH = 130  # columns that the widest table needs


def ranks_table(layers: Iterable[LayerRecord], title: str) -> Table:
    """Return a table of ranks, a row per kind of layer: the same path in every block.

    With each kind stands its share of the loss that is predicted of all of them.
    """
    layers = list(layers)
    whole = sum_or_none(x.predicted_loss for x in layers)
    shared, kinds = by_layer_type(layers)
    table = plain_table(title + (f"; layers of {shared}" if shared else ""))
    table.add_column("layer", no_wrap=True)
    sparse = any(x.rows is not None for members in kinds.values() for x in members)
    known = any(x.error or x.predicted_loss is not None for x in layers)  # not of a plan
    found = ("rows", "kept") if sparse else ("kept", *(("error", "share of loss") if known else ()))
    products = any(x.first is not None for members in kinds.values() for x in members)
    terms = ("first", "terms") if products else ("rank",)
    narrow = any(x.narrow is not None for members in kinds.values() for x in members)
    terms = (*terms, "narrowed to") if narrow else terms
    for heading in ("layers", "left dense", "out×in", *terms, *found):
        table.add_column(heading, justify="right", no_wrap=heading != "left dense")
    for kind, members in kinds.items():
        error = sum_or_none(x.error for x in members)
        figures = [
            "" if error is None else share(error / len(members)),
            _share_of(sum_or_none(x.predicted_loss for x in members), whole),
        ]
        table.add_row(
            kind,
            str(len(members)),
            str(sum(x.dense for x in members) or ""),
            f"{members[0].out_features}×{members[0].in_features}",
            *([_firsts(members)] if products else []),
            _span(x.rank for x in members),
            *([_span(x.narrow and x.narrow[0] for x in members)] if narrow else []),
            *([_span(x.rows for x in members)] if sparse else []),
            share(sum(x.after for x in members) / sum(x.before for x in members)),
            *(figures if known and not sparse else []),
        )
    return table


def plain_table(title: str) -> Table:
    """Return an empty table, in the style of all of them."""
    return Table(
        title=title,
        min_width=len(title),  # a title wraps where its table ends
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def plan_table(
    layers: Sequence[LayerRecord],
    title: str,
    whole: int,
    nbytes: int,
    notes: Iterable[str],
    beside: int = 0,
) -> RenderableType:
    """Return a table of planned ranks and sizes, for a model of ``whole`` parameters.

    It has ``beside`` more parameters than by these layers' own sizes: below 0, where others go.
    """
    dense, after = sum(x.before for x in layers), sum(x.after for x in layers)
    before = sum(x.start for x in layers)
    smaller = whole - before + after + beside
    of = "" if before == dense else f" of {dense:,} in dense ones"
    lines = [
        f"targeted layers: {before:,} → {after:,} parameters ({after / dense:.3f}{of})",
        f"whole model: {whole:,} → {smaller:,} ({smaller / whole:.3f})",
        f"statistics: at most {nbytes / 2**20:.1f} MiB",
        *notes,
    ]
    return Group(ranks_table(layers, title), Text("\n".join(lines)))


def loss_curves_table(found: Sequence[PredictedLoss], title: str) -> RenderableType:
    """Return a table of the predicted loss, or else error, of each method at each ``keep``."""
    methods = list(dict.fromkeys(one.method for one in found))
    known = {(one.method, one.keep): one for one in found}

    def say(one: PredictedLoss) -> str:
        return (
            share(one.error)
            if one.predicted_loss is None and one.error
            else change(one.predicted_loss)
        )

    rows = [
        (f"{keep:g}", [say(known[method, keep]) for method in methods])
        for keep in dict.fromkeys(one.keep for one in found)
    ]
    table = columns_table(f"lrcompress: what is lost at each keep, {title}", methods, rows)
    note = (
        "with a sign: predicted change of the loss; without: the layers' mean error in a metric "
        "that does not know the loss"
    )
    return Group(table, Text(note))


def measured_curve_table(found: Sequence[MeasuredKeep], title: str) -> RenderableType:
    """Return a table of what validation gives at each ``keep``; the first is the whole model.

    Of several methods those of one ``keep`` stand below each other.
    """
    dense = found[0]
    methods = list(dict.fromkeys(one.method for one in found))
    names = list(dict.fromkeys(name for one in found for name in one.figures))
    rows = [
        (
            f"{one.keep:g}",
            [
                *([one.method if one.keep < 1 else ""] if len(methods) > 1 else []),
                *(count(one.parameters), share(one.kept)),
                *(number(one.figures.get(name)) for name in names),
                change(one.predicted_loss),
                f"{one.seconds / dense.seconds:.2f} ×",
            ],
        )
        for one in sorted(found, key=lambda one: -one.keep)
    ]
    headings = ["parameters", "kept of targeted", *names, "predicted", "time of a validation"]
    headings = [*(["method"] if len(methods) > 1 else []), *headings]
    table = columns_table(f"lrcompress: measured without retraining, {title}", headings, rows)
    note = (
        "keep 1 is the model as it is; training after a point brings part of the loss back. "
        "Write the one you choose into the recipe, under the callback's init_args:  keep: 0.5"
        + (f", method: {methods[-1]}" if len(methods) > 1 else "")
    )
    return Group(table, Text(note))


def point_table(point: PointRecord, whole: int | None = None) -> RenderableType:
    """Return a table of what one point did, by kind of layer, with totals.

    The model had ``whole`` parameters before the first change of the run; None where that is this.
    """
    where = "" if point.step is None else f" at step {point.step}"
    table = ranks_table(point.layers, f"lrcompress: {point.method}{where}, {point.seconds:.1f} s")
    lines = [
        f"targeted layers keep {share(point.keep)}, the whole model "
        f"{share(point.model_after / (whole or point.model_before))} of its parameters"
    ]
    if any(layer.entries is not None for layer in point.layers):
        stored = sum(x.stored for x in point.layers) / sum(x.before for x in point.layers)
        lines[0] += f"; zeros are stored, with them the layers take {share(stored)}"
    if point.trained is not None and point.effective is not None:
        lines.append(
            f"parameters: {point.trained:,} trained, {point.model_after:,} stored, "
            f"{point.effective:,} not zero"
        )
    if point.observed.get("steps"):
        lines.append(
            f"statistics of {point.observed['tokens']:,} tokens in {point.observed['steps']} steps"
            + (f", {point.observed['skipped']} skipped" if point.observed.get("skipped") else "")
            + f", {point.observed['bytes'] / 2**20:.0f} MiB"
        )
    lines += [point.note] if point.note else []
    lines += _notes(point.layers)
    return Group(*_trials(point), table, Text("\n".join(lines)))


def _notes(layers: Iterable[LayerRecord]) -> list[str]:
    """Return what is to be said of layers; once where it is the same in several blocks."""
    said: dict[str, list[str]] = {}
    for layer in layers:
        if layer.note:
            line = f"{layer.name}: {layer.note}"
            said.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", line), []).append(line)
    alike = {line: held for line, held in said.items() if held[1:]}
    return [f"{x} ({len(alike[x])} layers)" if x in alike else said[x][0] for x in said]


def _trials(point: PointRecord) -> list[RenderableType]:
    found = trials(point)
    if found is None:
        return []
    title = f"lrcompress: {len(found.rows)} trials to find keep"
    return [columns_table(title, found.headings, found.rows), Text("\n".join(found.notes))]


def summary_table(report: Report) -> RenderableType:
    """Return a table of figures before, after each point, and at the end."""
    found = summary(report)
    table = columns_table("lrcompress: what was lost and gained", found.headings, found.rows)
    return Group(table, *(Text(note) for note in found.notes))


def columns_table(
    title: str, headings: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]
) -> Table:
    """Return a table of texts, in each row a label and a cell for every column."""
    table = plain_table(title)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def _share_of(part: float | None, whole: float | None) -> str:
    return share(part / whole) if part is not None and whole else ""


def _firsts(layers: Iterable[LayerRecord]) -> str:
    shapes = sorted({x.first for x in layers if x.first is not None})
    return ", ".join(f"{rows}×{columns}" for rows, columns in shapes)


def _span(sizes: Iterable[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    if not known:
        return ""
    return f"{min(known)}" if min(known) == max(known) else f"{min(known)}–{max(known)}"
