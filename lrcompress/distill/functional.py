"""Distillation losses as pure functions of tensors, computed in float32.

None waits for the device: what a mask leaves out is set to zero, not cut out, for the number of
tokens that are left would have to be known first. Where nothing is left, the loss is 0. The
teacher's tensors get no gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lrcompress.errors import ShapeError

Rows = Callable[..., Tensor]
# Elements that are worked on at once, 32 MiB in float32: enough to keep a GPU busy.
CHUNK = 2**23


def soft_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Return ``T²·KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over examples.

    Examples are all positions of the leading axes. With a single logit, which is a score and no
    class, it is the mean squared error.

    Args:
        student: logits, ``(batch, classes)`` or ``(batch, tokens, classes)``.
        teacher: logits of the same shape.
        temperature: ``T``, above 0. ``T²`` keeps the size of the gradient.
        mask: ``(batch, tokens)``; where it is zero, tokens are left out. One that does not fit
            the logits is not used.

    Returns:
        A scalar in float32, in nats times ``T²``; of scores, in squared units of the score.

    Cost:
        The memory of a gradient in the student's dtype and, however many tokens there are, of
        five times :data:`CHUNK` numbers in float32.

    Source:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015,
        arXiv 1503.02531.

    Example:
        >>> float(soft_kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), 2.0))
        0.0
    """
    scores = student.ndim < 2 or student.shape[-1] == 1
    width = 1 if scores else student.shape[-1]
    count: Tensor | int = max(student.numel() // width, 1)
    real = None
    if student.ndim == 3 and mask is not None and mask.shape == student.shape[:2]:
        real = _real(mask, student)
        count = real.sum().clamp_min(1)

    rows = (x.reshape(-1, width) for x in (student, teacher.detach()))
    if scores:
        return _total(*_GAP, real, *rows) / count
    return temperature**2 * _total(*_divergence(temperature), real, *rows) / count


def relative_squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``‖H_s − H_t‖² / ‖H_t‖²`` over the real positions.

    Args:
        student: ``H_s``, ``(batch, tokens, width)``; of any shape without a mask.
        teacher: ``H_t``, of the same shape.
        mask: ``(batch, tokens)``; where it is zero, positions are left out. Not used for
            features of fewer than three axes.

    Returns:
        A scalar in float32, without unit.

    Raises:
        ShapeError: if the mask is not for these positions.

    Cost:
        Memory as in :func:`soft_kl_divergence`.

    Example:
        >>> float(relative_squared_error(torch.full((1, 2, 3), 3.0), torch.full((1, 2, 3), 2.0)))
        0.25
    """
    real = None
    if mask is not None and student.ndim > 2:
        if mask.shape != student.shape[:2]:
            raise ShapeError(
                f"the mask is {tuple(mask.shape)}, which does not fit the first two sizes of "
                f"features of {tuple(student.shape)}; name the right one with mask="
            )
        real = _real(mask, student)
    mine, theirs = (
        x.flatten(0, 1).flatten(1) if x.ndim > 2 else x.reshape(-1, 1)
        for x in (student, teacher.detach())
    )
    size = _summed(_squares, real, theirs).clamp_min(torch.finfo(torch.float32).tiny)
    return _total(*_GAP, real, mine, theirs) / size


def relation_kl_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``KL(softmax(A_t B_tᵀ/√d) ‖ softmax(A_s B_sᵀ/√d))``, the mean over rows and heads.

    ``A`` and ``B`` are queries and keys, or twice the values. Widths may differ between
    student and teacher, numbers of heads may not.

    Args:
        student: ``A_s`` and ``B_s``, each ``(batch, tokens, heads·d)``.
        teacher: ``A_t`` and ``B_t``.
        heads: of ``A`` and of ``B``; where ``B`` has fewer, each serves several of ``A``.
        mask: ``(batch, tokens)``; padding is neither a row nor a column.

    Returns:
        A scalar in float32, in nats.

    Raises:
        ShapeError: if the mask is not for these positions.

    Cost:
        ``O(batch·heads·tokens²·d)`` time and ``O(batch·heads·tokens²)`` memory, as attention
        without a fused kernel.

    Source:
        W. Wang et al., "MiniLM: deep self-attention distillation for task-agnostic compression
        of pre-trained transformers", NeurIPS 2020, arXiv 2002.10957.
    """
    batch, tokens = student[0].shape[:2]
    if mask is not None and mask.shape != (batch, tokens):
        raise ShapeError(
            f"the mask is {tuple(mask.shape)}, which does not fit relations of "
            f"{(batch, tokens)} positions; name the right one with mask="
        )
    real = None if mask is None else _real(mask, student[0])
    log_student, log_teacher = (_relations(*pair, heads, real) for pair in (student, teacher))
    each = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)  # (batch, heads, tokens)
    if real is None:
        return each.mean()
    rows = torch.where(real[:, None, :], each, 0.0)
    return rows.sum() / (heads[0] * real.sum()).clamp_min(1)


