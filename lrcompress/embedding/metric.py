"""The metric of an embedding: weights of its rows, and of its columns for a tied head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.embedding.settings import EmbeddingSettings, EmbeddingTable
from lrcompress.errors import NotFiniteError, ObservationError
from lrcompress.linalg import double, shrunk
from lrcompress.solvers.embedding import truncate_embedding
from lrcompress.solvers.truncation import Factors
from lrcompress.statistics.moments import Statistics


@dataclass(frozen=True)
class Metric:
    """The metric in which the error of a table is measured.

    Attributes:
        rows: ``(vocabulary,)`` float64 weights, or None for all alike.
        columns: ``(width, width)`` float64, or None for the identity.
        note: what was done about statistics that could not be used as they were, or "".
    """

    rows: Tensor | None
    columns: Tensor | None
    note: str


def metric_of(table: EmbeddingTable, statistics: Statistics, settings: EmbeddingSettings) -> Metric:
    """Return the metric of ``table``, from statistics of all embeddings that hold it.

    The weight of a row is how often it was read, or the sum of its tokens' squared gradients.
    ``floor`` of the mean weight is mixed in, so that rows of tokens that were never read, special
    ones among them, are projected like others. Columns are weighted by the second moment ``H`` of
    the inputs of tied heads, for the head, and all alike for the embedding, mixed by
    ``head_share``.

    Raises:
        ObservationError: if no embedding of the table was ever called.
        NotFiniteError: if a statistic holds a NaN or an infinity.
    """
    notes: list[str] = []
    rows: Tensor | None = None
    if settings.weighting != "none":
        read = [statistics.inputs[x].values for x in table.embeddings if x in statistics.inputs]
        if not read:
            raise ObservationError(
                f"embedding {table.name!r} was never read in {statistics.steps} observed steps; "
                "leave it out with exclude=, or observe steps that use it"
            )
        counts = double(torch.stack([one["token_count"] for one in read]).sum(0))
        if table.padding is not None:
            counts[table.padding] = 0
        rows = counts
        if settings.weighting == "fisher":
            sums = [statistics.outputs[x] for x in table.embeddings if x in statistics.outputs]
            fisher = sum((double(one.values["token_fisher"]) for one in sums), 0 * counts)
            rows = fisher if fisher.any() else counts
            if not fisher.any():
                notes.append("no gradient reached it: rows count by frequency")
        notes.append(f"{int((counts == 0).sum()):,} of {len(counts):,} rows were never read")
        if not rows.isfinite().all():
            raise NotFiniteError(f"row weights of {table.name!r} hold a NaN or an infinity")
        rows = shrunk(rows, settings.floor)
    return Metric(rows, _columns(table, statistics, settings, notes), "; ".join(notes))


def _columns(
    table: EmbeddingTable, statistics: Statistics, settings: EmbeddingSettings, notes: list[str]
) -> Tensor | None:
    if "input_moment" not in settings.kinds or not table.heads:
        return None
    seen = [x for x in table.heads if statistics.source.get(x, x) in statistics.inputs]
    if not seen:
        notes.append("its head was never called: it does not count")
        return None
    moments = [double(statistics.of(x, ["input_moment"]).moment("input_moment")) for x in seen]
    moment = torch.stack(moments).sum(0)
    if not moment.isfinite().all():
        raise NotFiniteError(f"input_moment of head {seen[0]!r} holds a NaN or an infinity")
    return shrunk(moment, 1 - settings.head_share)


@torch.no_grad()
def solve(weight: Tensor, method: str, rank: int, metric: Metric) -> Factors:
    """Return the best factors of a table in a metric: the narrow table, and what widens it.

    Args:
        weight: ``(vocabulary, width)``.
        method: a key of :data:`METHODS`.
        rank: width of the narrow table.
        metric: in which the error is measured.

    Returns:
        ``left (vocabulary, rank)`` and ``right (rank, width)``, for ``kronecker`` ``(1, block)``.
    """
    if method != "kronecker":
        return truncate_embedding(weight, metric.rows, metric.columns).factors(rank)
    block = weight.shape[1] // rank
    rows = None if metric.rows is None else metric.rows.repeat_interleave(rank)
    found = truncate_embedding(weight.reshape(-1, block), rows).factors(1)
    return Factors(found.left.view(-1, rank), found.right, found.error, found.lost)
