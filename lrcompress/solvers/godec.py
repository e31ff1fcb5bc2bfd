"""GoDec: a weight as low rank plus a few sparse entries, to find where these should be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, ShapeError
from lrcompress.linalg import double


@dataclass(frozen=True)
class Decomposition:
    """Low rank plus sparse entries, found by :func:`godec`: ``weight ≈ left right + S``.

    Attributes:
        left: ``(out, rank)``, its columns orthonormal.
        right: ``(rank, in)``.
        support: ``(entries,)`` int64, where ``S`` is not zero: ``row·in + column``, ascending.
        values: ``(entries,)``, those of ``S`` there.
        errors: ``‖weight − left right − S‖ / ‖weight‖`` after every sweep; never rises.
    """

    left: Tensor
    right: Tensor
    support: Tensor
    values: Tensor
    errors: tuple[float, ...]


@torch.no_grad()
def godec(
    weight: Tensor,
    rank: int,
    entries: int,
    *,
    seed: int = 0,
    tolerance: float = 1e-4,
    most_sweeps: int = 100,
) -> Decomposition:
    """Find ``left right + S`` near ``weight``, ``S`` with few entries, by alternating.

    Minimises ``‖W − U V − S‖²`` over ``U`` of ``rank`` columns and ``S`` of ``entries`` entries.
    A sweep is

        ``U = qr((W − S) Vᵀ)``,  ``V = Uᵀ (W − S)``,  ``S = the largest entries of W − U V``,

    each the best for what the others are but for the first, which is no worse than the best for
    ``V``; so the error never rises. ``V`` starts random, ``S`` at zero.

    Args:
        weight: ``(out, in)``.
        rank: columns of ``U``; 0 leaves the largest entries of the weight alone.
        entries: of ``S``.
        seed: of the first ``V``; the same seed gives the same support.
        tolerance: sweeps end when one lowers the error by less than this share of it.
        most_sweeps: after which they end in any case.

    Returns:
        Factors and values in float64.

    Raises:
        ShapeError: if the weight is no matrix, or has no such rank or number of entries.
        NotFiniteError: if the weight is not finite.

    Cost:
        ``3·out·in·rank`` multiply-adds, a QR decomposition of ``(out, rank)`` and one selection of
        ``entries`` a sweep.

    Source:
        Zhou & Tao, "GoDec", ICML 2011; for the support of an update: Chen et al., "DSEE",
        ACL 2023, arXiv 2111.00160.

    Example:
        >>> found = godec(torch.tensor([[1.0, 1.0], [1.0, 9.0]]), rank=1, entries=1)
        >>> found.support.tolist(), found.errors[-1] < 1e-3
        ([3], True)
    """
    _check(weight, rank, entries)
    w = double(weight).contiguous()
    out_features, in_features = w.shape
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, in_features, generator=generator, dtype=w.dtype).to(w.device)
    left = w.new_zeros(out_features, rank)
    sparse, scale = torch.zeros_like(w), w.norm().clamp(min=torch.finfo(w.dtype).tiny)
    support = torch.zeros(0, dtype=torch.int64, device=w.device)
    errors: list[float] = []
    while len(errors) < most_sweeps and not _settled(errors, tolerance):
        rest = w - sparse
        left = torch.linalg.qr(rest @ right.mT).Q
        right = left.mT @ rest
        remainder = w - left @ right
        flat = remainder.view(-1)
        support = flat.abs().topk(entries).indices.sort().values
        sparse = torch.zeros_like(w)
        sparse.view(-1)[support] = flat[support]
        errors.append(float((remainder - sparse).norm() / scale))
    return Decomposition(left, right, support, sparse.view(-1)[support], tuple(errors))


def _settled(errors: list[float], tolerance: float) -> bool:
    return len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-2]


def _check(weight: Tensor, rank: int, entries: int) -> None:
    if weight.ndim != 2:
        raise ShapeError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    for name, given, most in (
        ("rank", rank, min(weight.shape)),
        ("entries", entries, weight.numel()),
    ):
        if not 0 <= given <= most:
            raise ShapeError(
                f"{name} must be from 0 to {most} for a weight {tuple(weight.shape)}, got {given}"
            )
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise NotFiniteError(f"weight holds {bad} non-finite of {weight.numel()} values")
