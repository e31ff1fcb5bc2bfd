"""Points in training and schedules."""

import itertools
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from lrcompress.errors import SettingError
from lrcompress.schedules import Cubic, Piecewise, Point, Warmup, parse_points, squeeze


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
        (-1, "got -1$"),
        (1.5, "got 1.5$"),
        (math.nan, "got nan$"),
        ("nan", "got nan$"),
        (True, "got True$"),
        (False, "got False$"),
        ("half", "got 'half'$"),
        ("after 12", r"got 'after 12'; did you mean 'epoch:12' or 'step:12'\?$"),
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


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, 1.0),
        (9, 1.0),
        (10, 1.0),
        (11, 0.2 + 0.8 * 0.95**3),
        (15, 0.2 + 0.8 * 0.75**3),
        (20, 0.2 + 0.8 * 0.125),
        (29, 0.2 + 0.8 * 0.05**3),
        (30, 0.2),
        (31, 0.2),
        (10**9, 0.2),
    ],
)
def test_a_cubic_keeps_all_until_it_starts_and_its_final_share_once_it_stops(
    step: int, kept: float
) -> None:
    assert Cubic(10, 30, 0.2)(step) == pytest.approx(kept, abs=1e-15)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 50), (7, 8), (3, 1000)])
@pytest.mark.parametrize("final", [0.0, 0.1, 0.3, 1.0])
def test_a_cubic_falls_without_a_jump_ever_more_slowly_to_exactly_its_end(
    start: int, stop: int, final: float
) -> None:
    cubic = Cubic(start, stop, final)
    values = [cubic(step) for step in range(stop + 3)]
    assert values[: start + 1] == [1.0] * (start + 1)
    assert values[stop:] == [final] * 3
    falls = [before - after for before, after in itertools.pairwise(values[start:])]
    assert all(fall >= -1e-15 for fall in falls)
    assert all(later <= fall + 1e-12 for fall, later in itertools.pairwise(falls))
    # the steepest slope is at the start: thrice that of a straight line
    assert max(falls) <= 3 * (1 - final) / (stop - start) + 1e-12


def test_a_cubic_that_starts_where_it_stops_is_a_jump() -> None:
    assert [Cubic(5, 5, 0.3)(step) for step in (4, 5, 6)] == [1.0, 0.3, 0.3]


def values(given: object, *steps: int) -> list[float]:
    return [Piecewise.parse(given).at(step, 100, 25) for step in steps]


def test_a_value_is_linear_between_points_and_constant_outside() -> None:
    assert values(0.3, 0, 99) == [0.3, 0.3]
    assert values({0.2: 1.0, "step:40": 3.0, "epoch:2": 2.0}, 0, 20, 30, 40, 45, 50, 99) == [
        *(1.0, 1.0, 2.0, 3.0, 2.5, 2.0, 2.0)
    ]


def test_a_pair_is_a_jump() -> None:
    assert values({"epoch:1": [0.0, 1.0]}, 0, 24, 25, 99) == [0.0, 0.0, 1.0, 1.0]
    assert values({0: 0, "step:10": (1.0, 5), "step:20": 6}, 5, 10, 15, 30) == [0.5, 5.0, 5.5, 6.0]


@pytest.mark.parametrize("end", [1, 1.0, "1", "1.0", "step:100", "epoch:4"])
def test_the_last_point_may_be_the_end_of_training_or_beyond(end: float | str) -> None:
    assert values({0: 0.0, end: 1.0}, 0, 25, 99) == [0.0, 0.25, 0.99]
    assert values({0: 0.0, "step:200": 1.0}, 50) == [0.25]


def test_a_value_that_never_changes_needs_no_length() -> None:
    for given in (0.5, {0.5: 0.5}, {"epoch:1": [0.5, 0.5], "epoch:2": 0.5}):
        assert Piecewise.parse(given).constant == 0.5
        assert Piecewise.parse(given).at(7, math.inf, math.inf) == 0.5
    assert Piecewise.parse(0.5).points == ((Point("fraction", 0.0), 0.5, 0.5),)
    assert Piecewise.parse({0.5: [0.5, 1]}).constant is None
    with pytest.raises(SettingError, match=r"point 0.5 cannot be placed"):
        Piecewise.parse({0.5: [0.5, 1]}).at(7, math.inf, math.inf)


@pytest.mark.parametrize(
    "given", [-1, math.inf, math.nan, True, None, "1", [1, 2, 3], {0.5: -1}, {0.5: [1]}, {0: "a"}]
)
def test_what_is_no_value_is_refused(given: object) -> None:
    with pytest.raises(SettingError, match=r"task must be a number that is not negative.* got "):
        Piecewise.parse(given, "task")


