"""State that goes with entries, waits for another process, or has to fit its first moments."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.structure.surgery import (
    carry_dense,
    carry_later,
    carry_left,
    start_state_,
    swap_parameters_,
)

ROWS, COLUMNS = torch.tensor([True, False, True]), torch.tensor([False, True, True, False])
WHOLE = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_entry_that_is_left_keeps_its_own_state(transposed: bool, squared: bool) -> None:
    state = WHOLE.mT if transposed else WHOLE
    for rows, columns, wanted in (
        (ROWS, COLUMNS, [[1.0, 2.0], [9.0, 10.0]]),
        (ROWS, None, [[0.0, 1.0, 2.0, 3.0], [8.0, 9.0, 10.0, 11.0]]),
        (None, COLUMNS, [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]),
        (None, None, WHOLE.tolist()),
    ):
        (left,) = carry_left(rows, columns, transposed)([state], squared)
        assert left.tolist() == wanted
    (bias,) = carry_left(ROWS, None)([torch.arange(3.0)], squared)
    assert bias.tolist() == [0.0, 2.0]


def test_what_another_process_computes_is_zero_until_it_comes() -> None:
    new = [torch.ones(2, 4), torch.ones(3, 2, dtype=torch.bfloat16)]
    later = carry_later(new)([WHOLE.double()], False)
    assert [(x.shape, x.dtype) for x in later] == [(p.shape, torch.float64) for p in new]
    assert not any(x.any() for x in later)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_state_may_be_of_another_dtype_than_the_factors(transposed: bool, squared: bool) -> None:
    left, right, state = torch.randn(3, 2), torch.randn(2, 4), WHOLE.bfloat16()
    carry = carry_dense(left, right, transposed)
    found = carry([state.mT if transposed else state], squared)
    wanted = carry_dense(left.bfloat16(), right.bfloat16(), False)([state], squared)
    torch.testing.assert_close(found, wanted)


# Second moments


def swapped(
    state: dict[str, Any], options: dict[str, Any], *, rows: int = 4, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of two factors, of which each has that of the weight; other options beside it."""
    weight, other = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(1))
    new = [nn.Parameter(torch.zeros(rows, 2)), nn.Parameter(torch.zeros(4, 2))]
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": [weight]}], lr=0.1)
    optimizer.param_groups[0] |= {"betas": (0.5, 0.5)}
    optimizer.param_groups[1] |= options
    optimizer.state[weight] = state

    def carry(held: Sequence[Tensor], _squared: bool) -> list[Tensor]:
        return [held[0].clone(), held[0].clone()]

    swap_parameters_([optimizer], [weight], new, carry, **more)
    first, second = (optimizer.state[p] for p in new)
    return first, second


FIRST = torch.tensor([[0.1, -2.0], [3.0, 0.0], [-0.5, 1.0], [4.0, -4.0]])
SECOND = torch.tensor([[1.0, 1.0], [0.001, 0.5], [0.25, 100.0], [0.0, 1e-6]])


@pytest.mark.parametrize("step", [None, 0, 1, 3])
@pytest.mark.parametrize("names", [("exp_avg", "exp_avg_sq"), ("grad_avg", "square_avg")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_are_no_less_than_squares_of_first_ones(
    names: tuple[str, str], step: int | None, dtype: torch.dtype
) -> None:
    """Of averages without their bias: divided by one less a power of the group's own beta."""
    first, second = names
    betas = (0.9, 0.999)
    state: dict[str, Any] = {first: FIRST.clone(), second: SECOND.to(dtype)}
    state |= {} if step is None else {"step": torch.tensor(float(step))}
    least = FIRST.square()
    if step:
        least = (FIRST / (1 - betas[0] ** step)).square() * (1 - betas[1] ** step)
    wanted = torch.maximum(SECOND.to(dtype).float(), least).to(dtype)
    for found in swapped(state, {"betas": betas}):
        torch.testing.assert_close(found[second], wanted)
        assert found[first].equal(FIRST)
    for found in swapped(state, {}):  # no average that has a bias
        plain = torch.maximum(SECOND.to(dtype).float(), FIRST.square()).to(dtype)
        torch.testing.assert_close(found[second], plain)


def test_the_greatest_second_moments_are_raised_too() -> None:
    state = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": 2 * SECOND}
    for found in swapped(state, {}):
        assert found["max_exp_avg_sq"].equal(torch.maximum(2 * SECOND, FIRST.square()))


@pytest.mark.parametrize("alone", ["exp_avg", "exp_avg_sq", "square_avg"])
def test_a_moment_alone_stays_as_it_is(alone: str) -> None:
    for found in swapped({alone: SECOND}, {"betas": (0.9, 0.999)}):
        assert found[alone].equal(SECOND)


def test_what_is_carried_exactly_is_not_raised() -> None:
    state = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    for found in swapped(state, {}, exact=True):
        assert found["exp_avg_sq"].equal(SECOND)
    first, second = swapped(state, {}, exact_from=1)
    raised = torch.maximum(SECOND, FIRST.square())
    assert first["exp_avg_sq"].equal(torch.cat([raised[:1], SECOND[1:]]))
    assert second["exp_avg_sq"].equal(raised)


# Groups


def test_names_that_are_deep_follow() -> None:
    weight, bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))
    factors = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))]
    optimizer = torch.optim.SGD([("a.b.c.weight", weight), ("a.b.c.bias", bias)], lr=0.1)
    swap_parameters_([optimizer], [weight], factors, None)
    left = ["a.b.c.right.weight", "a.b.c.left.weight", "a.b.c.left.bias"]
    assert optimizer.param_groups[0]["param_names"] == left
    swap_parameters_([optimizer], factors, [weight], None)
    assert optimizer.param_groups[0]["param_names"] == ["a.b.c.weight", "a.b.c.bias"]


def test_each_parameter_without_state_gets_its_own() -> None:
    held, new, elsewhere = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.Adagrad([held], lr=0.1)
    optimizer.add_param_group({"params": [new], "initial_accumulator_value": 0.5})
    optimizer.state.pop(new, None)
    start_state_(optimizer, [elsewhere, held, new])
    assert optimizer.state[new]["sum"].tolist() == [0.5, 0.5]
    assert elsewhere not in optimizer.state
