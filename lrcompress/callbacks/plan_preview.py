"""Table of what a Factorize callback would do to a model."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import RenderableType
from torch import nn

from lrcompress.engine.compress import preview
from lrcompress.engine.settings import Settings
from lrcompress.report.tables import plan_table

_SHOWN = 0.5  # keep, where it is chosen at the point


def plan_preview(
    model: nn.Module,
    settings: Settings,
    place: str,
    placed: Sequence[str],
    footprint: Sequence[str],
    *,
    searched: bool = False,
) -> RenderableType:
    """Return what the first point would do to ``model``, as a table; nothing is changed.

    Args:
        model: whose layers ``settings`` choose.
        settings: of the first point.
        place: of the first point, in words.
        placed: the steps of the points, in words, as far as they are known.
        footprint: lines on memory.
        searched: whether ``keep`` is chosen at the point.

    Raises:
        NoMatchError: if a pattern matches no layer.
        LayerError: if a targeted layer cannot be factored.
        SettingError: if ``keep`` cannot be met.
        ShapeError: if ``shapes`` do not divide a layer.
    """
    timed = settings.latency is not None and settings.keep is None
    shown = replace(settings, keep=_SHOWN) if searched or timed else settings
    records, selection, nbytes = preview(model, shown)
    keep = "auto" if searched else settings.keep
    size = f"latency {settings.latency:g}" if timed else f"keep {keep}"
    title = f"Factorize: {settings.method}, {size}, at {place}"
    notes = [f"left alone: {name}: {why}" for name, why in selection.left_alone.items()]
    if searched:
        notes.append(f"keep is chosen at the point, by validation; ranks are shown for {_SHOWN:g}")
    if timed:
        notes.append(f"ranks are shown for keep {_SHOWN:g}; measured at the point")
    elif settings.latency is not None:
        notes.append(f"less where that takes more than {settings.latency:g} of the model's time")
    if settings.spread == "global":
        notes.append("ranks are shown uniform; global allocation shares them out at the point")
    notes += placed
    if settings.method == "kronecker":
        notes.append("shapes are those that the weights alone would get; measured at the point")
    if settings.narrow_blocks:
        notes.append(
            "feed-forward blocks are found in the first step that is looked at; at the point "
            "those are narrowed for which that is predicted to lose less than ranks"
        )
    if settings.keep_measured:
        notes.append("layers that are not faster with factors stay; measured at the point")
    notes += footprint
    whole = sum(p.numel() for p in model.parameters())
    return plan_table(records, title, whole, nbytes, notes)
