"""Scores against loops over single parameters, and their averages against the recursion itself."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrcompress.errors import SettingError
from lrcompress.importance import ROW_SCORES, Importance, component, entries, row_group, row_mean

SHAPES = [(5, 9), (9, 5), (1, 4), (4, 1), (0, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def some_loss(weight: Tensor) -> Tensor:
    """A loss of ``(out, in)`` whose gradient is not linear in the weight."""
    torch.manual_seed(1)
    x, y = randn(7, weight.shape[1]), randn(7, weight.shape[0])
    return ((x @ weight.mT).tanh() - y).square().sum() + weight.pow(3).sum()


def trained(*shape: int) -> tuple[Tensor, Tensor]:
    """A weight and the gradient of :func:`some_loss` there."""
    weight = randn(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(some_loss(weight), weight)
    return weight.detach(), gradient


@each_shape
def test_the_mean_score_of_a_row_is_that_of_its_parameters(shape: tuple[int, int]) -> None:
    weight, gradient = trained(*shape)
    expected = [
        sum(abs(float(weight[i, j]) * float(gradient[i, j])) for j in range(shape[1])) / shape[1]
        for i in range(shape[0])
    ]
    torch.testing.assert_close(row_mean(weight, gradient), torch.tensor(expected).to(weight))


@each_shape
def test_the_group_score_of_a_row_is_what_scaling_it_does_to_the_loss(
    shape: tuple[int, int],
) -> None:
    weight, gradient = trained(*shape)
    scale = torch.ones(shape[0], dtype=torch.float64, requires_grad=True)
    (of_scale,) = torch.autograd.grad(some_loss(scale[:, None] * weight), scale)
    torch.testing.assert_close(row_group(weight, gradient), of_scale.abs() / shape[1])


@each_shape
def test_the_scores_of_entries_are_theirs_row_after_row(shape: tuple[int, int]) -> None:
    weight, gradient = trained(*shape)
    expected = [
        abs(float(weight[i, j]) * float(gradient[i, j]))
        for i in range(shape[0])
        for j in range(shape[1])
    ]
    torch.testing.assert_close(entries(weight, gradient), torch.tensor(expected).to(weight))


def test_row_scores_are_known_by_name() -> None:
    assert list(ROW_SCORES.items()) == [("mean", row_mean), ("group", row_group)]


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_score_of_a_component_is_sigma_times_the_derivative_by_sigma(
    shape: tuple[int, int], rank: int
) -> None:
    sigma = (torch.rand(rank).double() + 0.1).requires_grad_()
    u, v = randn(shape[0], rank), randn(rank, shape[1])
    (by_sigma,) = torch.autograd.grad(some_loss(u * sigma @ v), sigma)
    expected = (sigma * by_sigma).abs().detach()

    # however sigma is shared out between the factors
    for power in (0.0, 0.5, 1.0):
        left = (u * sigma.detach() ** power).requires_grad_()
        right = (sigma.detach()[:, None] ** (1 - power) * v).requires_grad_()
        of_left, of_right = torch.autograd.grad(some_loss(left @ right), (left, right))
        torch.testing.assert_close(component(left.detach(), of_left).abs(), expected)
        torch.testing.assert_close(component(right.detach().mT, of_right.mT).abs(), expected)


@pytest.mark.parametrize("score", [row_mean, row_group, entries, component])
def test_arguments_are_left_as_they_were(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight, gradient = trained(5, 9)
    before = weight.clone(), gradient.clone()
    score(weight, gradient)
    assert weight.equal(before[0])
    assert gradient.equal(before[1])


# Averages

SIZES = {"a": 3, "b": 5}
each_average = pytest.mark.parametrize("beta1", [0.0, 0.5, 0.85])
each_spread = pytest.mark.parametrize("beta2", [1.0, 0.95, 0.0])
each_window = pytest.mark.parametrize("window", [1, 3])
Steps = list[dict[str, Tensor]]


def a_run(length: int) -> Steps:
    return [{name: torch.rand(size) for name, size in SIZES.items()} for _ in range(length)]


def slow(steps: Steps, name: str, unit: int, beta1: float, beta2: float, window: int) -> float:
    """The score of one unit, by the recursion as PLATON has it."""
    mean = spread = 0.0
    for start in range(0, len(steps) - window + 1, window):
        seen = sum(float(step[name][unit]) for step in steps[start : start + window]) / window
        mean = beta1 * mean + (1 - beta1) * seen
        spread = beta2 * spread + (1 - beta2) * abs(seen - mean)
    return mean if beta2 == 1 else mean * spread


def assert_scores(importance: Importance, steps: Steps) -> None:
    beta1, beta2, window = importance.beta1, importance.beta2, importance.every_n_steps
    scores = importance.scores()
    assert list(scores) == list(SIZES)
    for name, size in SIZES.items():
        expected = [slow(steps, name, unit, beta1, beta2, window) for unit in range(size)]
        torch.testing.assert_close(scores[name], torch.tensor(expected), rtol=1e-5, atol=1e-7)


@each_average
@each_spread
@each_window
def test_scores_are_averages_of_windows_and_their_uncertainty(
    beta1: float, beta2: float, window: int
) -> None:
    importance, steps = Importance(beta1, beta2, window), a_run(20)
    for count, step in enumerate(steps, 1):
        importance.add(step)
        assert importance.steps == count % window
        assert importance.known == (count >= window)
        if importance.known:
            assert_scores(importance, steps[:count])


def test_a_window_that_is_not_full_does_not_count() -> None:
    importance, steps = Importance(every_n_steps=3), a_run(5)
    for step in steps[:2]:
        importance.add(step)
    assert not importance.known
    assert importance.scores() == {}
    importance.add(steps[2])
    before = {name: score.clone() for name, score in importance.scores().items()}
    for step in steps[3:]:
        importance.add(step)
    assert all(importance.scores()[name].equal(score) for name, score in before.items())


def test_what_is_added_is_not_changed_and_may_be_changed_later() -> None:
    importance, steps = Importance(every_n_steps=2), a_run(4)
    kept = copy.deepcopy(steps)
    for step, clean in zip(steps, kept, strict=True):
        importance.add(step)
        assert all(step[name].equal(clean[name]) for name in SIZES)
        for score in step.values():
            score.fill_(99.0)
    assert_scores(importance, kept)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_spread
def test_a_step_with_a_score_that_is_not_finite_is_left_out(value: float, beta2: float) -> None:
    importance, steps = Importance(0.85, beta2, 3), a_run(9)
    for i, step in enumerate(steps):
        if i % 3 == i // 3:  # the first, second and third of the windows
            step["a"][i % 3] = value
        importance.add(step)
    assert all(score.isfinite().all() for score in importance.scores().values())
    for i, step in enumerate(steps):
        if i % 3 == i // 3:  # a window's average stays what it is without it
            others = [steps[j]["a"] for j in range(3 * (i // 3), 3 * (i // 3) + 3) if j != i]
            step["a"] = torch.stack(others).mean(0)
    assert_scores(importance, steps)


def test_a_window_without_a_finite_step_changes_nothing() -> None:
    importance = Importance(0.5, 1.0, 2)
    for score in (1.0, 1.0, math.nan, math.inf):
        importance.add({"a": torch.full((2,), score)})
    assert importance.scores()["a"].tolist() == [0.5, 0.5]


def test_scores_of_low_precision_are_added_in_float32() -> None:
    importance = Importance(0.0, 1.0, 300)
    for _ in range(300):
        importance.add({"a": torch.full((2,), 1.0, dtype=torch.bfloat16)})
    assert importance.scores()["a"].equal(torch.ones(2))


def test_a_layer_that_appears_late_starts_from_nothing() -> None:
    importance = Importance(0.5, 1.0, 1)
    importance.add({"a": torch.ones(2)})
    importance.add({"a": torch.ones(2), "b": torch.ones(1)})
    assert importance.scores()["a"].tolist() == [0.75, 0.75]
    assert importance.scores()["b"].tolist() == [0.5]


@each_spread
@pytest.mark.parametrize("at", [0, 1, 3, 4, 8])
def test_a_run_resumed_within_a_window_goes_on_as_if_nothing_had_happened(
    beta2: float, at: int
) -> None:
    steps = a_run(11)
    whole, first, second = (Importance(0.85, beta2, 3) for _ in range(3))
    for step in steps:
        whole.add(step)
    for step in steps[:at]:
        first.add(step)
    state = first.state_dict()
    second.load_state_dict(copy.deepcopy(state), "cpu")
    for step in steps[at:]:
        second.add(step)
        first.add(step)  # what was loaded is a copy
    assert second.steps == whole.steps == first.steps
    for one in (first, second):
        assert list(one.scores()) == list(whole.scores())
        assert all(one.scores()[name].equal(score) for name, score in whole.scores().items())


def test_a_state_is_not_changed_by_going_on() -> None:
    importance, steps = Importance(0.85, 0.9, 3), a_run(8)
    for step in steps[:4]:
        importance.add(step)
    state = importance.state_dict()
    before = copy.deepcopy(state)
    importance.load_state_dict(state, "cpu")
    for step in steps[4:]:
        importance.add(step)
    assert state["steps"] == before["steps"]
    for part in ("open", "mean", "spread"):
        assert all(state[part][name].equal(value) for name, value in before[part].items())


@pytest.mark.parametrize("beta1", [-0.1, 1, 1.5, math.nan])
def test_a_beta1_that_would_forget_nothing_or_more_is_refused(beta1: float) -> None:
    with pytest.raises(SettingError, match=rf"^beta1 must be from 0 to below 1, got {beta1!r}$"):
        Importance(beta1=beta1)


@pytest.mark.parametrize("beta2", [-0.1, 1.01, math.nan])
def test_a_beta2_out_of_range_is_refused(beta2: float) -> None:
    message = rf"^beta2 must be from 0 to 1 \(no uncertainty\), got {beta2!r}$"
    with pytest.raises(SettingError, match=message):
        Importance(beta2=beta2)


@pytest.mark.parametrize("overflows", [0, 1, 3])
def test_a_step_that_overflows_somewhere_is_left_out_for_the_whole_layer(overflows: int) -> None:
    found, expected = Importance(every_n_steps=4), Importance(every_n_steps=3)
    for number in range(4):
        score = torch.tensor([1.0, 2.0, 3.0]) * (number + 1)
        if number != overflows:
            expected.add({"layer": score.clone()})
        else:
            score[2] = torch.inf  # the row with the largest gradients
        found.add({"layer": score, "other": torch.ones(1)})
    torch.testing.assert_close(found.scores()["layer"], expected.scores()["layer"])


def test_a_step_without_scores_counts_as_a_step() -> None:
    importance = Importance(0.0, 1.0, 2)
    importance.add({})
    assert importance.steps == 1
    importance.add({"a": torch.full((2,), 4.0)})
    assert importance.scores()["a"].tolist() == [2.0, 2.0]


def test_large_scores_that_are_finite_are_not_left_out() -> None:
    importance = Importance(0.0, 1.0, 1)
    largest = torch.finfo(torch.float32).max
    importance.add({"a": torch.full((3,), largest)})
    assert importance.scores()["a"].tolist() == [largest] * 3


def after_an_overflow() -> Importance:
    """In a window of three, after one finite step and one that overflowed."""
    importance = Importance(0.0, 1.0, 3)
    importance.add({"a": torch.full((2,), 4.0)})
    importance.add({"a": torch.tensor([math.inf, 1.0])})
    return importance


def test_a_step_that_was_left_out_stays_so_when_resumed() -> None:
    importance = Importance(0.0, 1.0, 3)
    importance.load_state_dict(after_an_overflow().state_dict(), "cpu")
    importance.add({"a": torch.full((2,), 8.0)})
    assert importance.scores()["a"].tolist() == [6.0, 6.0]


def test_a_state_that_does_not_say_what_was_left_out_left_out_nothing() -> None:
    importance, state = Importance(0.0, 1.0, 3), after_an_overflow().state_dict()
    del state["skipped"]  # as earlier versions wrote it
    importance.load_state_dict(state, "cpu")
    importance.add({"a": torch.full((2,), 8.0)})
    assert importance.scores()["a"].tolist() == [4.0, 4.0]


def test_a_state_is_loaded_on_the_device_that_is_named() -> None:
    source = Importance(0.5, 0.5, 2)
    for _ in range(3):
        source.add({"a": torch.ones(2)})
    state = source.state_dict()
    for given in (state, {key: value for key, value in state.items() if key != "skipped"}):
        importance = Importance(0.5, 0.5, 2)
        importance.load_state_dict(given, "meta")
        held = importance.state_dict()
        tensors = [t for part in held.values() if isinstance(part, dict) for t in part.values()]
        assert [t.device.type for t in tensors] == ["meta"] * 4


def test_without_uncertainty_none_is_kept() -> None:
    importance = Importance(0.5, 1.0, 1)
    importance.add({"a": torch.ones(2)})
    assert importance.state_dict()["spread"] == {}
