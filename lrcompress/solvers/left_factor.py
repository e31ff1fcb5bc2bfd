"""Left factor of a layer, by least squares, for inputs that come from a compressed model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError
from lrcompress.linalg import double, eigh, full_precision

# Directions of the inputs below so many roundings of the largest one are left as they are.
_ROUNDINGS = 8
# What keeps a left factor near to what it was, in shares of the variance of what it reads.
RIDGES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)


@dataclass
class Normal:
    """The normal equations of a left factor, from tokens as they come.

    With ``z = R x̂`` what the left factor reads, and ``t = β x + (1 − β) x̂`` what the dense weight
    is to read.

    Attributes:
        weight: ``(out, in)`` of the dense layer.
        reader: ``R (rank, in)``, or ``(rank,)`` int64: which of the inputs are read.
        anchor: ``β``, how much of the target comes from the dense model's inputs.
        gram: ``Σ z zᵀ`` ``(2, rank, rank)``, of even and of odd batches, as all that follows.
        cross: ``Σ t zᵀ`` ``(2, in, rank)``.
        read: ``Σ z`` ``(2, rank)``.
        wanted: ``Σ t`` ``(2, in)``.
        count: tokens, ``(2,)``.
    """

    weight: Tensor
    reader: Tensor
    anchor: float
    gram: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    read: Tensor = field(init=False)
    wanted: Tensor = field(init=False)
    count: Tensor = field(init=False)

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        zeros = partial(torch.zeros, dtype=wide, device=self.weight.device)
        rank, inputs = len(self.reader), self.weight.shape[1]
        if self.reader.is_floating_point():
            self.reader = self.reader.to(wide)
        self.gram, self.cross = zeros(2, rank, rank), zeros(2, inputs, rank)
        self.read, self.wanted, self.count = zeros(2, rank), zeros(2, inputs), zeros(2)

    @torch.no_grad()
    @full_precision()
    def add_(self, dense: Tensor, own: Tensor, number: int = 0) -> None:
        """Add tokens: what the layer reads in the dense model, and in the compressed one.

        Args:
            dense: ``x (tokens, in)``.
            own: ``x̂ (tokens, in)``, of the same tokens.
            number: of the batch they are of: even ones are one half, odd ones the other.
        """
        half = number % 2
        dense, own = dense.to(self.gram), own.to(self.gram)
        z = own @ self.reader.mT if self.reader.ndim == 2 else own[:, self.reader]
        t = own.lerp(dense, self.anchor)
        self.gram[half].addmm_(z.mT, z)
        self.cross[half].addmm_(t.mT, z)
        self.read[half] += z.sum(0)
        self.wanted[half] += t.sum(0)
        self.count[half] += len(z)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """Everything that is summed, so that processes can add theirs up in place."""
        return self.gram, self.cross, self.read, self.wanted, self.count

    def solve(self, left: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the left factor that is nearest to the targets, and the bias beside it.

        They minimise ``Σ ‖P (weight t + bias − left' z − bias')‖²`` plus
        ``λ Σ_j ‖P (left' − left)_j‖² Σ z_j²`` over all ``left'`` and, where a bias is given,
        ``bias'``; the ``z_j`` of the second sum are about their means then. Nothing else binds
        ``left'``: the solution is the same for every output metric ``PᵀP`` of full rank. ``λ`` is
        that of :data:`RIDGES` by which what is solved on one half of the batches loses least on
        the other; the last leaves all as it is. Where one half is empty it is zero. Directions of
        ``z`` that no token has stay as they are in ``left``, beside a bias also a ``z_j`` that
        never changes, and what would not be better than ``left`` is not taken.

        Args:
            left: ``(out, rank)`` as it is; the result has its dtype.
            bias: ``(out,)`` of the dense layer; None leaves the bias out: it is the same on both
                sides.

        Raises:
            NotFiniteError: if the sums hold a NaN or an infinity.

        Cost:
            ``30·rank³ + 2·out·rank·(2·in + 8·rank)`` operations in float64.

        Source:
            MPIFA (Zhao et al., arXiv 2501.19090) refits low-rank layers so; the anchor is that of
            AA-SVD (arXiv 2604.02119).
        """
        if not all(bool(x.isfinite().all()) for x in (self.gram, self.cross)):
            raise NotFiniteError("what it reads holds a NaN or an infinity")
        whole, before = double(self.weight), double(left).to(double(self.weight))
        halves = [self._residual(part, whole, before, bias) for part in (slice(1), slice(1, 2))]
        ridge = _best_ridge(halves, self._rounding)
        gram, residual = self._residual(slice(None), whole, before, bias)
        scale, energies, basis = _scaled(gram, self._rounding)
        step = (residual * scale) @ (basis * _damped(energies, ridge)) @ (basis.mT * scale)
        found = (before + step).to(left)
        moved = double(found).to(before) - before
        if float((moved * (moved @ gram - 2 * residual)).sum()) >= 0:
            found = left.clone()
        if bias is None:
            return found, None
        wanted, read, count = (double(x).sum(0) for x in (self.wanted, self.read, self.count))
        shift = (whole @ wanted - double(found).to(whole) @ read) / count.clamp(min=1)
        return found, (double(bias).to(whole) + shift).to(bias)

    @property
    def _eps(self) -> float:
        return torch.finfo(self.gram.dtype).eps

    @property
    def _rounding(self) -> float:
        return _ROUNDINGS * self._eps

    def _residual(
        self, part: slice, whole: Tensor, before: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``Σ z zᵀ`` of some halves, and ``Σ (weight t − left z) zᵀ``."""
        gram, cross, read, wanted, count = (double(x[part]).sum(0) for x in self.sums)
        if bias is not None:
            raw = gram.diagonal()
            gram = gram - torch.outer(read, read) / count.clamp(min=1)
            # of what never changes the variance is the rounding of sums, which grows with them
            changes = gram.diagonal() > (self._rounding + count / 8 * self._eps) * raw
            gram = gram * changes * changes[:, None]
            cross = cross - torch.outer(wanted, read) / count.clamp(min=1)
        return gram, whole @ cross - before @ gram


def _scaled(gram: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``s`` and the eigenvalues and vectors of ``s gram s``, whose diagonal is one.

    Where nothing but rounding is left, ``s`` and the eigenvalues are zero.
    """
    size = gram.diagonal().clamp(min=0).sqrt()
    least = (rounding * size.max()).clamp(min=torch.finfo(size.dtype).tiny)
    scale = torch.where(size > least, 1 / size.clamp(min=least), 0.0)
    energies, basis = eigh(scale[:, None] * gram * scale)
    return scale, energies * (energies > rounding * energies[-1]), basis


def _damped(energies: Tensor, ridge: float) -> Tensor:
    return torch.where(energies > 0, 1 / (energies + ridge).clamp(min=1e-300), 0.0)


def _best_ridge(halves: Sequence[tuple[Tensor, Tensor]], rounding: float) -> float:
    """Return the ridge by which a step that one half gives loses least on the other.

    Where one is empty all lose nothing, and it is the first.
    """
    lost = torch.zeros(len(RIDGES), dtype=torch.float64)
    for (gram, residual), (other, its) in (halves, halves[::-1]):
        scale, energies, basis = _scaled(gram, rounding)
        own, there = ((x * scale) @ basis for x in (residual, its))
        # of the step own · diag(d) · basisᵀ s the other half loses dᵀ quadratic d − 2 linear d
        quadratic = (own.mT @ own) * (basis.mT @ (scale[:, None] * other * scale) @ basis)
        linear = (own * there).sum(0)
        for i, ridge in enumerate(RIDGES):
            d = _damped(energies, ridge)
            lost[i] += float(d @ quadratic @ d - 2 * linear @ d)
    return RIDGES[int(lost.argmin())]
