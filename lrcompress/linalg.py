"""Matrix functions: Gram matrices, square roots, shrinkage, whitening, balanced factors."""

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

# Of a symmetric sum the block rows of its upper triangle are kept: about so many of them, none
# narrower, for which products lose speed, and none wider, which would keep more of the other half.
_BLOCKS = 6
_NARROWEST, _WIDEST = 128, 512
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []  # the same for every block of full_precision that is open
_SHIFT = 1e-12  # of the mean diagonal
_ON_HOST = "solved on the CPU, for the solver of its device failed"
_SHIFTED = f"solved with {_SHIFT:g} of its mean diagonal added, for solvers failed without"
_retries: ContextVar[list[str]] = ContextVar("retries")  # of the block of noted_retries


def packed_shape(features: int) -> tuple[int, int]:
    """Return the shape in which a symmetric sum of so many features is kept: one row.

    Example:
        >>> packed_shape(8_192), 8_192**2  # 53 % of the square
        ((1, 35651584), 67108864)
    """
    return 1, sum((stop - start) * (features - start) for start, stop in _block_rows(features))


def _block_rows(features: int) -> Iterator[tuple[int, int]]:
    step = min(_WIDEST, max(_NARROWEST, -(-features // _BLOCKS)))
    for start in range(0, features, step):
        yield start, min(start + step, features)


def _blocks(packed: Tensor, features: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the block rows ``(stop − start, features − start)``, which share memory."""
    end = 0
    for start, stop in _block_rows(features):
        begin, end = end, end + (stop - start) * (features - start)
        yield start, stop, packed[0, begin:end].view(stop - start, features - start)


def _features(packed: Tensor) -> int:
    """Return how many features the sum is of: its length rises with them."""
    size = packed.shape[1]
    return bisect_left(range(math.isqrt(2 * size) + 1), size, key=lambda n: packed_shape(n)[1])


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 while the block runs.

    ``torch.set_float32_matmul_precision`` and its kin may have allowed TF32 or bfloat16, which
    round what is multiplied to 11 or 8 bits. What they set is there again after the block. As they
    do, it counts in all threads, until the last of them has left its block.
    """
    with _lock:
        _undo.append(_undo[0] if _undo else _set_full_precision())
    try:
        yield
    finally:
        with _lock:
            undo = _undo.pop()
            if not _undo:
                undo()


def _nothing() -> None:
    """Undo nothing."""


def _set_full_precision() -> Callable[[], None]:
    """Set full precision for products of float32, and return what sets the state before again."""
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    held = [(x, x.fp32_precision) for x in places if hasattr(x, "fp32_precision")]  # torch 2.9
    if held and all(value in ("none", "ieee") for _, value in held):
        return _nothing
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # by backend alone: torch does not tell then that this is "highest"
        whole = "highest"
    if not held and whole == "highest":
        return _nothing
    # sets both, for torch refuses products where the old setting contradicts the newer ones
    torch.set_float32_matmul_precision("highest")

    def undo() -> None:
        torch.set_float32_matmul_precision(whole)
        for place, value in held:
            if place.fp32_precision != value:
                place.fp32_precision = value

    return undo


def for_gram(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype that :func:`add_gram_` is to get it in.

    That is float32, or half precision where the device multiplies it exactly, on tensor cores, and
    sums in float32.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x if half and _sums_in_float32(x.device, x.dtype) else x.to(torch.float32)


@cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of a half precision can be had in float32; tried once."""
    if device.type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype"):  # torch 2.8
        return False
    x, total = (torch.eye(16, dtype=kind, device=device) for kind in (dtype, torch.float32))
    try:
        _add_product_(total, x.mT, x * (1 + 2**-7), 0.5)
    except RuntimeError:  # a GPU, or a build, that cannot
        return False
    return total[0, 0].item() == 1.5 + 2**-8


_WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64, on the CPU if its device has none (MPS)."""
    return converted(x, torch.float64)


def converted(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x`` in a dtype, by default its own; on the CPU if its device has none."""
    return where_it_is(x, dtype).to(dtype or x.dtype)


def where_it_is(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x`` as it is, on the CPU if its device does not have the dtype."""
    lacks = dtype == torch.float64 and x.device.type in _WITHOUT_FLOAT64
    return x.cpu() if lacks else x


@torch.no_grad()
@full_precision()
def add_gram_(packed: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """Add ``scale² xᵀ x`` to a symmetric sum, of which one triangle is kept.

    Args:
        packed: of the shape that :func:`packed_shape` gives, changed in place. It holds the block
            rows of the upper triangle, one after the other; read it through :func:`symmetric`.
        x: ``(tokens, features)`` in the dtype of ``packed``, or as :func:`for_gram` returns it.
        scale: of ``x``; a factor here costs nothing, a scaled copy of ``x`` would.

    Cost:
        ``(b + 1) / 2b`` of the ``2·tokens·features²`` operations and of the memory of the full
        product, with ``b = 6`` block rows from 768 to 3,072 features, ``features / 128`` below and
        ``features / 512`` above.
    """
    for start, stop, row in _blocks(packed, x.shape[1]):
        _add_product_(row, x[:, start:stop].mT, x[:, start:], scale * scale)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add ``scale a b`` to ``total``, whose dtype may be float32 where theirs is half of it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.copy_(torch.addmm(total, a, b, out_dtype=total.dtype, alpha=scale))


def per_example_squares(x: Tensor, g: Tensor) -> Tensor:
    """Return ``Σ_b Σ_i (Σ_t g_bti x_btj)²`` for every ``j``.

    Args:
        x: ``(b, t, j)``.
        g: ``(b, t, i)``.
    """
    length, fan_in, fan_out = x.shape[1], x.shape[2], g.shape[2]
    if length * (fan_in + fan_out) < fan_in * fan_out:
        # = Σ_t x_tj (G Gᵀ X)_tj: the (out, in) gradient need not exist
        return ((g @ g.mT) @ x * x).sum(1).clamp(min=0).sum(0)
    total = x.new_zeros(fan_in)
    for one_x, one_g in zip(x, g, strict=True):
        total += (one_g.mT @ one_x).square_().sum(0)
    return total


def finite_or_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether all of ``x`` is finite, and ``x`` or else zeros, without waiting for a GPU."""
    finite = x.sum(dtype=torch.float32).isfinite()  # float16 would overflow
    if x.device.type == "cpu" and finite:
        return finite, x  # spared a copy
    return finite, torch.where(finite, x, 0.0)


def packed(square: Tensor) -> Tensor:
    """Return what is kept of a symmetric matrix ``(n, n)``, of which the upper triangle counts."""
    result = square.new_empty(packed_shape(len(square)))
    for start, stop, row in _blocks(result, len(square)):
        row.copy_(square[start:stop, start:])
    return result


def symmetric(packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the full symmetric matrix ``(n, n)`` of which ``packed`` is kept.

    Args:
        packed: of :func:`add_gram_`.
        dtype: of the result; by default that of ``packed``.

    Example:
        >>> sums = torch.zeros(packed_shape(2))
        >>> add_gram_(sums, torch.tensor([[1.0, 2.0]]))
        >>> symmetric(sums).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    n, packed = _features(packed), where_it_is(packed, dtype)
    result = packed.new_empty((n, n), dtype=dtype)
    for start, stop, row in _blocks(packed, n):
        result[start:stop, start:] = row
        result[start:, start:stop] = row.mT
        block = result[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)  # of the row's own block one triangle counts
    return result


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
    tried once more on the CPU, and then with ``10⁻¹²`` of the mean diagonal added to it, as
    :func:`noted_retries` tells.

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


@contextmanager
def noted_retries() -> Iterator[list[str]]:
    """Yield a list that says in the end, in words, where solvers failed at first in the block."""
    notes: list[str] = []
    held = _retries.set(notes)
    try:
        yield notes
    finally:
        _retries.reset(held)
        notes[:] = dict.fromkeys(notes)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U``, ``S`` and ``Vᵀ`` of full rank; tried once more on the CPU, as :func:`eigh`."""
    found = _or_on_host(partial(torch.linalg.svd, full_matrices=False), matrix)
    u, s, vh = (part.to(matrix.device) for part in found)
    return u, s, vh


def pinv(matrix: Tensor, rtol: float | None = None, *, symmetric: bool = False) -> Tensor:
    """Return the pseudo-inverse; tried once more on the CPU, as :func:`eigh`.

    Args:
        matrix: ``(m, n)``.
        rtol: singular values below this share of the largest count as zero; by default torch's.
        symmetric: whether the matrix is.
    """
    found: Tensor = _or_on_host(partial(torch.linalg.pinv, rtol=rtol, hermitian=symmetric), matrix)
    return found.to(matrix.device)


def _or_on_host(solve: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    try:
        return solve(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        found = solve(matrix.cpu())
    _retries.get([]).append(_ON_HOST)
    return found


def _tried_again(solve: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    try:
        return _or_on_host(solve, matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        near = matrix.cpu()
    shift = _SHIFT * near.diagonal().mean().abs()
    found = solve(near + shift * torch.eye(len(near)).to(near))
    _retries.get([]).append(_SHIFTED)
    return found


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the smallest ``X`` that minimises ``‖a X − b‖``, which is ``pinv(a) b``.

    Args:
        a: ``(m, n)``, of any rank.
        b: ``(m, k)``.

    Cost:
        A QR decomposition, ``2·m·n²`` operations; only where ``a`` has more columns than rows, or
        less than full rank to rounding, a singular value decomposition of the smaller side too.

    Example:
        >>> least_squares(torch.tensor([[2.0], [0.0]]), torch.tensor([[4.0], [1.0]])).tolist()
        [[2.0]]
    """
    found: Tensor
    if a.shape[0] < a.shape[1]:
        return pinv(a) @ b
    q, r = torch.linalg.qr(a)
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r)).to(r), upper=True)
    rounding = torch.finfo(a.dtype).eps * len(a)
    if float(r.norm() * inverse.norm()) * rounding < 1:  # not so where it is not a number
        found = torch.linalg.solve_triangular(r, q.mT @ b, upper=True)
    else:
        found = pinv(r) @ (q.mT @ b)
    return found


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
