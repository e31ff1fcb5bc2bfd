"""Truncation error of every row of a weight, to choose the rows of a sparse part."""

import torch
from torch import Tensor

from lrcompress.linalg import double
from lrcompress.solvers.truncation import Truncation


@torch.no_grad()
def row_energies(
    weight: Tensor, output: Tensor | None, input: Tensor | None, truncation: Truncation, most: int
) -> Tensor:
    """Return the error of each row alone at every rank from 0 to ``most``.

    ``e[r, i] = G_ii · ‖(W − M_r)_i Q‖²`` with ``M_r`` the best matrix of rank ``r`` in the
    metric ``PᵀP = G``, ``QQᵀ = C``: what keeping row ``i`` of the remainder ``W − M_r`` would
    save, the rows' interaction through ``G`` left out. Since the components of ``P W Q`` are
    orthogonal, ``‖(W − M_r)_i Q‖² = (W C Wᵀ)_ii − Σ_{k≤r} (P⁻¹U)²_ik σ_k²``.

    Args:
        weight: ``(out, in)``.
        output: ``G``: ``(out, out)``, ``(out,)`` or None.
        input: ``C``: ``(in, in)``, ``(in,)`` or None.
        truncation: of the same weight in the same metric.
        most: the greatest rank requested.

    Returns:
        ``(most + 1, out)`` float64, on the CPU.

    Cost:
        ``O(out·in²)`` for ``W C`` and ``O(out·in·most)`` for the components.
    """
    w = double(weight)
    wc = w if input is None else (w * input.to(w) if input.ndim == 1 else w @ input.to(w))
    total = (wc * w).sum(1).cpu()
    result = total[None]
    if most:
        # on the CPU: sums along an axis are not deterministic on GPUs in older versions of torch
        parts = truncation.basis(most).to(w).square() * truncation.energies[:most].to(w)
        result = torch.cat([result, (total - parts.cpu().cumsum(1).mT).clamp(min=0)])
    if output is None:
        return result
    heights = output if output.ndim == 1 else output.diagonal()
    return result * heights.to(total).clamp(min=0)
