"""What a batch says of itself: which positions are real, and how many examples it holds."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lrcompress.errors import ObservationError

MASK = "attention_mask"


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


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def batch_mask(
    batch: Any, mask: str | Callable[[Any], Tensor] | None, owner: str
) -> tuple[Tensor | None, str | None]:
    """Return a batch's padding mask, or why there is none where one was expected."""
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
