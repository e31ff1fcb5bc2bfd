"""All-or-nothing changes of a model's layers and its optimizers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.statistics.views import view
from lrcompress.structure.surgery import replace_

PutAway = Callable[[Iterable[str]], None]


@contextmanager
def all_or_nothing(
    model: nn.Module, names: Iterable[str], optimizers: Iterable[Optimizer]
) -> Iterator[PutAway]:
    """Replace layers atomically: restore layers and optimizers if the block fails.

    Other processes may die in the middle of it, and what is saved then must be consistent.

    Args:
        model: changed in the block.
        names: of the layers that the block replaces; their biases may be changed in place.
        optimizers: whose groups and state the block changes.

    Yields:
        A function that moves what was replaced, its gradients and optimizer state to the CPU, for
        names of layers that have been. What the model still uses elsewhere stays; other parameters
        are empty from then on, unless the block fails.
    """
    put_away, put_back = _held(model, names, optimizers)
    with ExitStack() as stack:
        stack.callback(put_back)
        yield put_away
        stack.pop_all()


@contextmanager
def undone(model: nn.Module, names: Iterable[str]) -> Iterator[PutAway]:
    """Replace layers for the time of the block only: restore them after it in any case.

    Args:
        model: changed in the block, and as it was after it; no optimizer may be.
        names: of the layers that the block replaces; their biases may be changed in place.

    Yields:
        The same as :func:`all_or_nothing`.
    """
    put_away, put_back = _held(model, names, ())
    try:
        yield put_away
    finally:
        put_back()


def _held(
    model: nn.Module, names: Iterable[str], optimizers: Iterable[Optimizer]
) -> tuple[PutAway, Callable[[], None]]:
    """Return what puts layers away that were replaced, and what puts all of them back."""
    layers = {name: model.get_submodule(name) for name in names}
    biases = [view(layer, table=True).bias for layer in layers.values()]
    values = [(bias, bias.detach().clone()) for bias in biases if bias is not None]
    held = [(x, [_listed(group) for group in x.param_groups], dict(x.state)) for x in optimizers]
    away: list[_PutAway] = []

    def put_away(done: Iterable[str]) -> None:
        used = set(map(id, model.parameters()))
        old = (parameter for name in done for parameter in layers[name].parameters())
        for parameter in (x for x in old if id(x) not in used and x.device.type != "cpu"):
            states = [state[parameter] for _, _, state in held if parameter in state]
            away.append(_PutAway(parameter, states))

    def put_back() -> None:
        for one in away:
            one.put_back_()
        for name, layer in layers.items():
            replace_(model, name, layer)
        for bias, value in values:
            bias.detach().copy_(value)
        for optimizer, groups, state in held:
            _restore_(optimizer, groups, state)

    return put_away, put_back


class _PutAway:
    """A parameter with its gradient and optimizer state, which lie on the CPU for now."""

    def __init__(self, parameter: Tensor, states: Sequence[dict[str, Any]]) -> None:
        self.parameter, self.states, self.device = parameter, states, parameter.device
        self.grad = None if parameter.grad is None else parameter.grad.cpu()
        parameter.grad = None
        self.value = parameter.detach().cpu()
        parameter.data = parameter.data.new_empty(0)  # others may still refer to it
        self._move_(torch.device("cpu"))

    def put_back_(self) -> None:
        self._move_(self.device)
        self.parameter.data = self.value.to(self.device)
        self.parameter.grad = None if self.grad is None else self.grad.to(self.device)

    def _move_(self, device: torch.device) -> None:
        for state in self.states:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # counts of steps are where they are
                    state[key] = value.to(device)


def _restore_(
    optimizer: Optimizer, groups: Iterable[Mapping[str, list[Any]]], state: Mapping[Tensor, Any]
) -> None:
    for group, lists in zip(optimizer.param_groups, groups, strict=True):
        group.update(lists)
    optimizer.state.clear()
    optimizer.state.update(state)


def _listed(group: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: list(group[key]) for key in ("params", "param_names") if key in group}
