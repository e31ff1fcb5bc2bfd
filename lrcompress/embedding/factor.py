"""Replace embeddings, with their tied output heads and the optimizer state."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.embedding.metric import metric_of, solve
from lrcompress.embedding.settings import METHODS, EmbeddingSettings, EmbeddingTable, parameters_of
from lrcompress.engine.distributed_solve import broadcast_layers_ as broadcast_
from lrcompress.errors import LayerError, naming_layer
from lrcompress.linalg import noted_retries
from lrcompress.nn import (
    FactoredEmbedding,
    KroneckerEmbedding,
    LowRankEmbedding,
    LowRankLinear,
    SafeEmbedding,
)
from lrcompress.report.record import LayerRecord, PointRecord
from lrcompress.solvers.truncation import Factors
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view
from lrcompress.structure.parameter_counts import replaced_sizes, sizes_before, stored_bytes
from lrcompress.structure.surgery import (
    Carry,
    carry_dense,
    carry_factors,
    replace_,
    start_state_,
    swap_parameters_,
)
from lrcompress.structure.tied_weights import tie_factors_, update_tied_weights_keys_
from lrcompress.structure.transaction import all_or_nothing


def factor_tables_(
    model: nn.Module,
    statistics: Statistics,
    settings: EmbeddingSettings,
    *,
    optimizers: Iterable[Optimizer] = (),
    step: int | None = None,
    processes: Processes = ONE_PROCESS,
) -> PointRecord:
    """Factor the targeted embeddings of ``model``, and their tied heads, from statistics.

    Everything is decided and solved before the first is replaced: an error leaves the model as it
    was. Low-rank tables are factored again.

    Args:
        model: changed in place.
        statistics: of the kinds the settings need.
        settings: what to do.
        optimizers: whose parameters and state follow.
        step: for the record.
        processes: those that do the same with the same statistics. All solve; all end with the
            values of the first, bit for bit.

    Returns:
        What was done, table by table.

    Raises:
        NoMatchError: if a pattern matches no embedding, or there is no token embedding.
        LayerError: if a table cannot be factored, or not again, or its head cannot follow.
        SettingError: if no rank makes a table as small as it should be.
        ShapeError: if a given rank does not divide the width of Kronecker rows.
        ObservationError: if a table was never read while statistics were observed.
        NotFiniteError: if a statistic or a table holds a NaN or an infinity.
    """
    started = time.perf_counter()
    held = tuple(optimizers)
    tables = settings.tables(model)
    before, bytes_before = sizes_before(model)
    stood = replaced_sizes(model, [table.name for table in tables])
    found: dict[str, Factors] = {}
    records: list[LayerRecord] = []

    def work() -> None:
        for table in tables:
            _check_form(model, table.name)
            metric, rank = metric_of(table, statistics, settings), settings.rank_of(table)
            weight = view(model.get_submodule(table.name), table=True).weight
            with naming_layer(table.name), noted_retries() as retries:
                found[table.name] = solve(weight, settings.method, rank, metric)
            note = "; ".join(filter(None, (metric.note, *retries)))
            told = (found[table.name].error, note, stood.get(table.name))
            records.append(record_of(table, settings, *told))

    processes.run_on_all(work)
    touched = [name for table in tables for name in (*table.embeddings, *table.heads)]
    with all_or_nothing(model, touched, held):
        for table in tables:
            _put(model, table, found[table.name], settings, held)
        broadcast_(model, dict.fromkeys((x.name for x in tables), 0), held, processes)
    update_tied_weights_keys_(model)
    return PointRecord(
        f"{settings.method} embedding by {settings.weighting}",
        step,
        records,
        before,
        sum(p.numel() for p in model.parameters()),
        statistics.figures(),
        time.perf_counter() - started,
        bytes_before=bytes_before,
        bytes_after=stored_bytes(model),
    )


def record_of(
    table: EmbeddingTable,
    settings: EmbeddingSettings,
    error: float | None = None,
    note: str = "",
    stood: int | None = None,
) -> LayerRecord:
    """Return the record of a table for the report."""
    rank = settings.rank_of(table)
    notes = [note] if note else []
    if table.heads:
        names = ", ".join(table.heads)
        notes.append(
            f"{names} shares the factors"
            if settings.heads == "tied"
            else f"{names} keeps {math.prod(table.shape):,} parameters of its own"
        )
    parameters = parameters_of(METHODS[settings.method], table.shape, rank)
    told = None if settings.method == "low_rank" else parameters
    given = (table.name, *table.shape, rank, error, None, "; ".join(notes))
    return LayerRecord(*given, parameters=told, stood=stood)


def _check_form(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, FactoredEmbedding) and not isinstance(layer, LowRankEmbedding):
        raise LayerError(
            f"embedding {name!r} is a {type(layer).__name__} already, and only low-rank ones can "
            "be factored again; leave it out with exclude="
        )


@torch.no_grad()
def _put(
    model: nn.Module,
    table: EmbeddingTable,
    factors: Factors,
    settings: EmbeddingSettings,
    optimizers: Sequence[Optimizer],
) -> None:
    """Replace all layers that hold a table, and its parameters in the optimizers."""
    rank, kind = factors.left.shape[1], METHODS[settings.method]
    layer = model.get_submodule(table.name)
    old = view(layer, table=True).parameters
    new = kind.in_place_of(layer, rank)
    carry, coming = _set_(new, layer, factors)
    for name in table.embeddings:
        other = new if name == table.name else kind.in_place_of(model.get_submodule(name), rank)
        tie_factors_(other, new)
        replace_(model, name, other)
    for name in table.heads if settings.heads == "tied" else ():
        head = LowRankLinear.in_place_of(model.get_submodule(name), rank)
        tie_factors_(head, new)
        replace_(model, name, head)
    staying = any(parameter is old[-1] for parameter in model.parameters())
    parameters = [new.get_parameter(name) for name in coming]
    swap_parameters_(optimizers, old, parameters, carry, names=coming, staying=staying)
    for parameter in parameters[2:]:  # of a layer that is new: it starts afresh
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)
            start_state_(optimizer, [parameter])


def _set_(new: FactoredEmbedding, layer: nn.Module, factors: Factors) -> tuple[Carry, list[str]]:
    """Set the values of ``new``; return how optimizer state carries over, and to what."""
    left, right = factors.left, factors.right
    new.left.weight.copy_(left)
    if isinstance(new, KroneckerEmbedding):
        new.block.copy_(right)
        whole = carry_dense(left.reshape(-1, 1), right, False)

        def carry_blocks(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
            of_block, of_left = whole([state[0].reshape(-1, right.shape[1])], squared)
            return [of_block, of_left.view_as(left)]

        return _dense_state(carry_blocks), ["block", "left.weight"]
    dense = _dense_state(carry_dense(left, right, False))
    if isinstance(new, SafeEmbedding):
        new.lift.weight.copy_(right.mT)
        first = ["lift.weight", "left.weight"]
        names = [*first, *(name for name, _ in new.named_parameters() if name not in first)]

        def carry_lift(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
            of_right, of_left = dense(state, squared)
            fresh = [torch.zeros_like(new.get_parameter(name)) for name in names[2:]]
            return [of_right.mT, of_left, *fresh]

        return carry_lift, names
    assert isinstance(new, LowRankEmbedding)
    new.right.weight.copy_(right)
    if isinstance(layer, LowRankEmbedding):
        dense = carry_factors((layer.left.weight, layer.right.weight), (left, right))
    return dense, ["right.weight", "left.weight"]


def _dense_state(carry: Carry) -> Carry:
    """Return ``carry`` for state that may be sparse, as that of sparse gradients."""

    def densely(state: Sequence[Any], squared: bool) -> list[Tensor]:
        return carry([x.to_dense() if x.is_sparse else x for x in state], squared)

    return densely
