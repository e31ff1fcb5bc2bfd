"""Numbers of examples, and of terms of the loss, of batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import ObservationError
from lrcompress.statistics.masks import IGNORED


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
