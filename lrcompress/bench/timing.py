"""Timing of interleaved calls, so that other load on the machine falls on all alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lrcompress.errors import SettingError


def now() -> float:
    """Return a time in seconds; CPU time of this process where one thread does all the work.

    CPU time of one thread is the same on a busy machine as on an idle one. With several threads or
    an accelerator, which is waited for, it is wall-clock time.
    """
    if one_thread():
        return time.process_time()
    # torch.utils.benchmark.timer is the same, and imports setuptools, which torch does not bring
    # along before Python 3.12
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def one_thread() -> bool:
    """Return whether one CPU thread does all the work."""
    return torch.get_num_threads() == 1 and not torch.accelerator.is_available()


def interleaved(
    work: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of every call in every round.

    Each is called once before to warm up, which is not counted.

    Args:
        work: what is called, by name.
        rounds: in each of which all take a turn.
        calls: in each turn, whose mean counts. An accelerator is waited for twice a turn, which
            short calls would be measured with if there were one only.

    Raises:
        SettingError: if ``rounds`` is less than 1.

    Example:
        >>> taken = interleaved({"a": lambda: sum(range(9)), "b": lambda: None}, rounds=3)
        >>> [(name, len(seconds)) for name, seconds in taken.items()]
        [('a', 3), ('b', 3)]
    """
    if rounds < 1:
        raise SettingError(f"rounds must be a whole number from 1, got {rounds}")
    taken: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(rounds):
        for name, call in work.items():
            start = now()
            for _ in range(calls):
                call()
            taken[name].append((now() - start) / calls)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over rounds of ``above / below``.

    Example:
        >>> ratio([2.0, 2.0, 9.0], [1.0, 1.0, 1.0])
        2.0
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@contextmanager
def timed_layers(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Measure the seconds that layers of ``model`` take while the block runs.

    On an accelerator each layer is waited for, so that it counts with the time to start it.

    Yields:
        Layer name to seconds, over all calls so far.
    """
    spent = dict.fromkeys(names, 0.0)

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        begun = 0.0

        def before(*_: object) -> None:
            nonlocal begun
            begun = now()

        def after(*_: object) -> None:
            spent[name] += now() - begun

        return before, after

    with ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            before, after = watch(name)
            for handle in (
                layer.register_forward_pre_hook(before),
                layer.register_forward_hook(after),
            ):
                hooks.callback(handle.remove)
        yield spent
