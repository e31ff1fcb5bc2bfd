"""Matrix functions: Gram matrices, square roots, shrinkage, whitening, balanced factors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Symmetric sums are built in so many block rows, none narrower: below it products lose speed.
_BLOCKS = 6
_NARROWEST = 128


_WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64, on the CPU if its device has none (MPS)."""
    return (x.cpu() if x.device.type in _WITHOUT_FLOAT64 else x).double()


@torch.no_grad()
def add_gram_(total: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """Add ``scale² xᵀ x`` to the upper triangle of ``total``; what is below is left undefined.

    A symmetric sum needs half of the products only; it is computed block row by block row to save
    most of the other half. Read the result through :func:`symmetric`.

    Args:
        total: ``(features, features)``, changed in place.
        x: ``(tokens, features)`` with the dtype and device of ``total``.
        scale: of ``x``; a factor here costs nothing, a scaled copy of ``x`` would.

    Cost:
        ``(b + 1) / 2b`` of the ``2·tokens·features²`` operations of the full product, with
        ``b = 6`` block rows from 768 features on, ``features / 128`` below.
    """
    features = total.shape[0]
    step = max(_NARROWEST, -(-features // _BLOCKS))
    for start in range(0, features, step):
        stop = min(start + step, features)
        row = total[start:stop, start:]
        row.addmm_(x[:, start:stop].mT, x[:, start:], alpha=scale * scale)


def symmetric(total: Tensor) -> Tensor:
    """Return the full symmetric matrix ``(n, n)`` whose upper triangle ``total`` holds.

    Example:
        >>> symmetric(torch.tensor([[1.0, 2.0], [9.0, 3.0]])).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    upper = total.triu()
    return upper + upper.triu(1).mT


def shrunk(metric: Tensor, share: float) -> Tensor:
    """Return ``(1 − share)·metric + share·mean(diag)·I``: shrinkage towards the identity.

    Args:
        metric: ``(n, n)`` symmetric, or ``(n,)``, the diagonal of a diagonal one.
        share: from 0 (nothing changes) to 1 (the identity, scaled).

    Example:
        >>> shrunk(torch.tensor([1.0, 3.0]), 0.5).tolist()
        [1.5, 2.5]
    """
    diagonal = metric if metric.ndim == 1 else metric.diagonal()
    result = (1 - share) * metric
    (result if metric.ndim == 1 else result.diagonal()).add_(share * diagonal.mean())
    return result


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return rising eigenvalues ``(n,)`` and eigenvectors ``(n, n)`` of a symmetric matrix.

    Solvers of GPUs give up on matrices that LAPACK solves, those of low rank among them: it is
    tried once more on the CPU, and then with ``10⁻¹²`` of the mean diagonal added to it.

    Args:
        matrix: ``(n, n)``, finite; its lower triangle counts.

    Raises:
        LinAlgError: if all of them fail.
    """
    energies, basis = _tried_again(torch.linalg.eigh, matrix)
    return energies.to(matrix.device), basis.to(matrix.device)


def eigvalsh(matrix: Tensor) -> Tensor:
    """Return the eigenvalues alone, in the same way as :func:`eigh`."""
    found: Tensor = _tried_again(torch.linalg.eigvalsh, matrix)
    return found.to(matrix.device)


def _tried_again(solve: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    try:
        return solve(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        near = matrix.cpu()
    try:
        return solve(near)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        shift = 1e-12 * near.diagonal().mean().abs()
        return solve(near + shift * torch.eye(len(near)).to(near))


def root(moment: Tensor, floor: float = 0.0) -> tuple[Tensor, bool]:
    """Return a square root ``R`` with ``R Rᵀ = moment``, and whether it is lower triangular.

    Cholesky where the matrix is positive definite, else by eigenvalues. Negative eigenvalues,
    which rounding makes of zeros, are set to zero. Nothing is added to the diagonal.

    Args:
        moment: ``(n, n)`` symmetric positive semidefinite, float64.
        floor: share of the largest eigenvalue that smaller ones are raised to, for roots that
            will be inverted.

    Returns:
        ``R (n, n)``, lower triangular or with orthogonal columns, and which of the two.

    Cost:
        ``n³/3`` operations; about ``9 n³`` where the matrix is singular.
    """
    lower, failed = torch.linalg.cholesky_ex(moment)
    pivots = lower.diagonal()
    if not failed.item() and pivots.min() >= floor**0.5 * pivots.max():
        return lower, True
    energy, basis = eigh(moment)
    return basis * energy.clamp(min=floor * float(energy[-1].clamp(min=0))).sqrt(), False


def whitening(
    metric: Tensor | None, floor: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return functions that apply ``P`` and ``P⁻¹``, for some ``P`` with ``PᵀP = metric``.

    Both map ``(n, columns)`` to ``(n, columns)``.

    Args:
        metric: ``(n, n)`` symmetric, ``(n,)`` its diagonal, or None for the identity; float64.
        floor: share of the largest eigenvalue that smaller ones are raised to.

    Example:
        >>> there, back = whitening(torch.tensor([4.0, 9.0]), 1e-10)
        >>> there(torch.ones(2, 1)).T.tolist(), back(there(torch.ones(2, 1))).T.tolist()
        ([[2.0, 3.0]], [[1.0, 1.0]])
    """
    if metric is None:
        return lambda x: x, lambda x: x
    if metric.ndim == 1:
        p = metric.clamp(min=float(metric.max()) * floor).sqrt()[:, None]
        return lambda x: p * x, lambda x: x / p
    r, triangular = root(
        metric, floor
    )  # P = Rᵀ: with R in its place it would be as good as ignored
    if triangular:
        return lambda x: r.mT @ x, lambda x: torch.linalg.solve_triangular(r.mT, x, upper=True)
    scale = r.square().sum(0)[:, None]  # the columns are orthogonal
    return lambda x: r.mT @ x, lambda x: r @ (x / scale)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product with ``‖left[:, k]‖ = ‖right[k, :]‖``.

    Gradient descent on ``left right`` changes both factors at the same rate only where their
    norms are equal. A component that is zero on one side keeps a small share on the other, so
    that training can still revive it.

    Args:
        left: ``(out, rank)``.
        right: ``(rank, in)``.

    Example:
        >>> left, right = balanced(torch.tensor([[4.0]]), torch.tensor([[1.0]]))
        >>> left.item(), right.item()
        (2.0, 2.0)
    """
    heights, widths = left.norm(dim=0), right.norm(dim=1)
    floor = (1e-6 * (heights * widths).max().sqrt()).clamp(min=torch.finfo(left.dtype).tiny)
    # two roots, since the quotient of zero factors would overflow
    scale = widths.clamp(min=floor).sqrt() / heights.clamp(min=floor).sqrt()
    return left * scale, right / scale[:, None]
