"""Effective sizes of a model as after its DSEE updates are merged, in total and by layer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrcompress.nn import LowRankUpdateLinear, Replacement
from lrcompress.pruning.heads import Attention, remaining
from lrcompress.report.record import LayerRecord, PointRecord
from lrcompress.statistics.views import view
from lrcompress.structure.parameter_counts import sizes_before, stored_bytes

Sides = Mapping[str, tuple[int, int]]


def trained_size(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def update_size(model: nn.Module, names: Collection[str], rank: int, entries: int) -> int:
    """Return the number of parameters that updates of these layers would have."""
    shapes = [view(model.get_submodule(name)).shape for name in names]
    return sum(rank * sum(shape) + entries for shape in shapes)


@torch.no_grad()
def effective_size(model: nn.Module) -> int:
    """Return the number of parameters that are not zero, each update counted as merged."""
    updated = [layer for layer in model.modules() if isinstance(layer, LowRankUpdateLinear)]
    inside = {id(p) for layer in updated for p in layer.factors}
    total = sum(int(layer.weight.count_nonzero()) for layer in updated)
    return total + sum(int(p.count_nonzero()) for p in model.parameters() if id(p) not in inside)


def pruned_features(model: nn.Module, found: Collection[Attention]) -> Sides:
    """Return the rows and columns of the projections after silenced heads are removed."""
    return _sides(model, {one: one.head_size * int(remaining(model, one).sum()) for one in found})


def _sides(model: nn.Module, features: Mapping[Attention, int]) -> Sides:
    sides = {}
    for one, left in features.items():
        for name in one.names:
            rows, columns = view(model.get_submodule(name)).shape
            sides[name] = (rows, left) if name == one.output else (left, columns)
    return sides


@torch.no_grad()
def records(
    model: nn.Module, names: Sequence[str], sides: Sides | None = None
) -> list[LayerRecord]:
    """Return the records of layers for the report, as if their updates were merged.

    Args:
        model: that holds them.
        names: of the layers.
        sides: rows and columns of those that will lose some.
    """
    found = []
    for name in names:
        layer = model.get_submodule(name)
        seen = view(layer)
        own = layer.sizes if isinstance(layer, Replacement) else None
        shape = (own["out"], own["in"]) if own else seen.shape
        rows, columns = (sides or {}).get(name, seen.shape)
        left = min(int(seen.weight.count_nonzero()), rows * columns)
        dense = LayerRecord(name, *shape, rank=None, error=0.0, predicted_loss=None)
        found.append(dense if left == dense.before else _left(dense, rows, columns, left))
    return found


def pruning_record(
    method: str,
    step: int,
    model: nn.Module,
    names: Sequence[str],
    found: Collection[Attention],
    merge: bool,
) -> PointRecord:
    """Return the record of a pruning for the report, while updates are still trained.

    Args:
        method: for the record.
        step: likewise.
        model: pruned.
        names: of the pruned layers.
        found: the attention modules whose heads were pruned.
        merge: count what will be stored after merging; else what is stored now.
    """
    layers = records(model, names, pruned_features(model, found) if merge else None)
    weights = [view(model.get_submodule(name)).weight for name in names]
    biases = _lost_biases(model, found) if merge else []
    seen = sum(int(x.count_nonzero()) for x in (*weights, *biases))
    before, bytes_before = sizes_before(model, LowRankUpdateLinear)
    after, bytes_after = sum(p.numel() for p in model.parameters()), stored_bytes(model)
    if merge:
        gone = [x.before - x.stored for x in layers]
        after = before - sum(gone) - sum(x.numel() for x in biases)
        bytes_after = bytes_before - sum(x.nbytes for x in biases)
        bytes_after -= sum(n * x.element_size() for n, x in zip(gone, weights, strict=True))
    return PointRecord(
        method,
        step,
        layers,
        before,
        after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        trained=trained_size(model),
        effective=effective_size(model) - seen + sum(x.after for x in layers),
    )


def _lost_biases(model: nn.Module, found: Collection[Attention]) -> list[Tensor]:
    """Return the parts of biases that go with silenced heads when these are removed."""
    return [
        bias[~one.features(remaining(model, one))]
        for one in found
        for name in one.inputs
        if (bias := view(model.get_submodule(name)).bias) is not None
    ]


def recount_(record: PointRecord, model: nn.Module) -> None:
    """Update the figures of a record to the layers and the model as they are now."""
    record.layers = records(model, [layer.name for layer in record.layers])
    record.model_after = sum(p.numel() for p in model.parameters())
    record.bytes_after, record.effective = stored_bytes(model), effective_size(model)


def bias_size(model: nn.Module, keep: float, found: Collection[Attention]) -> int:
    """Return how many entries of biases go if every attention keeps the same share of heads."""
    gone = [(one, one.head_size * (one.heads - _heads_left(one, keep))) for one in found]
    return sum(
        features
        for one, features in gone
        for name in one.inputs
        if view(model.get_submodule(name)).bias is not None
    )


def _heads_left(one: Attention, keep: float) -> int:
    return max(1, round(keep * one.heads))


def preview(
    model: nn.Module, names: Sequence[str], keep: float, found: Collection[Attention] = ()
) -> list[LayerRecord]:
    """Return the records of layers if every layer, or attention, kept the same share.

    Args:
        model: not pruned yet.
        names: of the layers.
        keep: of their entries, or of their heads.
        found: the attention modules whose heads are pruned; none where entries are.
    """
    left = {one: one.head_size * _heads_left(one, keep) for one in found}
    sides = _sides(model, left)
    result = []
    for name in names:
        shape = view(model.get_submodule(name)).shape
        dense = LayerRecord(name, *shape, rank=None, error=0.0, predicted_loss=None)
        rows, columns = sides.get(name, shape)
        kept = rows * columns if found else round(keep * dense.before)
        result.append(dense if kept == dense.before else _left(dense, rows, columns, kept))
    return result


def _left(dense: LayerRecord, rows: int, columns: int, entries: int) -> LayerRecord:
    return replace(
        dense,
        rank=0,
        error=None,
        rows=rows,
        parameters=rows * columns,
        entries=None if entries == rows * columns else entries,
    )
