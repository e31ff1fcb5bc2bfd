"""What a batch says of itself: which positions are real, and how many examples it holds."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lrcompress.errors import ObservationError

MASK = "attention_mask"


def batch_examples(batch: Any) -> int:
    """Return how many examples a batch holds: the leading size of its first tensor.

    Raises:
        ObservationError: if there is no tensor in it.

    Example:
        >>> batch_examples({"input_ids": torch.zeros(4, 7)})
        4
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    for part in parts if isinstance(parts, Iterable) and not isinstance(parts, str) else ():
        if isinstance(part, Tensor | Mapping | list | tuple):
            return batch_examples(part)
    raise ObservationError(f"no tensor in a batch of type {type(batch).__name__}")


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
