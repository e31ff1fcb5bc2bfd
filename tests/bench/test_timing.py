"""Calls in turns, and layers timed within their model."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lrcompress.bench.timing import interleaved, now, ratio, timed_layers
from lrcompress.errors import SettingError


def test_calls_take_turns_after_one_that_is_not_counted() -> None:
    called: list[str] = []
    work: dict[str, Callable[[], object]] = {n: (lambda n=n: called.append(n)) for n in "ab"}
    taken = interleaved(work, 3)
    assert "".join(called) == "ab" * 4
    assert [len(taken[name]) for name in "ab"] == [3, 3]
    with pytest.raises(SettingError, match="rounds must be a whole number from 1, got 0"):
        interleaved(work, 0)


def test_a_turn_of_several_calls_gives_their_mean() -> None:
    called: list[str] = []
    work: dict[str, Callable[[], object]] = {n: (lambda n=n: called.append(n)) for n in "ab"}
    assert len(interleaved(work, 2, calls=3)["a"]) == 2
    assert "".join(called) == "ab" + "aaabbb" * 2
    one, three = (
        sum(interleaved({"": lambda: sum(range(20_000))}, 5, calls=n)[""]) for n in (1, 3)
    )
    assert 0.3 < three / one < 3


def test_one_thread_is_timed_by_its_own_work_several_by_what_passes() -> None:
    threads = torch.get_num_threads()
    try:
        for count, waited in ((1, False), (2, True)):
            torch.set_num_threads(count)
            start = now()
            time.sleep(0.1)
            assert (now() - start > 0.09) == waited
    finally:
        torch.set_num_threads(threads)


def test_a_ratio_is_the_median_of_rounds() -> None:
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 1.0]) == 3.0


def test_layers_are_timed_within_their_model_and_hooks_come_off() -> None:
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 2))
    x = torch.randn(500, 600)
    with timed_layers(model, ["0", "2"]) as spent:
        start = now()
        model(x), model(x)
        whole = now() - start
    assert 0 < spent["2"] < spent["0"]
    assert spent["0"] + spent["2"] <= whole
    with pytest.raises(RuntimeError, match="shapes"), timed_layers(model, ["0"]):
        model(x.T)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
