"""Headline of a report: what a run gained and lost, in ratios, of the whole model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lrcompress.report.formatting import count, mebibytes, number
from lrcompress.report.record import Report
from lrcompress.report.summary import final_figures

# Data sets of torch and Python, whose names say nothing of the data.
_CONTAINERS = {"list", "tuple", "Dataset", "TensorDataset", "Subset", "ConcatDataset"}
_SHOWN = 4  # validation figures, of a run that has many


@dataclass(frozen=True)
class Fact:
    """One line of the headline.

    Attributes:
        figure: the ratio or the pair of values that stands out.
        what: what it is of, in words.
        detail: the figures behind it, or "".
    """

    figure: str
    what: str
    detail: str = ""


def headline(report: Report) -> list[Fact]:
    """Return the facts of a run with at least one point, sizes first.

    Sizes are those of the whole model before the first change and now, times those of a training
    step, validation figures those just before the first point and at the end.
    """
    first, last = report.points[0], report.points[-1]
    now = report.layers_after(len(report.points))
    was, is_now = sum(x.start for x in now), sum(x.after for x in now)
    facts = [
        Fact(
            _percent(last.model_after, first.model_before),
            "parameters of the whole model",
            f"{count(first.model_before)} → {count(last.model_after)}",
        ),
        Fact(
            _percent(is_now, was),
            f"parameters of the {len(now)} targeted layers",
            f"{count(was)} → {count(is_now)}",
        ),
    ]
    if first.bytes_before is not None:
        pair = mebibytes(first.bytes_before), mebibytes(last.bytes_after)
        facts.insert(1, Fact("{} → {}".format(*pair), "MiB of memory for the weights"))
    dense, factored = (report.seconds_per_step.get(phase) for phase in ("dense", "factored"))
    if dense and factored:
        times = (dense / factored, "faster") if factored <= dense else (factored / dense, "slower")
        facts.append(
            Fact(
                "{:.2f} × {}".format(*times),
                "a training step",
                f"{number(dense)} → {number(factored)} s" + " of CPU time" * report.cpu_seconds,
            )
        )
    before, (when, end) = first.metrics.get("before", {}), final_figures(report)
    both = [name for name in end if name in before]
    for name in both[:_SHOWN]:
        pair = number(before[name]), number(end[name])
        facts.append(Fact("{} → {}".format(*pair), name, f"before, after less training → {when}"))
    return facts


def name_of_run(about: Mapping[str, str]) -> str:
    """Return model and data of a run in a few words, or "" where neither is known.

    Args:
        about: what was run; model and data as ``class: source``, or the class alone.

    Example:
        >>> name_of_run({"model": "Fine: BertModel, /models/bert", "data": "TextData: sst2"})
        'models/bert on sst2'
        >>> name_of_run({"model": "Tagger", "data": "TensorDataset"})
        'Tagger'
    """
    names = []
    for what in ("model", "data"):
        kind, _, source = about.get(what, "").partition(": ")
        if what == "model":  # the name of its folder, or else the class within
            source = source.partition(", ")[2] or source
        parts = [_end_of_path(part) for part in source.split(", ")]
        names.append(", ".join(filter(None, parts)) or ("" if kind in _CONTAINERS else kind))
    return " on ".join(filter(None, names))


def _end_of_path(name: str) -> str:
    """Return the last two parts of a path; a name on the hub has no more."""
    return "/".join([part for part in re.split(r"[/\\]", name) if part][-2:])


def _percent(now: int, before: int) -> str:
    """Return a change as a signed share.

    Example:
        >>> _percent(67, 100), _percent(100, 100), _percent(101, 100)
        ('−33 %', '±0 %', '+1 %')
    """
    change = round(100 * (now / before - 1)) if before else 0
    return "±0 %" if not change else f"{'−' if change < 0 else '+'}{abs(change)} %"
