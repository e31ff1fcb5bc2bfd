"""The model card of an exported folder."""

from collections import Counter

from transformers import PreTrainedModel

from lrcompress.report import PointRecord, Report
from lrcompress.report.summary import final_figures
from lrcompress.structure.parameter_counts import dense_size
from lrcompress.structure.plan import Plan


def model_card(model: PreTrainedModel, plan: Plan, report: Report | None) -> str:
    """Return ``README.md``: what was done, what it cost, and how to load the model."""
    before, after = dense_size(model), sum(p.numel() for p in model.parameters())
    kind = type(model).__name__
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- lrcompress",
        "- low-rank",
        "---",
        "",
        f"# {kind}, {len(plan)} of its layers {_forms(plan)}",
        "",
        f"{after:,} of {before:,} parameters remain ({after / before:.3f}).",
        "",
        *_figures(report),
        "## Loading it",
        "",
        "With the Python package `lrcompress` installed:",
        "",
        "```python",
        "import lrcompress",
        "",
        'model = lrcompress.load_pretrained("FOLDER")',
        "```",
        "",
        "or, here and from the hub, with `transformers` itself:",
        "",
        "```python",
        "import lrcompress.export  # from_pretrained knows the layers after it",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        "```",
        "",
        "Without the import loading ends in an error about sizes of weights. All parameters can be",
        "trained on. `lrcompress.merge_dense(model)` gives an ordinary model of full size for",
        "tools that know nothing of factors.",
        "",
    ]
    return "\n".join(lines)


def _forms(plan: Plan) -> str:
    """Return in what form layers are: ``in low-rank form``, or the kinds and how many of each."""
    kinds = Counter(layer.kind for layer in plan)
    if set(kinds) <= {"low_rank"}:
        return "in low-rank form"
    if set(kinds) <= {"pivoted"}:
        return "in low-rank form, as pivoted rows"
    return "replaced: " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items())


def _figures(report: Report | None) -> list[str]:
    if report is None or not report.points:
        return []
    last = report.points[-1]
    methods = dict.fromkeys(point.method for point in report.points)
    return [
        "## What was done",
        "",
        f"Method {', '.join(f'`{name}`' for name in methods)}. The {len(last.layers)} targeted "
        f"layers keep {last.keep:.3f} of their parameters, the whole model "
        f"{last.model_after / report.points[0].model_before:.3f}.",
        "",
        *_table(report, last),
    ]


def _table(report: Report, last: PointRecord) -> list[str]:
    first = report.points[0]
    before, after = first.metrics.get("before", {}), last.metrics.get("after", {})
    when, end = final_figures(report)
    names = list(dict.fromkeys([*before, *after, *end]))
    if not names:
        return []
    rows = [
        f"| {name} | {_figure(before, name)} | {_figure(after, name)} | {_figure(end, name)} |"
        for name in names
    ]
    when = when.replace("at ", "at step ") if end and not report.final else when
    head = [f"| | before | just after compression | {when} |", "|---|---|---|---|"]
    return [*head, *rows, ""]


def _figure(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.4f}" if name in figures else ""
