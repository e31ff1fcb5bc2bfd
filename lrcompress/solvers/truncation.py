"""Weighted SVD: the rank-r matrix nearest to a weight in a two-sided metric."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.linalg import balanced, double, eigh, eigvalsh, root, svd, whitening

# Keeps the inverse of an output metric bounded: the least of its eigenvalues, of the largest.
FLOOR = 1e-10


_Solution = tuple[Tensor, Tensor, Tensor]  # energies, P⁻¹U, Uᵀ P W


@dataclass(frozen=True)
class Factors:
    """A factored weight.

    Attributes:
        left: ``(out, rank)``, dtype and device of the weight.
        right: ``(rank, in)``.
        error: ``‖P (W − left right) Q‖ / ‖P W Q‖``, from the discarded energies.
        lost: ``‖P (W − left right) Q‖²``.
    """

    left: Tensor
    right: Tensor
    error: float
    lost: float

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The factors in the order in which they are applied."""
        return self.right, self.left

    def product(self) -> Tensor:
        """Return what stands for the weight, ``(out, in)`` float64."""
        return double(self.left) @ double(self.right)


@dataclass(frozen=True)
class Truncation:
    """Truncations of one weight: its error curve, and factors of any rank that was asked for.

    Attributes:
        energies: ``(min(out, in),)`` float64, descending: the squared singular values of
            ``P W Q``. What a truncation to ``r`` loses is ``energies[r:].sum()``.
        left: ``(out, most)``: ``P⁻¹U``, the leading output directions; on the CPU, as ``right``,
            in float32 at least: factors of a rank are its first columns and rows.
        right: ``(most, in)``: ``Uᵀ P W``.
        like: ``()`` of the weight's dtype and device, which are those of factors.
    """

    energies: Tensor
    left: Tensor
    right: Tensor
    like: Tensor

    def factors(self, rank: int) -> Factors:
        """Return the best factors of that rank, balanced, in the weight's own dtype.

        Raises:
            SettingError: if ``rank`` is below 1 or above what the weight or ``most`` allows.
        """
        most = self.left.shape[1]
        if not 1 <= rank <= most:
            shape = (len(self.left), self.right.shape[1])
            raise SettingError(
                f"rank must be from 1 to {most} for a weight of shape {shape}, got {rank}"
            )
        device = self.like.device
        left, right = balanced(self.left[:, :rank].to(device), self.right[:rank].to(device))
        return Factors(
            left.to(self.like).contiguous(),
            right.to(self.like).contiguous(),
            self.error(rank),
            float(self.energies[rank:].sum()),
        )

    def basis(self, rank: int) -> Tensor:
        """Return ``P⁻¹U``, the leading output directions, ``(out, rank)`` float64."""
        return double(self.left[:, :rank])

    def error(self, rank: int) -> float:
        """Return the relative error of the best truncation to ``rank``."""
        return relative_error(self.energies, rank)


def relative_error(energies: Tensor, rank: int) -> float:
    """Return the relative error of a truncation to ``rank``, from its squared singular values.

    Example:
        >>> relative_error(torch.tensor([16.0, 9.0]), 1)
        0.6
    """
    total = float(energies.sum())
    return (max(0.0, float(energies[rank:].sum())) / total) ** 0.5 if total > 0 else 0.0


@torch.no_grad()
def truncate(
    weight: Tensor,
    output: Tensor | None = None,
    input: Tensor | None = None,
    *,
    most: int | None = None,
) -> Truncation:
    """Return all truncations of ``weight`` that are optimal in a two-sided metric.

    Minimises ``‖P (W − M) Q‖²`` over matrices ``M`` of rank ``r``, for every ``r`` at once,
    with ``PᵀP = output`` and ``QQᵀ = input``. With ``U`` the leading left singular vectors of
    ``P W Q``, the minimum is at ``M = P⁻¹U Uᵀ P W``.

    ``U`` comes from an eigendecomposition on the *smaller* side of the weight, never from a
    full SVD, and the input metric is never inverted, so singular input moments (dead inputs,
    fewer tokens than features) need no damping:

    * ``out ≤ in``: ``U`` from ``P W C Wᵀ Pᵀ``; no root of ``C`` is taken at all.
    * ``out > in``: ``V`` from ``Qᵀ Wᵀ G W Q``; ``P⁻¹U = W Q V Σ⁻¹`` and ``PᵀU = G P⁻¹U``,
      so the output metric is neither inverted nor has it a root taken.

    Ranks beyond what the metric sees go to the rest of the weight: at full rank ``M = W``.

    Args:
        weight: ``(out, in)``, any floating dtype; the solve runs in float64.
        output: ``G``: ``(out, out)`` symmetric, ``(out,)`` its diagonal, or None for the
            identity, as which an all-zero metric counts. Its scale does not change the factors.
        input: ``C``: ``(in, in)``, ``(in,)`` or None, likewise.
        most: the greatest rank that will be asked for; by default any.

    Raises:
        ShapeError: if the arguments do not fit together.
        NotFiniteError: if one of them holds a NaN or an infinity.

    Cost:
        With ``s`` the smaller and ``l`` the larger side: ``O(s³)`` for the eigenvalues and
        ``O(s·l²)`` for the products with full metrics; ``O(l²)`` float64 memory. The result keeps
        ``most·(out + in)`` values, on the CPU.

    Source:
        Eckart & Young (1936) under a change of basis; with the identity as output metric
        A. J. Izenman, "Reduced-rank regression for the multivariate linear model" (1975).

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> [round(truncate(weight).error(rank), 4) for rank in (1, 2, 3)]  # sqrt(5/14), sqrt(1/14)
        [0.5976, 0.2673, 0.0]
    """
    check(weight, output, input)
    w = double(weight)
    g, c = (None if side is None or not side.any() else side.to(w) for side in (output, input))
    solve = _on_output_side if weight.shape[0] <= weight.shape[1] else _on_input_side
    full = min(weight.shape)
    energies, left, right = solve(w, g, c, full if most is None else max(1, min(most, full)))
    kept = torch.promote_types(weight.dtype, torch.float32)
    like = torch.empty((), dtype=weight.dtype, device=weight.device)
    return Truncation(energies, left.to("cpu", kept), right.to("cpu", kept), like)


