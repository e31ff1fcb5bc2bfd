"""Padding masks and numbers of examples of batches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import ObservationError, ShapeError

MASK = "attention_mask"
IGNORED = -100  # the label of what is not predicted


@dataclass(frozen=True)
class Mask:
    """The real tokens of a padded batch.

    Attributes:
        grid: ``(examples, length)``.
        real: their flat indices in it.
    """

    grid: torch.Size
    real: Tensor

    @classmethod
    def of(cls, mask: Tensor | None) -> "Mask | None":
        """Return the tokens where a mask is not zero, or None for none.

        Raises:
            ShapeError: if it is not two-dimensional.
        """
        if mask is None:
            return None
        if mask.ndim != 2:
            raise ShapeError(f"mask must be (examples, length), got shape {tuple(mask.shape)}")
        return cls(mask.shape, mask.reshape(-1).nonzero().squeeze(1))


def batch_examples(batch: Any) -> int:
    """Return how many examples a batch holds: the leading size of its first tensor.

    Scalars among the tensors, and everything that is no tensor, are passed over.

    Raises:
        ObservationError: if there is no tensor in it.

    Example:
        >>> batch_examples({"text": ["one", "two"], "input_ids": Tensor(2, 7)})
        2
    """
    found = list(_tensors(batch))
    if not found:
        raise ObservationError(f"no tensor in a batch of type {type(batch).__name__}")
    return next((tensor.shape[0] for tensor in found if tensor.ndim), 1)


def batch_terms(batch: Any) -> int:
    """Return how many terms a mean loss of this batch averages: its tokens, or examples.

    Where its ``labels`` are whole numbers ``(examples, length)``, those that are not -100 count,
    else the examples.

    Raises:
        ObservationError: if the examples are to be counted and there is no tensor in the batch.

    Example:
        >>> batch_terms({"labels": torch.tensor([[7, 8], [9, -100]])})
        3
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.dtype == torch.int64:
        return max(1, int((labels != IGNORED).sum()))
    return batch_examples(batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def batch_mask(
    batch: Any, mask: str | Callable[[Any], Tensor] | None, owner: str
) -> tuple[Tensor | None, str | None]:
    """Return a batch's padding mask, or the reason why an expected one is missing."""
    if mask is None:
        return None, None
    if not isinstance(mask, str):
        return mask(batch), None
    keys = list(batch) if isinstance(batch, Mapping) else None
    if keys is not None and mask in keys:
        found: Tensor = batch[mask]
        return found, None
    has = f"keys are {', '.join(map(str, keys))}" if keys is not None else type(batch).__name__
    return None, (
        f"{owner} leaves padding out by the batch's {mask!r}, which this batch does not have "
        f"({has}); name another with mask=, or pass mask=None if nothing is padded"
    )


def batch_decoder_mask(batch: Any) -> Tensor | None:
    """Return the padding mask of a decoder's own input, or None if the batch has none.

    That is its ``decoder_attention_mask``, or where its ``labels`` are not -100: a decoder reads
    at each position the label of the one before.

    Example:
        >>> batch_decoder_mask({"labels": torch.tensor([[7, 8], [9, -100]])}).tolist()
        [[True, True], [True, False]]
    """
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor):
        return mask
    return labels != IGNORED if isinstance(labels, Tensor) and labels.ndim == 2 else None