def _relations(
    first: Tensor, second: Tensor, heads: tuple[int, int], real: Tensor | None
) -> Tensor:
    """Return the logarithms of relations, ``(batch, heads, tokens, tokens)``."""
    one, other = (
        _blank(part.float(), real).reshape(*part.shape[:2], count, -1).transpose(1, 2)
        for part, count in zip((first, second), heads, strict=True)
    )
    other = other.repeat_interleave(heads[0] // heads[1], dim=1)
    scores = one @ other.mT / one.shape[-1] ** 0.5
    if real is not None:
        # Not -inf: 0 · (−inf − −inf) is a NaN, where 0 · 0 is meant.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~real[:, None, None, :], least)
    return F.log_softmax(scores, dim=-1)


def _divergence(temperature: float) -> tuple[Rows, Rows]:
    """Return ``KL(softmax(t / T) ‖ softmax(s / T))`` of rows, and its gradient by ``s``."""

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
        return (theirs.exp() * (theirs - mine)).sum(-1)

    def slope(student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = ((x.float() / temperature).softmax(-1) for x in (student, teacher))
        return (mine - theirs) / temperature

    return value, slope


def _squares(x: Tensor) -> Tensor:
    return x.float().square().sum(-1)


# ``‖s − t‖²`` of rows, and its gradient by ``s``.
_GAP: tuple[Rows, Rows] = (
    lambda student, teacher: _squares(student.float() - teacher.float()),
    lambda student, teacher: 2 * (student.float() - teacher.float()),
)


def _total(
    value: Rows, slope: Rows, real: Tensor | None, student: Tensor, teacher: Tensor
) -> Tensor:
    """Return the sum of a function of rows; the gradient goes to the student's alone.

    Args:
        value: of ``(rows, width)`` of student and teacher, ``(rows,)``.
        slope: its gradient by the student's, ``(rows, width)``.
        real: which rows count; None if all do.
        student: ``(rows, width)``.
        teacher: ``(rows, width)``.
    """
    return cast("Tensor", _Total.apply(value, slope, real, student, teacher))  # type: ignore[no-untyped-call]


class _Total(torch.autograd.Function):
    """A sum over rows, in chunks, whose gradient is computed in the backward pass.

    Autograd would keep several float32 tensors of the size of all rows. So there are a chunk's
    at a time, and beside them the gradient alone, in the dtype of what it is for.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Rows, slope: Rows, real: Tensor | None, student: Tensor, teacher: Tensor
    ) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(real, student, teacher)
        return _summed(value, real, student, teacher)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        real, student, teacher = ctx.saved_tensors
        found = torch.empty_like(student)
        for some, place, *rows in _chunks(real, found, student, teacher):
            place.copy_(_blank(ctx.slope(*rows), some) * gradient)
        return None, None, None, found, None


def _summed(value: Rows, real: Tensor | None, *rows: Tensor) -> Tensor:
    """Return the sum of ``value`` over the rows that are real."""
    sums = [_blank(value(*part), some).sum() for some, *part in _chunks(real, *rows)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _chunks(real: Tensor | None, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield which rows are real, and of every tensor those rows: all, or some at a time."""
    kept = None if real is None else real.reshape(-1)
    if rows[0].numel() <= CHUNK:
        yield kept, *rows
        return
    length = max(1, CHUNK // rows[0].shape[1])
    for start in range(0, len(rows[0]), length):
        part = slice(start, start + length)
        yield None if kept is None else kept[part], *(x[part] for x in rows)


def _real(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as truth values on the device of ``like``."""
    return mask.to(like.device, torch.bool, non_blocking=True)


def _blank(x: Tensor, real: Tensor | None) -> Tensor:
    """Return ``x`` with zeros where its leading axes, those of ``real``, are not real.

    Not multiplied: what stands at padding may be a NaN or an infinity, and so may its gradient.
    """
    if real is None:
        return x
    return torch.where(real.reshape(*real.shape, *(1,) * (x.ndim - real.ndim)), x, 0.0)
