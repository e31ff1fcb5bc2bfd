"""Low-rank truncation of an embedding with weighted rows, without a decomposition of its size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.linalg import add_gram_, balanced, double, eigh, packed_shape, symmetric
from lrcompress.solvers.truncation import Factors, relative_error

_ROWS = 8192  # that are in float64 at a time
_FLOOR = 1e-10  # the least eigenvalue of a column metric, of the largest, as it is inverted


@dataclass(frozen=True)
class EmbeddingTruncation:
    """Every truncation of one table: its error curve, and factors at any rank.

    Attributes:
        energies: ``(min(vocabulary, width),)`` float64, descending: what a truncation to ``r``
            loses is ``energies[r:].sum()``.
    """

    energies: Tensor
    _table: Tensor
    _basis: Tensor  # (width, ranks): the table times it is the left factor
    _back: Tensor  # (ranks, width): the right factor

    def factors(self, rank: int) -> Factors:
        """Return the best factors of that rank, balanced, in the table's own dtype.

        Raises:
            SettingError: if ``rank`` is below 1 or above ``min(vocabulary, width)``.
        """
        most = len(self.energies)
        if not 1 <= rank <= most:
            raise SettingError(
                f"rank must be from 1 to {most} for a table of shape "
                f"{tuple(self._table.shape)}, got {rank}"
            )
        left = torch.empty(
            len(self._table), rank, dtype=self._table.dtype, device=self._basis.device
        )
        for rows, part in _parts(self._table):
            left[rows] = (part @ self._basis[:, :rank]).to(left)
        left, right = (x.to(self._table) for x in balanced(left, self._back[:rank].to(left)))
        error, lost = relative_error(self.energies, rank), float(self.energies[rank:].sum())
        return Factors(left.contiguous(), right.contiguous(), error, lost)


@torch.no_grad()
def truncate_embedding(
    table: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> EmbeddingTruncation:
    """Return all truncations of an embedding that are optimal for its rows' weights.

    Minimises ``‖D^½ (E − M) H^½‖²`` over tables ``M`` of rank ``r``, for every ``r`` at once, with
    ``D = diag(rows)`` and ``H = columns``. With ``H = Q Qᵀ``, ``S = Eᵀ D E`` and ``V`` the leading
    eigenvectors of ``Qᵀ S Q``, the minimum is at ``M = E Q V Vᵀ Q⁻¹``: without ``H`` the
    projection ``E V Vᵀ``. It is the same problem as :func:`~lrcompress.solvers.truncation.truncate`
    solves, for a matrix so tall that nothing else of its size should be made.

    Args:
        table: ``(vocabulary, width)``, any floating dtype; the solve runs in float64.
        rows: ``(vocabulary,)`` weights, not negative; None counts all alike, as zeros do. Their
            scale does not change the factors.
        columns: ``(width, width)`` symmetric; None is the identity.

    Raises:
        ShapeError: if the arguments do not fit together.
        NotFiniteError: if one of them holds a NaN or an infinity.
        SettingError: if a weight is negative.

    Cost:
        ``O(vocabulary·width²)`` operations for ``S``, an eigendecomposition of ``width``; beside
        the factors memory for ``width²`` and some thousand rows.

    Source:
        Lan et al., "ALBERT", ICLR 2020, for the form; Eckart & Young (1936) for the optimum.

    Example:
        >>> table = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # the row that is read more is kept
        >>> truncate_embedding(table, rows=torch.tensor([1.0, 9.0])).factors(1).right.abs().round()
        tensor([[0., 1.]])
    """
    _check(table, rows, columns)
    weights = None if rows is None or not rows.any() else double(rows) / double(rows).max()
    width = table.shape[1]
    sums = double(table[:0].detach()).new_zeros(packed_shape(width))
    for place, part in _parts(table):
        add_gram_(sums, part if weights is None else weights[place, None].to(part).sqrt() * part)
    moment = symmetric(sums)
    root, back = _root(columns, moment)
    energies, basis = eigh(root.mT @ moment @ root)
    basis = basis.flip(1)
    energies = energies.flip(0).clamp(min=0)[: min(table.shape)]
    return EmbeddingTruncation(energies, table.detach(), root @ basis, basis.mT @ back)


def _parts(table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(table), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, double(table[rows].detach())


def _root(columns: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a root of the metric and its inverse."""
    if columns is None or not columns.any():
        one = torch.eye(len(like), dtype=like.dtype, device=like.device)
        return one, one
    energies, basis = eigh(columns.to(like))
    roots = energies.clamp(min=_FLOOR * float(energies[-1])).sqrt()
    return basis * roots, (basis / roots).mT


def _check(table: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    if table.ndim != 2:
        raise ShapeError(f"table must be (vocabulary, width), got shape {tuple(table.shape)}")
    vocabulary, width = table.shape
    for name, value, shape in (("rows", rows, (vocabulary,)), ("columns", columns, (width, width))):
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"{name} must be {shape} to match a table of shape {tuple(table.shape)}, "
                f"got shape {tuple(value.shape)}"
            )
    for name, value in (("table", table), ("rows", rows), ("columns", columns)):
        if value is not None and not value.sum().isfinite() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise NotFiniteError(f"{name} holds {bad} non-finite of {value.numel()} values")
    if rows is not None and bool((rows < 0).any()):
        raise SettingError(f"rows must not be negative, got {float(rows.min())}")
