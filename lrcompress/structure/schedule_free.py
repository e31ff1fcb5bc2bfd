"""Schedule-free optimizers, whose parameters are averages in one mode and not in the other.

Those of the package ``schedulefree`` keep ``z``, where plain steps lead, and give the parameters
the average ``x`` of it in evaluation mode, ``y = x + (1 − β) (z − x)`` in training mode. ``x`` is
what a run ends with, so that is what is factored. A factor has no past to average: averaging then
begins anew, from ``x`` of all parameters, with second moments carried over as for Adam.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_POSITION = "z"  # the state that is a place, and no gradient
_FOLLOWED = frozenset({"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"})


def is_schedule_free(optimizer: object) -> bool:
    """Return whether an optimizer is one of those that are followed here."""
    return bool(_FOLLOWED & {kind.__name__ for kind in type(optimizer).__mro__})


def unknown_schedule_free(optimizer: object) -> bool:
    """Return whether an optimizer is schedule-free by its name, and keeps its averages otherwise.

    Such as ``ScheduleFreeWrapper``, the ``Reference`` and ``Closure`` ones, and other packages'.
    """
    named = "ScheduleFree" in type(optimizer).__name__
    return named and not is_schedule_free(optimizer)


@contextmanager
def averaged(optimizers: Iterable[Any]) -> Iterator[None]:
    """Give parameters their averages inside the block, and the mode of before after it.

    That mode is restored even where hooks within have set another. Other optimizers have none.
    """
    every = [(one, _trains(one)) for one in optimizers if is_schedule_free(one)]
    try:
        for one, _ in every:
            one.eval()
        yield
    finally:
        for one, trains in every:
            (one.train if trains else one.eval)()


def _trains(optimizer: Any) -> bool:
    return bool(optimizer.param_groups[0]["train_mode"])


@torch.no_grad()
def begin_averages_(optimizers: Iterable[Any]) -> None:
    """Begin averaging anew from the parameters, which are averages now: ``z = x``.

    Raises:
        RuntimeError: if an optimizer is not in evaluation mode.
    """
    for optimizer in optimizers:
        if not is_schedule_free(optimizer):
            continue
        if _trains(optimizer):
            raise RuntimeError("averages begin within averaged(), in evaluation mode")
        for group in optimizer.param_groups:
            group["weight_sum"] = 0.0
            for parameter in group["params"]:
                position: Tensor | None = optimizer.state[parameter].get(_POSITION)
                if position is not None:
                    position.copy_(parameter)


def without_positions(
    optimizer: object, states: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """Return what state holds of gradients, and whether it has places too."""
    if not is_schedule_free(optimizer) or not any(_POSITION in state for state in states):
        return states, False
    return [{k: x for k, x in state.items() if k != _POSITION} for state in states], True


def position_at(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter whose averages begin with it."""
    return {_POSITION: parameter.detach().clone()}
