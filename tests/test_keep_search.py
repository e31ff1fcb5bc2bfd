"""Bisection finds what brute force finds; drops, directions and recovery are as they say."""

import math
import random

import pytest

from lrcompress.errors import SettingError
from lrcompress.keep_search import (
    GRID,
    Drop,
    Recovery,
    Target,
    allowed_loss,
    better_direction,
    check_leaves_some,
    check_monitor,
    grid_below,
    smallest_within,
)


def always() -> bool:
    return True


@pytest.mark.parametrize("size", [0, 1, 2, 7, 99])
def test_bisection_finds_the_least_as_brute_force_does(size: int) -> None:
    for first in range(size + 1):
        for impossible in range(0, size + 1, 3):
            tried: list[int] = []

            def within(number: int, first: int = first, tried: list[int] = tried) -> bool:
                tried.append(number)
                return number >= first

            found = smallest_within(size, lambda i, n=impossible: i >= n, within, always)
            brute = [i for i in range(size) if i >= max(first, impossible)]
            assert found == min(brute, default=size)
            assert len(tried) == len(set(tried)) <= math.ceil(math.log2(size + 1))
            assert all(number >= impossible for number in tried)


@pytest.mark.parametrize("size", [1, 2, 7, 99])
def test_from_a_guess_the_same_is_found_sooner_the_nearer_it_is(size: int) -> None:
    for first in range(size + 1):
        for guess in range(size + 1):
            tried: list[int] = []

            def within(number: int, first: int = first, tried: list[int] = tried) -> bool:
                tried.append(number)
                return number >= first

            found = smallest_within(size, lambda i: i >= size // 3, within, always, guess)
            assert found == max(first, size // 3)
            assert len(tried) == len(set(tried))
            off = abs(guess - found)
            assert len(tried) <= 2 + 2 * math.log2(off + 1)


def test_what_is_found_was_within_even_where_losses_do_not_fall() -> None:
    rng = random.Random(0)
    for _ in range(200):
        good = [rng.random() < 0.5 for _ in GRID]
        found = smallest_within(len(GRID), lambda _: True, lambda i, g=good: g[i], always)
        assert found == len(GRID) or good[found]
        assert found == 0 or not good[found - 1]


def test_the_least_so_far_is_taken_where_no_more_may_be_tried() -> None:
    tried: list[int] = []
    found = smallest_within(
        99, lambda _: True, lambda i: tried.append(i) or i >= 30, lambda: len(tried) < 3
    )
    assert (found, len(tried)) == (36, 3)
    assert smallest_within(99, lambda _: True, lambda _: False, lambda: False) == 99


def test_seven_trials_find_any_hundredth() -> None:
    assert math.ceil(math.log2(len(GRID) + 1)) == 7
    assert grid_below(1.0) == list(GRID)
    assert grid_below(0.3) == list(GRID[:29])
    assert grid_below(0.3049) == list(GRID[:30])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_loss", "min"),
        ("val/loss/dataloader_idx_0", "min"),
        ("val_acc", "max"),
        ("eval_accuracy", "max"),
        ("Perplexity", "min"),
        ("val_ppl", "min"),
        ("word_error_rate", "min"),
        ("val_F1", "max"),
        ("f1_score", "max"),
        ("brier_score", "min"),
        ("rouge1", "max"),
        ("val_exact_match", "max"),
        ("matthews_correlation", "max"),
        ("score", "max"),
        ("val_metric", None),
        ("glossary", None),
    ],
)
def test_directions_by_name(name: str, mode: str | None) -> None:
    assert better_direction(name) == mode
    if mode is not None:
        assert check_monitor(name, None) == mode
    assert check_monitor(name, "min") == "min"


def test_a_direction_that_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(SettingError, match=r"monitor_mode is missing: 'val_metric' does not say"):
        check_monitor("val_metric", None)
    with pytest.raises(SettingError, match=r"'max' \(higher is better\) or 'min'.*got 'higher'"):
        check_monitor("val_loss", "higher")


@pytest.mark.parametrize("drop", [-0.1, "-1%", "a bit", True, None, math.nan, math.inf, "", "%"])
def test_drops_that_are_none(drop: object) -> None:
    with pytest.raises(SettingError, match=r"drop is by how much .* got"):
        Drop.parse(drop)


def test_drops() -> None:
    assert Drop.parse(0).amount(0.9) == 0
    assert Drop.parse("0.02").amount(0.9) == 0.02
    assert Drop.parse(" 2 %").amount(-50.0) == 1.0
    assert Drop.parse("1%").amount(0.5) == 0.005