def test_points_of_a_value_that_are_wrong() -> None:
    with pytest.raises(SettingError, match=r"task is a mapping without a point, such as \{0.5"):
        Piecewise.parse({}, "task")
    with pytest.raises(SettingError, match=r"must rise, got epoch:1, step:25: steps \[25, 25\]"):
        values({"epoch:1": 1.0, "step:25": 2.0}, 0)
    with pytest.raises(SettingError, match="did you mean 'epoch:2'"):
        Piecewise.parse({2: 1.0})


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        (0.5, True),
        (0, False),
        ({0: 0.0, 1.0: 1.0}, True),
        ({"step:10": 0.0, "step:12": [1.0, 0.0]}, True),
        ({"step:10": [0.0, 1.0], "step:11": 0.0}, True),
        ({"step:10": [0.0, 1.0], "step:11": [0.0, 0.0]}, True),
        ({"step:10": [1.0, 0.0], "step:12": 0.0}, True),
        ({"step:300": [1.0, 0.0]}, True),
        ({"step:300": [0.0, 1.0]}, False),
        ({0: [1.0, 0.0]}, False),  # a jump before the first step
        ({"step:1": [1.0, 0.0]}, True),
        ({0: 0.0, "step:99": [0.0, 1.0]}, True),
        ({0: 0.0, "step:100": [0.0, 1.0]}, False),
        ({0: 0.0, "step:99": 0.0, "step:200": 1.0}, False),
        ({0: 0.0, "step:98": 0.0, "step:200": 1.0}, True),
    ],
)
def test_whether_a_value_ever_counts(given: object, counts: bool) -> None:
    value = Piecewise.parse(given)
    assert value.counts(100, 25) is counts
    assert value.counts(100, 25) is any(value.at(step, 100, 25) > 0 for step in range(100))


def test_without_a_length_only_steps_say_whether_a_value_counts() -> None:
    assert Piecewise.parse({"step:9": [0.0, 1.0]}).counts(math.inf, math.inf)
    assert not Piecewise.parse({"step:0": [1.0, 0.0], "step:9": 0}).counts(math.inf, math.inf)


@pytest.mark.parametrize("epochs", range(6))
def test_epochs_may_differ_and_the_last_is_as_those_after_it(epochs: int) -> None:
    each = (7, 3, 5)
    expected = sum((7, 3, 5, 5, 5, 5)[:epochs])
    assert Point.parse(f"epoch:{epochs}").place(1000, each) == expected
    assert Point.parse(f"epoch:{epochs}").place(1000, (4,)) == 4 * epochs


def test_an_epoch_of_unknown_length_is_known_until_it_starts() -> None:
    assert Point.parse("epoch:2").place(math.inf, (7, 3, math.inf)) == 10
    with pytest.raises(SettingError, match="point epoch:3 cannot be placed"):
        Point.parse("epoch:3").place(math.inf, (7, 3, math.inf))


def test_points_are_printed_as_they_are_written() -> None:
    for at in (0, 0.4, "epoch:2", "step:1234567"):
        assert str(Point.parse(at)) == str(at)


def test_one_point_has_one_keep_and_several_have_falling_ones() -> None:
    assert parse_points(0.4, 0.5) == ([Point("fraction", 0.4)], [0.5])
    assert parse_points("epoch:1", None) == ([Point("epoch", 1)], [None])
    points = [Point("epoch", 1), Point("step", 9)]
    assert parse_points(["epoch:1", "step:9"], [0.5, 0.2]) == (points, [0.5, 0.2])
    assert parse_points(["epoch:1", "step:9"], [None, None]) == (points, [None, None])
    for keep in (0.5, [0.5], [0.5, 0.4, 0.3], None):
        with pytest.raises(SettingError, match=r"give one keep for every point.*; got keep=.*at="):
            parse_points(["epoch:1", "step:9"], keep)
    for rising in ([0.2, 0.5], [0.5, 0.5]):
        with pytest.raises(SettingError, match=r"keep must fall from point to point, got \[0"):
            parse_points(["epoch:1", "step:9"], rising)


@pytest.mark.parametrize("keep", [[], [0.5], 0.5])
def test_a_list_without_a_point_is_refused(keep: float | list[float]) -> None:
    with pytest.raises(SettingError, match="at is a list without a point; give one or more"):
        parse_points([], keep)


