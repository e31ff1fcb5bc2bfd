"""Narrowing: which inputs of a layer to keep, and its weight solved anew for those."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.errors import SettingError
from lrcompress.linalg import double, eigh, root
from lrcompress.solvers.truncation import check

# What is left of an input's moment, as a share of it, below which the others determine it: ten
# times the rounding of sums in float32.
_DETERMINED = 1e-6
_STEPS = 64  # inputs that are chosen between two products of whole matrices


@dataclass(frozen=True)
class Narrowed:
    """A weight with fewer inputs.

    Attributes:
        kept: ``(k,)`` int64, the inputs that stay, rising.
        weight: ``(out, k)``, dtype and device of the weight it replaces.
        error: ``‖P (W − M) Q‖ / ‖P W Q‖``, with ``M`` zero for what is removed.
        lost: ``‖P (W − M) Q‖²``.
    """

    kept: Tensor
    weight: Tensor
    error: float
    lost: float


@dataclass(frozen=True)
class Narrowings:
    """All narrowings of one weight: which inputs stay of each number of them, and what is lost.

    Attributes:
        losses: ``(in + 1,)`` float64 on the CPU, falling to 0: ``‖P (W − M) Q‖²`` with so many
            inputs.
        orders: ``(2, in)`` int64 on the CPU: inputs as they were chosen one by one, and the
            reverse of how they were given up one by one. The first ``k`` stay of ``k``.
        given_up: ``(in + 1,)`` bool: whether the second order loses less with so many inputs.
    """

    losses: Tensor
    orders: Tensor
    given_up: Tensor

    def error(self, k: int) -> float:
        """Return the relative error with ``k`` inputs."""
        return relative_error(self.losses, k)

    def kept(self, k: int) -> Tensor:
        """Return the best ``k`` inputs, rising, ``(k,)`` int64 on the CPU."""
        return self.orders[int(self.given_up[k])][:k].sort().values

    @torch.no_grad()
    def solved(self, weight: Tensor, input: Tensor | None, k: int) -> Narrowed:
        """Return the weight that loses least with the best ``k`` inputs.

        What the inputs ``S`` that stay tell of the others ``R`` is added to their own columns:
        ``M_S = W_S + W_R C_RS C_SS⁺``, which is ``W C S (SᵀCS)⁻¹`` where that exists.

        Args:
            weight: ``(out, in)``, that these narrowings are of.
            input: ``C``, as it was then.
            k: inputs that stay.

        Raises:
            SettingError: if ``k`` is below 1 or above their number.

        Cost:
            ``k³ / 3 + k² (in − k)`` operations; ``in²`` float64 values.
        """
        n = self.orders.shape[1]
        if not 1 <= k <= n:
            raise SettingError(f"from 1 to {n} inputs can be kept, got {k}")
        w = double(weight)
        order = self.orders[int(self.given_up[k])].to(w.device)
        kept, gone = order[:k].sort().values, order[k:].sort().values
        narrow = w[:, kept]
        if len(gone) and input is not None and input.ndim == 2:
            c = input.to(w)
            narrow = narrow + w[:, gone] @ _least_squares(c[kept][:, kept], c[kept][:, gone]).mT
        kept = kept.to(weight.device)
        return Narrowed(kept, narrow.to(weight), self.error(k), float(self.losses[k]))


def relative_error(losses: Tensor, k: int) -> float:
    """Return the relative error with ``k`` inputs, from what is lost with each number of them.

    Example:
        >>> relative_error(torch.tensor([25.0, 9.0, 0.0]), 1)
        0.6
    """
    total = float(losses[0])
    return (float(losses[k]) / total) ** 0.5 if total > 0 else 0.0


@torch.no_grad()
def narrowings(
    weight: Tensor, output: Tensor | None = None, input: Tensor | None = None
) -> Narrowings:
    """Return which inputs of ``weight`` are best kept, and what is lost, for every number of them.

    With inputs ``S``, the least of ``‖P (W − M) Q‖²`` over all ``M`` that read no others is
    ``tr(A E Aᵀ)`` with ``A = P W`` and ``E = C − C S (SᵀCS)⁻¹SᵀC``, what they do not tell of the
    others; ``PᵀP = G``, ``QQᵀ = C``. For each number the better of two choices counts:

    * one by one, each time the input that saves most, with the largest ``‖(A E)_j‖² / E_jj``. It
      is the best of all subsets for one input. It ends where the other choice is the better one.
    * given up one by one, each time the one that costs least, with the smallest
      ``‖M_j‖² / (C_SS⁻¹)_jj``, ``M`` being ``P`` times the weight as solved so far. It is the best
      of all subsets for all inputs but one.

    In both, one product of two vectors is subtracted from two matrices at each step (pivoted
    Cholesky in another metric than its own). Inputs that others determine are given up first.

    Args:
        weight: ``(out, in)``, any floating dtype; the solve runs in float64.
        output: ``G``: ``(out, out)`` symmetric, ``(out,)`` its diagonal, or None for the identity.
        input: ``C``: ``(in, in)``, ``(in,)`` or None, likewise.

    Raises:
        ShapeError: if the arguments do not fit together.
        NotFiniteError: if one of them holds a NaN or an infinity.

    Cost:
        ``O(in³ + min(in, out)·in²)`` operations; three float64 copies of the moment.

    Source:
        C.-H. Lin et al., "MoDeGPT", ICLR 2025, arXiv 2408.09632, of type I, with another choice;
        giving up as in B. Hassibi and D. Stork, "Optimal Brain Surgeon" (1993), by columns.

    Example:
        >>> found = narrowings(torch.tensor([[3.0, 2.0, 1.0]]))
        >>> found.orders.tolist(), found.losses.tolist()
        ([[0, 1, 2], [0, 1, 2]], [14.0, 5.0, 1.0, 0.0])
    """
    check(weight, output, input)
    w = double(weight)
    n = w.shape[1]
    g, c = (None if side is None or not side.any() else side.to(w) for side in (output, input))
    if c is None:
        c = torch.ones(n, dtype=w.dtype, device=w.device)
    c = c.diag() if c.ndim == 1 else c
    a = _output_root(w, g)
    inverse, scale = _inverse(c)
    given_up, cost = _one_by_one(inverse, a / scale, torch.zeros_like(scale), largest=False)
    # on the host: sums along an axis are not deterministic on a GPU in every version of torch
    kept = torch.zeros(2, n + 1, dtype=w.dtype)
    kept[1, :-1] = cost.cpu().cumsum(0).flip(0)
    whole = a @ c
    total = (whole * a).sum()

    def behind(saved: Tensor) -> bool:
        return bool(total - saved.sum() > kept[1, len(saved)])

    chosen, saved = _one_by_one(c, whole, c.diagonal() * _DETERMINED, stop=behind)
    there = saved.cpu()
    kept[0, : len(saved)] = total.cpu() - there.cumsum(0) + there
    if len(saved) < n and behind(saved):
        kept[0, len(saved) :] = torch.inf
    losses = kept.clamp(min=0)
    better = losses[1] < losses[0]
    curve = losses.amin(0).cummin(0).values
    return Narrowings(curve, torch.stack([chosen, given_up.flip(0)]).cpu(), better)


def _output_root(w: Tensor, g: Tensor | None) -> Tensor:
    """Return an ``A`` with ``AᵀA = Wᵀ G W``, of the fewer rows."""
    if g is not None:
        w = w * g.clamp(min=0).sqrt()[:, None] if g.ndim == 1 else root(g)[0].mT @ w
    return w if w.shape[0] <= w.shape[1] else torch.linalg.qr(w, mode="r").R


def _scale(c: Tensor) -> Tensor:
    """Return what makes the diagonal one; without it, small inputs would count as none."""
    scale = c.diagonal().clamp(min=0).rsqrt()
    return torch.where(scale.isfinite(), scale, 1.0)


def _inverse(c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of a moment scaled to a diagonal of ones, and that scale."""
    scale = _scale(c)
    scaled = c * scale * scale[:, None]
    for share in (1e-12, _DETERMINED):
        scaled.diagonal().add_(share)
        lower, failed = torch.linalg.cholesky_ex(scaled)
        if not failed.item() and lower.diagonal().min() > 1e-5:
            return torch.cholesky_inverse(lower), scale
    energies, basis = eigh(scaled)
    return basis / energies.clamp(min=_DETERMINED) @ basis.mT, scale