@pytest.mark.parametrize("drop", ["100%", 1, 0.41])
def test_a_drop_of_the_whole_figure_was_hardly_meant(drop: object) -> None:
    told = r"drop=\S+ allows all of val_accuracy to be lost, which is 0.41 .* give drop='1%'"
    with pytest.raises(SettingError, match=told):
        Target.of("val_accuracy", "max", 0.41, Drop.parse(drop))
    assert Target.of("val_loss", "min", 0.41, Drop.parse(drop)).drop >= 0.41
    assert Target.of("val_gain", "max", 0.0, Drop.parse(1)) == Target("max", 0.0, 1.0)


def test_what_allows_all_to_be_lost_is_known_without_the_figure() -> None:
    told = r"drop='100%' allows all of val_accuracy to be lost; give drop='1%' for a hundredth"
    with pytest.raises(SettingError, match=told):
        check_leaves_some(Drop.parse("100%"), "val_accuracy", "max")
    told = r"drop=1.5 allows all of val_f1 to be lost, which is at most 1; .* 0.01 for a hundredth"
    with pytest.raises(SettingError, match=told):
        check_leaves_some(Drop.parse(1.5), "val_f1", "max", most=1.0)
    check_leaves_some(Drop.parse(1.5), "val_f1", "max")  # may be of a hundred
    check_leaves_some(Drop.parse(0.99), "val_f1", "max", most=1.0)
    check_leaves_some(Drop.parse("100%"), "val_loss", "min", most=1.0)


def test_what_is_lost_counts_up_in_both_directions() -> None:
    higher, lower = Target("max", 0.93, 0.01), Target("min", 2.0, 0.1)
    assert higher.lost(0.9) == pytest.approx(0.03)
    assert lower.lost(2.05) == pytest.approx(0.05)
    assert lower.lost(1.5) < 0
    assert 0.93 - 0.92 > 0.01  # in floats
    assert higher.is_within(higher.lost(0.92))
    assert not higher.is_within(higher.lost(0.9199))
    assert lower.is_within(lower.lost(2.3), allowed=0.3)
    assert not lower.is_within(lower.lost(math.nan))
    assert not lower.is_within(lower.lost(math.inf))
    assert Target("max", 0.0, 0.0).is_within(0.0), "nothing lost of nothing"


def test_recovery_is_a_share_that_shorter_training_has_less_of() -> None:
    assert Recovery.measured(0.0, 0.0, 10) is None
    assert Recovery.measured(-0.1, 0.2, 10) is None
    assert Recovery.measured(0.1, math.nan, 10) is None
    worse = Recovery.measured(0.1, 0.3, 10)
    assert worse == Recovery(0.0, 10)
    better = Recovery.measured(0.1, -0.5, 10)  # than the dense model: not relied on in full
    assert better == Recovery(0.75, 10)
    assert Recovery.measured(0.04, 0.03, 10) == Recovery(0.25, 10)
    assert Recovery(0.75, 1).over(0.5) == Recovery(0.75, 0).over(0.5) == 0.5
    half = Recovery(0.5, 40)
    assert [half.over(steps) for steps in (0, 40, 400, math.inf)] == [0.0, 0.5, 0.5, 0.5]
    assert 1 - half.over(20) == pytest.approx(math.sqrt(0.5))


def test_what_may_be_lost_at_a_point_comes_back_to_the_drop() -> None:
    for shares in ([0.5], [0.75, 0.2], [0.0, 0.6]):
        measured = [Recovery(share, 100) for share in shares]
        for steps in (10, 100, 1000):
            allowed = allowed_loss(0.02, measured, steps, last=True)
            left = max((1 - one.share) ** min(1, steps / 100) for one in measured)
            assert allowed * left == pytest.approx(0.02)
            anew = allowed_loss(0.02, measured, steps, last=True, left=0.012) - 0.012
            assert 0.012 + anew * left == pytest.approx(0.02)
            assert allowed_loss(0.02, measured, steps, last=True, left=0.03) == 0.02
            assert allowed_loss(0.02, measured, steps, last=True, left=-0.03) == allowed
    assert allowed_loss(0.02, [], 10, last=True) == 0.02
    assert allowed_loss(0.02, [], 10, last=False) == 0.04
    assert allowed_loss(0.0, [], 10, last=False) == 0
