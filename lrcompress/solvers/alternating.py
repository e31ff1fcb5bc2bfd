"""Alternating minimization of two factors of a matrix, in metrics without a closed solution."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrcompress.linalg import pinv

Map = Callable[[Tensor], Tensor]

_SWEEPS = 4  # at most, of both factors in turn
_STEPS = 2  # of conjugate gradients, at most, for one factor: more is slower, and no better
_ENOUGH = 1e-2  # a sweep that lowers the squared error by no larger share is the last
_SEEN = 1e-12  # eigenvalues of normal equations below this share of the largest are zeros


def alternating_minimization(
    matrix: Tensor, x: Tensor, y: Tensor, product: Map
) -> tuple[Tensor, Tensor, float, float, int]:
    """Lower ``⟨R − XY, 𝓜(R − XY)⟩`` by one factor after the other, by conjugate gradients.

    Args:
        matrix: ``R``, ``(rows, columns)``.
        x: ``(rows, terms)`` to start from.
        y: ``(terms, columns)``.
        product: ``𝓜``, linear, symmetric and positive semidefinite.

    Returns:
        ``X``, ``Y``, the relative error, the absolute squared one and the number of sweeps.
    """
    whole = (matrix * product(matrix)).sum()
    rest = matrix - x @ y
    pull = product(rest)  # 𝓜(R − XY), half the gradient
    lost = (rest * pull).sum()
    sweeps = 0
    while sweeps < _SWEEPS and lost > 0:
        sweeps += 1
        # orthonormal on the side that stays, so that the other's quadratic is near the identity
        q, r = torch.linalg.qr(y.mT)
        x, y, pull, one = _improved(x @ r.mT, q.mT, pull, product)
        q, r = torch.linalg.qr(x)
        y, x, pull, two = _improved((r @ y).mT, q.mT, pull.mT, lambda z: product(z.mT).mT)
        x, y, pull = x.mT, y.mT, pull.mT
        lost = lost - one - two
        if one + two <= _ENOUGH * lost:
            break
    lost = lost.clamp(min=0)
    return x, y, float((lost / whole).sqrt()) if whole > 0 else 0.0, float(lost), sweeps


def _improved(
    x: Tensor, y: Tensor, pull: Tensor, product: Map
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``X`` improved by conjugate gradients, ``Y``, the new pull, and what was saved."""
    saved = pull.new_zeros(())
    residual = pull @ y.mT
    step, size = residual, residual.square().sum()
    first = size
    for _ in range(_STEPS):
        if not size > 0:
            break
        moved = product(step @ y)
        along = moved @ y.mT
        length = size / (step * along).sum()
        if not 0 < length < torch.inf:  # rounding can make of a zero less
            break
        x, pull, residual = x + length * step, pull - length * moved, residual - length * along
        saved = saved + length * size
        before, size = size, residual.square().sum()
        if size <= _ENOUGH * first:
            break
        step = residual + size / before * step
    return x, y, pull, saved


def alternating_least_squares(
    target: Tensor, metric: Tensor, exact: Tensor, other: Tensor, near: Tensor, root: Tensor
) -> tuple[Tensor, Tensor, float, float, int]:
    """Lower ``‖T − M‖²`` in a metric, ``M[i, (e, h)] = Σ_s X[i, e, s] Y[h, s]``, X exactly.

    With ``Y`` fixed the rows of ``X`` have one set of normal equations, of the size ``e·terms``,
    which are solved. With ``X`` fixed ``Y`` makes a step of steepest descent, preconditioned by
    the Kronecker product nearest to its own. The metric only ever meets ``Y``.

    Args:
        target: ``T``, ``(rows, e, h)``.
        metric: ``(e, h, e, h)``.
        exact: ``X``, ``(rows, e, terms)`` to start from.
        other: ``Y``, ``(h, terms)``.
        near: ``N``, ``(e, e)``, where the metric is nearly ``N ⊗ H``.
        root: ``(h, h)``, a root of the inverse of ``H``.

    Returns:
        ``X``, ``Y``, the relative error, the absolute squared one and the number of sweeps.

    Cost:
        ``2·rows·(e·h)²`` operations, and ``2·terms·(e·h)²`` a sweep.
    """
    (rows, e, terms), h = exact.shape, len(other)
    moved = target.reshape(rows, e * h) @ metric.reshape(e * h, e * h)
    whole = (moved * target.reshape(rows, e * h)).sum()
    moved = moved.view(rows, e, h)
    columns = metric.reshape(-1, h)

    def met(y: Tensor) -> Tensor:  # C Y, (e, h, e·terms)
        return (columns @ y).view(e, h, e * terms)

    before: Tensor | float = torch.inf
    seen, x, sweeps = met(other), exact.reshape(rows, e * terms), 0
    while True:
        normal = (other.mT @ seen).view(e * terms, e * terms)
        pull = (moved @ other).view(rows, e * terms)
        x = x + (pull - x @ normal) @ pinv(normal, _SEEN, symmetric=True)
        lost = whole - (x * (2 * pull - x @ normal)).sum()
        if sweeps == _SWEEPS or not before - lost > _ENOUGH * lost:
            break
        before, sweeps = lost, sweeps + 1
        both = (x.mT @ x).view(e, terms, e, terms)
        scale = pinv(torch.einsum("esft,ef->st", both, near), _SEEN, symmetric=True)
        across = both.reshape(e, terms, e * terms).mT
        residual = torch.einsum("reh,res->hs", moved, x.view(rows, e, terms))
        residual -= (seen @ across).sum(0)
        step = root @ (root.mT @ (residual @ scale))
        ahead = met(step)
        length = (step * residual).sum() / (step * (ahead @ across).sum(0)).sum()
        if not 0 < length < torch.inf:
            break
        other, seen = other + length * step, seen + length * ahead
    lost = lost.clamp(min=0)
    error = float((lost / whole).sqrt()) if whole > 0 else 0.0
    return x.view(rows, e, terms), other, error, float(lost), sweeps
