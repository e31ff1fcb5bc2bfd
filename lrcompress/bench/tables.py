"""Terminal tables of a benchmark."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrcompress.bench.decoding import Decoding
from lrcompress.bench.models import BenchModel
from lrcompress.bench.record import LayerTime, Run
from lrcompress.report.tables import plain_table

_MANY = 6  # names in one warning


def bench_table(
    subjects: Sequence[BenchModel], runs: Sequence[Run] | Sequence[Decoding], title: str
) -> RenderableType:
    """Return tables of sizes, of runs and of layers, with a warning about slower layers."""
    head: list[RenderableType] = [Text(title, style="bold"), _sizes(subjects)]
    decodings = [run for run in runs if isinstance(run, Decoding)]
    if decodings:
        return Group(*head, _decodings(decodings))
    calls = [run for run in runs if isinstance(run, Run)]
    layers = [_layers(calls)] if any(run.layers for run in calls) else []
    warnings = [Text(line, style="yellow") for run in calls for line in _slower(run)]
    return Group(*head, _runs(calls), *layers, *warnings)


def text_table(texts: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """Return what each model makes of each prompt, side by side.

    Args:
        texts: prompt to the name of a model to its text.
    """
    table = plain_table("the likeliest text after each prompt")
    names = dict.fromkeys(name for one in texts.values() for name in one)
    for heading in ("prompt", *names):
        table.add_column(Text(heading), overflow="fold")
    for prompt, found in texts.items():
        table.add_row(Text(prompt), *(Text(found[name]) for name in names))
        table.add_section()
    return table


def _sizes(subjects: Sequence[BenchModel]) -> Table:
    table = plain_table("")
    table.add_column("model", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("file MiB", justify="right")
    for one in {one.name: one for one in subjects}.values():
        count = "" if one.parameters is None else f"{one.parameters:,}"
        table.add_row(one.name, count, f"{one.stored_bytes / 2**20:.1f}")
    return table


def _runs(runs: Iterable[Run]) -> Table:
    table = plain_table("median and 95th percentile of a call; × faster than the last, and ideally")
    for heading in ("", "batch×length", "model"):
        table.add_column(heading, no_wrap=True)
    figures = ("ms", "p95", "per s", "peak MiB", "GFLOPs", "×", "ideal", "share")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        gained = [_two(run.faster), _two(run.ideal), _two(run.share_of_ideal)]
        where = [f"{run.device} {run.mode}", f"{run.batch}×{run.length}"]
        for name, speed in run.speeds.items():
            table.add_row(
                *where,
                name,
                f"{1e3 * speed.median:.1f}",
                f"{1e3 * speed.p95:.1f}",
                f"{speed.throughput:.1f}",
                "" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**20:.0f}",
                "" if speed.flops is None else f"{speed.flops / 1e9:.2f}",
                *gained,
            )
            where, gained = ["", ""], ["", "", ""]
    return table


def _decodings(runs: Iterable[Decoding]) -> Table:
    table = plain_table(
        "tokens after the first, of all rows together (float32 on a CPU: in decoding_layout_); "
        "× faster than the last, and as the bytes of parameters read promise"
    )
    for heading in ("", "rows×prompt", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("first ms", "per s", "peak MiB", "×", "promised", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        gained = [_two(run.faster), _two(run.promised), _two(run.share_of_promised)]
        where = [run.device, f"{run.batch}×{run.length}"]
        for name, one in run.models.items():
            figures = (1e3 * statistics.median(one.first), one.tokens_per_second)
            peak = f"{one.peak_bytes / 2**20:.0f}"
            table.add_row(*where, name, *(f"{x:.1f}" for x in figures), peak, *gained)
            where, gained = ["", ""], ["", "", ""]
    return table


def _layers(runs: Iterable[Run]) -> Table:
    table = plain_table("factored layers: × faster than plain (ideally)")
    table.add_column("out×in", no_wrap=True)
    for heading in ("n", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        if not run.layers:
            continue
        table.add_column(f"{run.device} {run.mode} {run.batch}×{run.length}", justify="right")
        kinds: dict[tuple[int, int], list[LayerTime]] = {}
        for layer in run.layers:
            kinds.setdefault((layer.out_features, layer.in_features), []).append(layer)
        for (out_features, in_features), members in kinds.items():
            ranks = sorted({layer.rank for layer in members})
            span = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
            plain, factored = (sum(getattr(x, y) for x in members) for y in ("plain", "factored"))
            keep = sum(layer.keep for layer in members) / len(members)
            row = rows.setdefault(
                (out_features, in_features),
                [f"{out_features}×{in_features}", str(len(members)), span],
            )
            row.append(f"{plain / factored:.2f} ({1 / keep:.2f})")
    for row in rows.values():
        table.add_row(*row)
    return table


def _slower(run: Run) -> list[str]:
    found = sorted(run.slower, key=lambda layer: -layer.ratio)
    named = [f"{layer.name} (rank {layer.rank}) {layer.ratio:.2f} ×" for layer in found[:_MANY]]
    if len(found) > _MANY:
        named.append(f"and {len(found) - _MANY} more")
    if not named:
        return []
    where = f"on {run.device}, {run.batch}×{run.length}"
    return [
        f"warning: {len(found)} of {len(run.layers)} factored layers take longer than plain ones "
        f"{where}: {', '.join(named)}"
    ]


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