def _one_by_one(
    left: Tensor,
    whole: Tensor,
    floor: Tensor,
    *,
    largest: bool = True,
    stop: Callable[[Tensor], bool] = lambda _: False,
) -> tuple[Tensor, Tensor]:
    """Return inputs in the order of their choice, and what each one saved or cost.

    Those whose diagonal in ``left`` has fallen to ``floor`` come last, as do all that are not
    chosen yet when ``stop`` says so of what was saved; nothing is said of them.
    """
    places = torch.arange(len(left), device=left.device)
    order, changes = [], []
    while len(places):
        chosen, change, columns, rows = _choose(left, whole, floor, 1.0 if largest else -1.0)
        if not len(chosen):
            break
        order.append(places[chosen])
        changes.append(change)
        stays = torch.ones_like(places, dtype=torch.bool)
        stays[chosen] = False
        places, floor, columns = places[stays], floor[stays], columns[stays]
        if stop(torch.cat(changes)):
            break
        left = left[stays][:, stays].addmm_(columns, columns.mT, alpha=-1)
        whole = whole[:, stays].addmm_(rows, columns.mT, alpha=-1)
    return torch.cat([*order, places]), torch.cat([*changes, left.new_zeros(0)])


def _choose(
    left: Tensor, whole: Tensor, floor: Tensor, sign: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose up to ``_STEPS`` inputs ``j``, each of the largest ``sign·‖whole_j‖² / left_jj``.

    Returns:
        The inputs, fewer where all others are at the ``floor``; their quotients; and the columns
        and rows by whose products ``left`` and ``whole`` shrink.
    """
    n = len(left)
    steps = min(_STEPS, n)
    rest, energy = left.diagonal().clone(), whole.square().sum(0)
    columns, rows = left.new_zeros(n, steps), whole.new_zeros(len(whole), steps)
    chosen = torch.zeros(steps, dtype=torch.int64, device=left.device)
    quotients = left.new_zeros(steps)
    for i in range(steps):
        score = torch.where(rest > floor, sign * energy / rest, -torch.inf)
        pivot = score.argmax()
        scale = rest[pivot].clamp(min=torch.finfo(rest.dtype).tiny).rsqrt()
        before = columns[pivot, :i]
        column = (left[pivot] - columns[:, :i] @ before) * scale
        row = (whole[:, pivot] - rows[:, :i] @ before) * scale
        along = whole.mT @ row - columns[:, :i] @ (rows[:, :i].mT @ row)
        energy.addcmul_(column, along, value=-2).addcmul_(column, column * row.square().sum())
        energy.clamp_(min=0)
        rest -= column.square()
        rest[pivot] = -1  # once is enough
        chosen[i], quotients[i], columns[:, i], rows[:, i] = pivot, score[pivot], column, row
    able = int(quotients.isfinite().sum())  # after the first that is not, none is
    return chosen[:able], sign * quotients[:able], columns[:, :able], rows[:, :able]


def _least_squares(moment: Tensor, cross: Tensor) -> Tensor:
    """Return ``moment⁺ cross``."""
    scale = _scale(moment)
    scaled, cross = moment * scale * scale[:, None], cross * scale[:, None]
    lower, failed = torch.linalg.cholesky_ex(scaled)
    if not failed.item() and lower.diagonal().min() > _DETERMINED**0.5:
        return torch.cholesky_solve(cross, lower) * scale[:, None]
    energies, basis = eigh(scaled)
    inverse = torch.where(energies > _DETERMINED * energies[-1], 1 / energies, 0.0)
    return basis @ (inverse[:, None] * (basis.mT @ cross)) * scale[:, None]
