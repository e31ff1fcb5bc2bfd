"""Distillation losses as pure functions of tensors, computed in float32.

None waits for the device: what a mask leaves out is set to zero, not cut out, for the number of
tokens that are left would have to be known first. Where nothing is left, the loss is 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lrcompress.errors import ShapeError


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

    Source:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015,
        arXiv 1503.02531.

    Example:
        >>> float(soft_kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), 2.0))
        0.0
    """
    student, teacher = student.float(), teacher.float()
    scores = student.ndim < 2 or student.shape[-1] == 1
    count: Tensor | int = student.numel() // (1 if scores else student.shape[-1])
    if student.ndim == 3 and mask is not None and mask.shape == student.shape[:2]:
        real = _real(mask, student)
        student, teacher = _blank(student, real), _blank(teacher, real)
        count = real.sum().clamp_min(1)
    if scores:
        return (student - teacher).square().sum() / count
    log_student, log_teacher = (
        (logits / temperature).log_softmax(-1) for logits in (student, teacher)
    )
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="sum")
    return temperature**2 * divergence / count


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

    Example:
        >>> float(relative_squared_error(torch.full((1, 2, 3), 3.0), torch.full((1, 2, 3), 2.0)))
        0.25
    """
    student, teacher = student.float(), teacher.float()
    if mask is not None and student.ndim > 2:
        if mask.shape != student.shape[:2]:
            raise ShapeError(
                f"the mask is {tuple(mask.shape)}, which does not fit the first two sizes of "
                f"features of {tuple(student.shape)}; name the right one with mask="
            )
        real = _real(mask, student)
        student, teacher = _blank(student, real), _blank(teacher, real)
    size = teacher.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (student - teacher).square().sum() / size


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


def _real(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as truth values on the device of ``like``."""
    return mask.to(like.device, torch.bool, non_blocking=True)


def _blank(x: Tensor, real: Tensor | None) -> Tensor:
    """Return ``x`` ``(batch, tokens, ...)`` with zeros where no token is ``real``.

    Not multiplied: what stands at padding may be a NaN or an infinity, and so may its gradient.
    """
    if real is None:
        return x
    return torch.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0.0)
