"""Magnitude pruning: choose the largest entries, of each layer or of all together."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from lrcompress.errors import SettingError

Key = TypeVar("Key")
SCOPES = ("global", "layer")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_scope(scope: str) -> None:
    """Check the scope over which magnitudes are compared.

    Raises:
        SettingError: if it is neither ``global`` nor ``layer``.
    """
    if scope not in SCOPES:
        raise SettingError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


class Computed(Mapping[Key, Tensor]):
    """Tensors by name that are computed anew whenever one is read, so that one is held at a time.

    Args:
        names: of the tensors.
        compute: returns the tensor of a name.
    """

    def __init__(self, names: Collection[Key], compute: Callable[[Key], Tensor]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: Key) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def largest(scores: Mapping[Key, Tensor], keep: float, scope: str) -> Iterator[tuple[Key, Tensor]]:
    """Yield which entries are the largest, exactly ``round(keep · entries)`` of them.

    Of equal ones the first stay.

    Args:
        scores: name to a tensor of any shape; finite, or infinite for what stays in any case.
        keep: share of the entries that stay, from 0 to 1.
        scope: ``global``: of all tensors together; ``layer``: of each.

    Yields:
        Name and bool of the shape of its scores.

    Cost:
        As :func:`largest_entries`.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0, 2.0])}
        >>> {name: stays.tolist() for name, stays in largest(scores, 0.5, "global")}
        {'a': [True, False], 'b': [True, False]}
    """
    for names in [[name] for name in scores] if scope == "layer" else [list(scores)]:
        group = Computed(names, scores.__getitem__)
        yield from largest_entries(group, round(keep * sum(scores[x].numel() for x in names)))


def largest_entries(scores: Mapping[Key, Tensor], count: int) -> Iterator[tuple[Key, Tensor]]:
    """Yield which entries are the ``count`` largest of all tensors together.

    Of equal ones the first stay; those of ``-inf`` are never taken. The least that stays is found
    by bisecting the bits of a number, whose order is that of the numbers themselves: each step
    counts how many are as large, tensor by tensor.

    Args:
        scores: name to a tensor of any shape, without NaN; read some 35 times, one at a time.
        count: entries that stay, if there are so many.

    Yields:
        Name and bool of the shape of its scores, in the order of ``scores``.

    Cost:
        Memory of one tensor of scores and a bool of its shape. Time of at most 32 comparisons of
        all of them, as many as a number has bits, and one wait for the device in each.
    """
    dtype = reduce(torch.promote_types, (scores[name].dtype for name in scores), torch.bfloat16)
    least = torch.finfo(dtype).min
    found = sum(_counts(scores, dtype, torch.gt, -torch.inf))
    count = max(0, min(count, found))
    low, high = _place(least, dtype), _place(torch.inf, dtype)
    while low < high and found != count:  # of the numbers that so many reach the largest
        middle = (low + high + 1) // 2
        number = _number(middle, dtype)
        reach = sum(_counts(scores, dtype, torch.ge, number))
        if reach < count:
            high = middle - 1
        else:
            low, least, found = middle, number, reach
    equal = [0] * len(scores)
    if found != count:
        equal = _counts(scores, dtype, torch.eq, least)
    left = count - (found - sum(equal))
    for name, ties in zip(scores, equal, strict=True):
        yield name, _reaching(scores[name].to(dtype), least, ties, left)
        left = max(0, left - ties)


def _reaching(one: Tensor, least: float, ties: int, left: int) -> Tensor:
    """Return which entries are above ``least``, and ``left`` of the ``ties`` that equal it."""
    if left >= ties:
        return (one >= least).contiguous()
    stays = (one > least).contiguous()
    if left:
        first = (one == least).flatten().nonzero().squeeze(1)[:left]
        stays.view(-1)[first] = True
    return stays


def _counts(
    scores: Mapping[Key, Tensor],
    dtype: torch.dtype,
    compare: Callable[[Tensor, float], Tensor],
    number: float,
) -> list[int]:
    """Return how many entries of each tensor compare so to a number: one wait for the device."""
    counts: list[Tensor] = []
    for name in scores:  # without a name for the last one while the next one is computed
        counts.append(compare(scores[name].to(dtype), number).count_nonzero())
        counts[-1] = counts[-1].to(counts[0].device)
    return list(map(int, torch.stack(counts).tolist())) if counts else []


def _number(place: int, dtype: torch.dtype) -> float:
    """Return the number at a place among all of its type in rising order; 0 is at place 0."""
    kind = _BITS[dtype.itemsize]
    bits = place if place >= 0 else place ^ torch.iinfo(kind).max
    return float(torch.tensor([bits], dtype=kind).view(dtype).tolist()[0])


def _place(number: float, dtype: torch.dtype) -> int:
    """Return the place of :func:`_number`."""
    kind = _BITS[dtype.itemsize]
    bits = int(torch.tensor([number], dtype=dtype).view(kind).tolist()[0])
    return bits if bits >= 0 else bits ^ torch.iinfo(kind).max
