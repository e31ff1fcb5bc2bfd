"""Points in training and schedules."""

import math

import pytest

from lrcompress.errors import SettingError
from lrcompress.schedules import Point, Warmup


@pytest.mark.parametrize(
    ("text", "point", "step"),
    [
        (0, Point("fraction", 0.0), 0),
        (0.4, Point("fraction", 0.4), 40),
        ("0.4", Point("fraction", 0.4), 40),
        ("epoch:2", Point("epoch", 2), 50),
        ("step:7", Point("step", 7), 7),
    ],
)
def test_a_point_is_read_printed_back_and_placed(
    text: float | str, point: Point, step: int
) -> None:
    assert Point.parse(text) == point
    assert Point.parse(str(point)) == point
    assert point.step(total_steps=100, steps_per_epoch=25) == step


@pytest.mark.parametrize("tenths", range(10))
def test_fractions_are_not_a_step_short_by_rounding(tenths: int) -> None:
    assert Point.parse(tenths / 10).step(30, 10) == 3 * tenths


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (1.0, r"got 1.0; did you mean 'epoch:1'\?"),
        (2, r"got 2; did you mean 'epoch:2'\?"),
        ("3", r"got 3.0; did you mean 'epoch:3'\?"),
        (-0.1, "got -0.1$"),
        (math.nan, "got nan$"),
        ("nan", "got nan$"),
        (True, "got True$"),
        (False, "got False$"),
        ("half", "got 'half'"),
        ("epoch:1.5", "got 'epoch:1.5'"),
        ("step:-3", "got 'step:-3'"),
        ("steps:3", "got 'steps:3'"),
        ("step:", "got 'step:'"),
    ],
)
def test_what_is_no_point_is_refused_in_the_words_it_was_given(
    text: float | str, found: str
) -> None:
    with pytest.raises(SettingError, match=f"fraction of training between 0 and 1.*{found}"):
        Point.parse(text)


@pytest.mark.parametrize("text", ["step:100", "step:101", "epoch:4"])
def test_a_point_at_or_beyond_the_end_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=rf"point {text} is step 10\d, .*\(100 steps\)"):
        Point.parse(text).step(100, 25)


@pytest.mark.parametrize("text", [0.5, "epoch:1"])
def test_a_point_without_a_known_length_says_how_to_give_one(text: float | str) -> None:
    with pytest.raises(SettingError, match=r"cannot be placed.*set max_steps .* or write 'step:N'"):
        Point.parse(text).step(math.inf, math.inf)


def test_a_step_needs_no_known_length() -> None:
    assert Point.parse("step:9").step(math.inf, math.inf) == 9
    assert Point.parse("epoch:2").step(math.inf, 5) == 10


def test_a_warmup_rises_in_even_steps_to_its_scale_and_stays() -> None:
    warmup = Warmup(5, 2.0)
    values = [warmup(step) for step in range(8)]
    assert values == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0])


def test_a_warmup_of_no_steps_is_its_scale() -> None:
    assert Warmup(0, 0.5)(0) == 0.5