def _times(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """Return ``matrix · metric`` for a full, a diagonal or no metric."""
    if metric is None:
        return matrix
    return matrix * metric if metric.ndim == 1 else matrix @ metric


def _on_output_side(w: Tensor, g: Tensor | None, c: Tensor | None, most: int) -> _Solution:
    """Solve by ``U``: one factor ``P`` of the output metric, and the input metric as it is."""
    apply, inverse = whitening(g, FLOOR)
    pw = apply(w)
    energies, u = descending(_times(pw, c) @ pw.mT)
    return energies, inverse(u[:, :most]), u[:, :most].mT @ pw


def _on_input_side(w: Tensor, g: Tensor | None, c: Tensor | None, most: int) -> _Solution:
    """Solve by ``V``: one factor ``Q`` of the input metric, and the output metric as it is."""
    if c is None:
        wq = w
    elif c.ndim == 1:
        wq = w * c.clamp(min=0).sqrt()
    else:
        wq = w @ root(c)[0]
    gwq = wq if g is None else (g[:, None] * wq if g.ndim == 1 else g @ wq)
    energies, v = descending(wq.mT @ gwq)
    seen = min(most, int((energies > energies[0] * 1e-14).sum()))
    scaled = v[:, :seen] * energies[:seen].rsqrt()
    left, right = wq @ scaled, (gwq @ scaled).mT @ w
    if seen < most:  # the metric sees no more: what is left of the weight goes by its plain SVD
        u, s, vh = svd(w - left @ right)
        more = most - seen
        left = torch.cat([left, u[:, :more] * s[:more]], 1)
        right = torch.cat([right, vh[:more]])
    return energies, left, right


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a positive semidefinite matrix, falling, and their vectors."""
    energies, basis = eigh(matrix)
    return energies.clamp(min=0).flip(0), basis.flip(1)  # rounding can push a zero below zero


def rank_energies(whitened: Tensor, moment: Tensor | None) -> Tensor:
    """Return the squared singular values of ``A Q``, falling: what each further rank saves.

    The curve alone, of a weight whose one side is whitened already, where the other is narrowed.

    Args:
        whitened: ``A (n, k)``: ``P W``, or ``(W Q)ᵀ`` where it is the output metric that is left.
        moment: ``QQᵀ``: ``(k, k)``, ``(k,)`` its diagonal, or None for the identity; float64.

    Returns:
        ``(min(n, k),)``.

    Cost:
        ``n k² + n² k`` operations, and the eigenvalues of ``n × n``.

    Example:
        >>> rank_energies(torch.diag(torch.tensor([1.0, 2.0]))[:, :1], None)
        tensor([1.])
    """
    found = eigvalsh(_times(whitened, moment) @ whitened.mT)
    return found.clamp(min=0).flip(0)[: min(whitened.shape)]


def check(weight: Tensor, output: Tensor | None, input: Tensor | None) -> None:
    """Check that a weight and its metrics fit together and are finite.

    Raises:
        ShapeError: if they do not fit.
        NotFiniteError: if one of them holds a NaN or an infinity.
    """
    if weight.ndim != 2:
        raise ShapeError(f"weight must be (out, in), got shape {tuple(weight.shape)}")
    for name, metric, size in (
        ("output metric", output, weight.shape[0]),
        ("input metric", input, weight.shape[1]),
    ):
        if metric is not None and tuple(metric.shape) not in ((size,), (size, size)):
            raise ShapeError(
                f"{name} must be ({size},) or ({size}, {size}) to match weight "
                f"{tuple(weight.shape)}, got shape {tuple(metric.shape)}"
            )
    for name, value in (("weight", weight), ("output metric", output), ("input metric", input)):
        if value is not None and not value.sum().isfinite() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise NotFiniteError(f"{name} holds {bad} non-finite of {value.numel()} values")
