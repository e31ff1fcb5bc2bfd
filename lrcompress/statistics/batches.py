"""Numbers of examples, and of terms of the loss, of batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import ObservationError
from lrcompress.statistics.masks import IGNORED

_DEPTH, _BREADTH = 12, 16  # steps from a loss back to its cross-entropy, and branches
_MEAN = 1  # of torch's reductions


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


def batch_terms(batch: Any, loss: Tensor | None = None) -> int:
    """Return how many terms a mean loss of this batch averages: its tokens, or examples.

    Where its ``labels`` are whole numbers ``(examples, length)``, those that are not -100 count;
    without them what a cross-entropy in ``loss`` has averaged, as :func:`loss_terms` finds it; else
    the examples.

    Raises:
        ObservationError: if the examples are to be counted and there is no tensor in the batch.

    Example:
        >>> batch_terms({"labels": torch.tensor([[7, 8], [9, -100]])})
        3
    """
    found = labelled_terms(batch)
    if found is None and loss is not None:
        found = loss_terms(loss)
    return batch_examples(batch) if found is None else found


def labelled_terms(batch: Any) -> int | None:
    """Return how many tokens a batch has labels for; None where it has no labels of tokens."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.dtype == torch.int64:
        return max(1, int((labels != IGNORED).sum()))
    return None


def loss_terms(loss: Tensor) -> int | None:
    """Return how many terms the cross-entropy in a loss is the mean of, from its autograd graph.

    None where there is none within a few steps of the end, where classes have weights, where it is
    a sum, and where there are several of different numbers. Waits for the device.

    Example:
        >>> logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([1, -100])
        >>> loss_terms(torch.nn.functional.cross_entropy(logits, labels) / 4)
        1
    """
    found: set[int | None] = set()
    nodes: list[Any] = [loss.grad_fn]
    for _ in range(_DEPTH):
        behind: list[Any] = []
        for node in filter(None, nodes):
            if node.name().startswith("NllLoss"):
                found.add(_averaged(node))
            else:
                behind += [next_node for next_node, _ in node.next_functions]
        nodes = behind[:_BREADTH]
    return found.pop() if len(found) == 1 else None


def _averaged(node: Any) -> int | None:
    if node._saved_reduction != _MEAN or node._saved_weight is not None:
        return None
    return max(1, int(node._saved_total_weight))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def batch_shape(batch: Any) -> tuple[int, ...]:
    """Return the leading sizes of a batch: examples and length, or examples alone.

    They are those of its largest tensor of whole numbers with two sizes; where there is none, the
    examples.

    Raises:
        ObservationError: if there is no tensor in it.

    Example:
        >>> batch_shape({"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
        (2, 7)
    """
    tokens = [x for x in _tensors(batch) if x.ndim == 2 and not x.is_floating_point()]
    if not tokens:
        return (batch_examples(batch),)
    return tuple(max(tokens, key=Tensor.numel).shape)


def resized_batch(batch: Any, examples: int, length: int) -> Any:
    """Return a batch of other sizes: tensors repeat their examples and tokens, or are cut.

    Args:
        batch: whose tensors have the leading sizes of :func:`batch_shape`; others stay.
        examples: of the new one.
        length: of the new one; nothing has one where the batch has none.

    Raises:
        ObservationError: if there is no tensor in it.

    Example:
        >>> resized_batch({"ids": torch.tensor([[1, 2, 3]]), "n": 5}, 2, 4)["ids"].tolist()
        [[1, 2, 3, 1], [1, 2, 3, 1]]
    """
    shape = batch_shape(batch)

    def resized(x: Tensor) -> Tensor:
        for place, size in enumerate((examples, length)[: len(shape)]):
            if x.ndim <= place or x.shape[place] != shape[place]:
                break
            x = x.index_select(place, torch.arange(size, device=x.device) % shape[place])
        return x

    return _mapped(batch, resized)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return type(batch)({key: _mapped(part, change) for key, part in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        parts = [_mapped(part, change) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
