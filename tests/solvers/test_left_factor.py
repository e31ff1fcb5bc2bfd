"""The left factor against its definition: least squares on the tokens themselves."""

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError
from lrcompress.solvers.left_factor import Normal

OUT, IN, RANK, TOKENS = 5, 7, 3, 40


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def a_case(
    tokens: int = TOKENS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight, factors, and the inputs of the dense and of the compressed model."""
    weight, left = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, RANK, dtype=dtype)
    right, x = torch.randn(RANK, IN, dtype=dtype), torch.randn(tokens, IN, dtype=dtype)
    return weight, left, right, x, x + 0.3 * torch.randn(tokens, IN, dtype=dtype) + 0.2


def equations(weight: Tensor, right: Tensor, x: Tensor, own: Tensor, anchor: float) -> Normal:
    found = Normal(weight, right, anchor)
    for part, own_part in zip(x.split(9), own.split(9), strict=True):
        found.add_(part, own_part)
    return found


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_it_is_the_least_squares_solution(anchor: float) -> None:
    weight, left, right, x, own = a_case()
    target = (anchor * x + (1 - anchor) * own) @ weight.mT

    found, bias = equations(weight, right, x, own, anchor).solve(left)

    assert bias is None
    torch.testing.assert_close(found.mT, torch.linalg.lstsq(own @ right.mT, target).solution)


def test_with_a_bias_both_are_the_least_squares_solution() -> None:
    weight, left, right, x, own = a_case()
    bias = torch.randn(OUT, dtype=torch.float64)
    target = (0.5 * x + 0.5 * own) @ weight.mT + bias
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([own @ right.mT, ones], 1), target).solution

    found, shifted = equations(weight, right, x, own, 0.5).solve(left, bias)

    assert shifted is not None
    torch.testing.assert_close(torch.cat([found.mT, shifted[None]]), wanted)


def test_no_output_metric_has_another_solution() -> None:
    weight, left, right, x, own = a_case()
    root = torch.randn(OUT, OUT, dtype=torch.float64)
    target, z = x @ weight.mT, own @ right.mT
    # vec(P left z) = (z ⊗ P) vec(left)
    wanted = torch.linalg.lstsq(torch.kron(z, root), (target @ root.mT).reshape(-1, 1)).solution

    found, _ = equations(weight, right, x, own, 1.0).solve(left)

    torch.testing.assert_close(found.mT, wanted.view(RANK, OUT))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 4, 40])
@pytest.mark.parametrize("shifted", [False, True])
def test_it_never_worsens_what_it_minimises(dtype: torch.dtype, tokens: int, shifted: bool) -> None:
    weight, left, right, x, own = a_case(tokens, dtype)
    bias = torch.zeros(OUT, dtype=dtype)
    target, z = x.double() @ weight.mT.double(), own.double() @ right.mT.double()

    found, moved = equations(weight, right, x, own, 1.0).solve(left, bias if shifted else None)

    assert found.dtype == dtype
    errors = [target - z @ one.mT.double() for one in (left, found)]
    if moved is not None:
        errors = [error - error.mean(0) for error in errors]
    assert errors[1].norm() <= errors[0].norm() * (1 + 1e-5)


def test_what_no_token_has_stays_as_it_is() -> None:
    weight, left, right, x, own = a_case(dtype=torch.float64)
    right[1] = 0  # reads nothing
    found, _ = equations(weight, right, x, own, 0.5).solve(left)
    assert torch.equal(found[:, 1], left[:, 1])

    one, _ = equations(weight, right[:1].repeat(2, 1), x[:1], own[:1], 1.0).solve(left[:, :2])
    step = one - left[:, :2]  # of the least norm
    torch.testing.assert_close(step[:, 0], step[:, 1])


def test_nothing_read_changes_nothing() -> None:
    weight, left, right, _, _ = a_case()
    bias = torch.ones(OUT, dtype=torch.float64)
    found, same = Normal(weight, right, 0.5).solve(left, bias)
    assert torch.equal(found, left)
    assert same is not None
    assert torch.equal(same, bias)


def test_an_exact_layer_stays_exact() -> None:
    _, left, right, x, _ = a_case()
    found, _ = equations(left @ right, right, x, x, 0.5).solve(left)
    torch.testing.assert_close(found, left)


def test_what_is_not_finite_is_refused() -> None:
    weight, left, right, x, own = a_case()
    own[3, 2] = torch.inf
    with pytest.raises(NotFiniteError, match="reads holds a NaN or an infinity"):
        equations(weight, right, x, own, 0.5).solve(left)


def test_inputs_may_be_chosen_by_number() -> None:
    weight, _, _, x, own = a_case()
    kept = torch.tensor([5, 0, 3])
    chosen = torch.eye(IN, dtype=torch.float64)[kept]
    found, _ = equations(weight, kept, x, own, 0.5).solve(weight[:, kept])
    wanted, _ = equations(weight, chosen, x, own, 0.5).solve(weight[:, kept])
    torch.testing.assert_close(found, wanted)