@pytest.mark.parametrize("total", range(1, 6))
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("gaps", [[], [1], [1, 0], [0, 1, 0], [1, 1]])
def test_steps_are_moved_into_a_short_run_and_no_further_than_need_be(
    gaps: list[int], first: int, total: int
) -> None:
    def fits(steps: tuple[int, ...], last: int) -> bool:
        apart = all(
            b - a >= gap for (a, b), gap in zip(itertools.pairwise(steps), gaps, strict=True)
        )
        return apart and first <= steps[0] and steps[-1] <= last

    for steps in itertools.product([0, 1, 2, 4, 900], repeat=len(gaps) + 1):
        moved = tuple(squeeze(steps, gaps, total, first))
        enough = first + sum(gaps) <= total
        assert fits(moved, total if enough else first + sum(gaps))
        if fits(steps, total - 1):
            assert moved == steps
        if first + sum(gaps) < total:
            assert moved[-1] < total  # a step is left after the last


# Properties

STEPS, SHARES = st.integers(0, 5000), st.floats(0, 1)


@hypothesis.given(STEPS, STEPS, SHARES, STEPS, STEPS)
def test_a_cubic_never_rises_stays_within_bounds_and_ends_exactly(
    start: int, length: int, final: float, one: int, other: int
) -> None:
    cubic = Cubic(start, start + length, final)
    before, after = (cubic(step) for step in sorted((one, other)))
    assert final <= after <= before + 1e-15
    assert before <= 1 + 1e-15
    assert cubic(start + length) == final
    assert length == 0 or cubic(start) == 1


@hypothesis.given(STEPS, st.floats(0, 10), STEPS, STEPS)
def test_a_warmup_never_falls_stays_within_bounds_and_ends_exactly(
    steps: int, scale: float, one: int, other: int
) -> None:
    warmup = Warmup(steps, scale)
    before, after = (warmup(step) for step in sorted((one, other)))
    assert 0 <= before <= after <= scale
    assert warmup(max(0, steps - 1)) == scale


MOMENTS = st.one_of(
    st.floats(0, 1, exclude_max=True),
    st.builds("step:{}".format, st.integers(0, 120) | st.integers(20, 24)),
    st.builds("epoch:{}".format, st.integers(0, 6)),
)
VALUES = st.floats(0, 9)


@hypothesis.given(st.dictionaries(MOMENTS, VALUES | st.tuples(VALUES, VALUES), min_size=1), STEPS)
def test_a_piecewise_value_lies_between_its_neighbours_and_is_exact_at_its_points(
    points: dict[object, float | tuple[float, float]], step: int
) -> None:
    placed = {Point.parse(at).place(100, 25): at for at in points}  # type: ignore[arg-type]
    ordered = {placed[place]: points[placed[place]] for place in sorted(placed)}
    pairs = [x if isinstance(x, tuple) else (x, x) for x in ordered.values()]
    value = Piecewise.parse(ordered)
    places = sorted(placed)
    for place, (_, after) in zip(places, pairs, strict=True):
        assert value.at(place, 100, 25) == after
    later = sum(place <= step for place in places)  # of how many points it is at or after
    start = pairs[later - 1][1] if later else pairs[0][0]
    end = pairs[later][0] if later < len(pairs) else pairs[-1][1]
    assert min(start, end) - 1e-9 <= value.at(step, 100, 25) <= max(start, end) + 1e-9
    assert value.counts(100, 25) == any(value.at(step, 100, 25) > 0 for step in range(100))


@hypothesis.given(MOMENTS | st.builds("step:{}".format, st.integers(0, 10**9)))
def test_any_point_is_read_back_from_what_is_printed(at: float | str) -> None:
    point = Point.parse(at)
    assert Point.parse(str(point)) == point


@hypothesis.given(st.floats(0, 1, exclude_max=True), STEPS)
def test_a_fraction_lies_within_the_run_and_never_before_an_earlier_one(
    fraction: float, total: int
) -> None:
    place = Point.parse(fraction).place(total, math.inf)
    assert 0 <= place <= total
    assert place - 1e-6 <= fraction * total < place + 1


@hypothesis.given(st.data(), STEPS, st.integers(0, 3))
def test_steps_are_squeezed_by_the_least_that_keeps_their_order(
    data: st.DataObject, total: int, first: int
) -> None:
    steps = data.draw(st.lists(STEPS, min_size=1, max_size=5))
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(steps) - 1, max_size=len(steps) - 1))
    moved = squeeze(steps, gaps, total, first)
    assert moved[0] >= first
    assert all(b - a >= gap for (a, b), gap in zip(itertools.pairwise(moved), gaps, strict=True))
    assert squeeze(moved, gaps, total, first) == moved
    assert first or squeeze(steps, gaps, total) == moved, "from the first step on by default"
    if first + sum(gaps) < total:
        assert moved[-1] < total
