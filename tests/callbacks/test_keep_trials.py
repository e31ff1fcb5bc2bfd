"""Trials of a search begin on a share of the data and end on all of it."""

from typing import cast

import pytest

from lrcompress.callbacks.keep_trials import Figures, KeepTrials
from lrcompress.engine.solved_model import Sizes, SolvedModel
from lrcompress.errors import SettingError
from lrcompress.keep_search import GRID, Target


class Chosen:
    """Sizes that are a number of ranks."""

    def __init__(self, ranks: int) -> None:
        self.key = ranks


class Solved:
    """A model of 50 ranks, of which keep takes whole ones, and 5 at least."""

    standing = Chosen(50)

    def choose(self, keep: float) -> Chosen:
        if keep * 50 < 5:
            raise SettingError("too little")
        return Chosen(int(keep * 50 + 1e-9))

    def kept(self, sizes: Chosen) -> float:
        return sizes.key / 50


def trials_of(
    first: int, off: int = 0, most: int = 7, part: float = 0.85
) -> tuple[KeepTrials, list[tuple[int, float]]]:
    """Of a model that may lose .1 from .9, and does below ``first`` ranks, or on a share, ``off``
    ranks later, where all models are worse."""
    measured: list[tuple[int, float]] = []

    def measure(sizes: Sizes | None, share: float) -> Figures:
        ranks = 50 if sizes is None else cast("int", sizes.key)
        measured.append((ranks, share))
        good = ranks >= first + (0 if share == 1 else off)
        return {"accuracy": (0.9 if share == 1 else part) - (0.05 if good else 0.2) * (ranks < 50)}

    target, standing = Target("max", 0.9, 0.1), {"accuracy": 0.9}
    solved = cast("SolvedModel", Solved())
    return KeepTrials(solved, target, 0.1, "accuracy", standing, measure, {}, most), measured


@pytest.mark.parametrize("first", [5, 6, 17, 33, 49])
@pytest.mark.parametrize("off", [0, -3, 8])
def test_from_a_share_the_same_is_found_in_fewer_whole_passes(first: int, off: int) -> None:
    whole, every = trials_of(first)
    found = whole.search()
    assert found == next(x for x in GRID if int(x * 50 + 1e-9) >= first and x in whole.tried)
    trials, measured = trials_of(first, off)
    again = trials.search(0.1)
    assert again is not None
    assert found is not None
    assert int(again * 50 + 1e-9) == int(found * 50 + 1e-9) == first
    on_all = [ranks for ranks, share in measured if share == 1]
    assert len(on_all) == len(set(on_all)) == len(trials.tried)
    assert off or len(on_all) <= 2 < len(every)
    assert measured[0] == (50, 0.1)
    assert [x.share for x in trials.trials] == [share for _, share in measured[1:]]
    assert again in trials.tried


def test_what_is_lost_on_a_share_is_counted_beside_the_present_model() -> None:
    trials, _ = trials_of(20, part=0.5)
    trials.search(0.25)
    first = trials.trials[0]
    assert (first.share, first.value, first.within) == (0.25, pytest.approx(0.45), True)
    assert first.lost == pytest.approx(0.05)


def test_a_present_model_without_a_figure_on_a_share_decides_nothing() -> None:
    trials, _ = trials_of(20, part=float("nan"))
    found = trials.search(0.25)
    assert found is not None
    assert all(x.within == (x.share == 1 and x.keep >= found) for x in trials.trials)
    assert all(x.value is x.lost is None for x in trials.trials if x.share < 1)


def test_passes_are_counted_by_their_shares() -> None:
    trials, _ = trials_of(33, most=2)
    assert trials.search() is not None
    assert len(trials.trials) == 2
    trials, _ = trials_of(33, most=2)
    found = trials.search(0.25)
    assert found is not None
    assert found * 50 == pytest.approx(33, abs=1)
    assert 2 <= sum(x.share for x in trials.trials) < 3
