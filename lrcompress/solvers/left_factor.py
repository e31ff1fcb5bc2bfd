"""Left factor of a layer, by least squares, for inputs that come from a compressed model."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError
from lrcompress.linalg import double, eigh, full_precision

# Directions of the inputs below so many roundings of the largest one are left as they are.
_ROUNDINGS = 8


@dataclass
class Normal:
    """The normal equations of a left factor, from tokens as they come.

    With ``z = R x̂`` what the left factor reads, and ``t = β x + (1 − β) x̂`` what the dense weight
    is to read.

    Attributes:
        weight: ``(out, in)`` of the dense layer.
        reader: ``R (rank, in)``, or ``(rank,)`` int64: which of the inputs are read.
        anchor: ``β``, how much of the target comes from the dense model's inputs.
        gram: ``Σ z zᵀ`` ``(rank, rank)``.
        cross: ``Σ t zᵀ`` ``(in, rank)``.
        read: ``Σ z`` ``(rank,)``.
        wanted: ``Σ t`` ``(in,)``.
        count: tokens, ``(1,)``.
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
        self.gram, self.cross = zeros(rank, rank), zeros(inputs, rank)
        self.read, self.wanted, self.count = zeros(rank), zeros(inputs), zeros(1)

    @torch.no_grad()
    @full_precision()
    def add_(self, dense: Tensor, own: Tensor) -> None:
        """Add tokens: what the layer reads in the dense model, and in the compressed one.

        Args:
            dense: ``x (tokens, in)``.
            own: ``x̂ (tokens, in)``, of the same tokens.
        """
        dense, own = dense.to(self.gram), own.to(self.gram)
        z = own @ self.reader.mT if self.reader.ndim == 2 else own[:, self.reader]
        t = own.lerp(dense, self.anchor)
        self.gram.addmm_(z.mT, z)
        self.cross.addmm_(t.mT, z)
        self.read += z.sum(0)
        self.wanted += t.sum(0)
        self.count += len(z)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """Everything that is summed, so that processes can add theirs up in place."""
        return self.gram, self.cross, self.read, self.wanted, self.count

    def solve(self, left: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the left factor that is nearest to the targets, and the bias beside it.

        They minimise ``Σ ‖P (weight t + bias − left z − bias')‖²`` over all ``left`` and, where a
        bias is given, ``bias'``. Nothing else binds ``left``: the solution is the same for every
        output metric ``PᵀP`` of full rank. Directions of ``z`` that no token has stay as they are
        in ``left``; what would not be better than ``left`` is not taken.

        Args:
            left: ``(out, rank)`` as it is; the result has its dtype.
            bias: ``(out,)`` of the dense layer; None leaves the bias out: it is the same on both
                sides.

        Raises:
            NotFiniteError: if the sums hold a NaN or an infinity.

        Cost:
            ``10·rank³ + 2·out·rank·(in + 2·rank)`` operations in float64.

        Source:
            MPIFA (Zhao et al., arXiv 2501.19090) refits low-rank layers so; the anchor is that of
            AA-SVD (arXiv 2604.02119).
        """
        gram, cross, read, wanted, count = (double(x) for x in self.sums)
        if not all(bool(x.isfinite().all()) for x in (gram, cross)):
            raise NotFiniteError("what a layer reads holds a NaN or an infinity")
        count = count.clamp(min=1)
        if bias is not None:
            gram = gram - torch.outer(read, read) / count
            cross = cross - torch.outer(wanted, read) / count
        whole, before = double(self.weight).to(gram), double(left).to(gram)
        target = whole @ cross
        found = (before + (target - before @ gram) @ self._inverse(gram)).to(left)
        if _excess(double(found).to(gram), gram, target) >= _excess(before, gram, target):
            found = left.clone()
        if bias is None:
            return found, None
        shift = (whole @ wanted - double(found).to(gram) @ read) / count
        return found, (double(bias).to(gram) + shift).to(bias)

    def _inverse(self, gram: Tensor) -> Tensor:
        """Return the inverse of ``gram`` over the directions that rounding has left."""
        scale = gram.diagonal().clamp(min=0).sqrt()
        least = torch.finfo(self.gram.dtype).eps * scale.max()
        inverse = torch.where(scale > least, 1 / scale.clamp(min=least.clamp(min=1e-300)), 0.0)
        energies, basis = eigh(inverse[:, None] * gram * inverse)
        kept = energies > _ROUNDINGS * torch.finfo(self.gram.dtype).eps * energies[-1].clamp(min=0)
        spread = basis * torch.where(kept, 1 / energies.clamp(min=1e-300), 0.0)
        return inverse[:, None] * (spread @ basis.mT) * inverse


def _excess(left: Tensor, gram: Tensor, target: Tensor) -> float:
    """Return ``Σ ‖P (weight t − left z)‖²`` for ``P = I``, but for what no ``left`` changes."""
    return float((left * (left @ gram - 2 * target)).sum())
