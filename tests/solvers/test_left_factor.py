"""The left factor against its definition: least squares on the tokens themselves."""

import math

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError
from lrcompress.solvers.left_factor import RIDGES, Normal

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
@pytest.mark.parametrize("size", [1e-11, 1.0, 1e11])
def test_it_is_the_least_squares_solution(anchor: float, size: float) -> None:
    weight, left, right, x, own = a_case()
    x, own = size * x, size * own
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


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [0.01, 10.0])
def test_what_rounding_would_worsen_stays_as_it_is(seed: int, size: float) -> None:
    """Of all roundings of the solution the nearest is seldom the best where columns are alike."""
    torch.manual_seed(seed)
    weight, _, right, x, _ = a_case(dtype=torch.bfloat16)
    right[1:] = right[:1] + right[1:] / 4
    x = size * x
    target, z = x.double() @ weight.mT.double(), x.double() @ right.mT.double()
    exact = torch.linalg.lstsq(z, target).solution.mT
    step = exact.abs() / 256  # both neighbours of a number are within twice this
    found, below, above = (around.bfloat16() for around in (exact, exact - step, exact + step))
    choices = torch.cartesian_prod(*[torch.arange(3)] * RANK)
    rows = torch.stack([found, below, above])[choices, :, range(RANK)].double()  # (27, rank, out)
    lost = (torch.einsum("tr,cro->cto", z, rows) - target).square().sum(1)
    pick = torch.randint(len(choices), (OUT,)) if seed % 2 else lost.argmin(0)
    before, nearest = rows[pick, :, range(OUT)], rows[0].mT
    stays = lost[pick, range(OUT)].sum() < lost[0].sum()

    again, _ = equations(weight, right, x, x, 1.0).solve(before.bfloat16())

    assert torch.equal(again.double(), before if stays else nearest)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_from_few_tokens_it_takes_the_shortest_step(tokens: int) -> None:
    """Columns count by what they read; no step is along what no token has."""
    _, _, _, x, own = a_case(tokens)
    weight, left, right = (
        torch.randn(n, dtype=torch.float64) for n in ((OUT, IN), (OUT, 6), (6, IN))
    )
    z, target = own @ right.mT, own @ weight.mT
    scale = 1 / z.norm(dim=0)
    step = torch.linalg.pinv(z * scale) @ (target - z @ left.mT)

    found, _ = equations(weight, right, x, own, 0.0).solve(left)

    torch.testing.assert_close(found, left + step.mT * scale)


def test_what_no_token_has_stays_as_it_is() -> None:
    weight, left, right, x, own = a_case(dtype=torch.float64)
    right[1] = 0  # reads nothing
    found, _ = equations(weight, right, x, own, 0.5).solve(left)
    assert torch.equal(found[:, 1], left[:, 1])

    one, _ = equations(weight, right[:1].repeat(2, 1), x[:1], own[:1], 1.0).solve(left[:, :2])
    step = one - left[:, :2]  # of the least norm
    torch.testing.assert_close(step[:, 0], step[:, 1])


@pytest.mark.parametrize("tokens", [400, 40_000])
def test_beside_a_bias_what_never_changes_stays_as_it_is(tokens: int) -> None:
    """Its variance is nothing but the rounding of float32 sums, which grows with the tokens."""
    weight, left, _, x, own = a_case(tokens, torch.float32)
    chosen = torch.tensor([1, 4, 6])
    x, own, left = x + 3, own + 3, weight[:, chosen].clone()
    own[:, [1, 6]] = torch.tensor([1.7, -0.3])  # the compressed model gives always the same
    bias = torch.randn(OUT)
    found = Normal(weight, chosen, 0.5)
    for number, (part, own_part) in enumerate(zip(x.split(100), own.split(100), strict=True)):
        found.add_(part, own_part, number)
    again, shifted = found.solve(left, bias)
    assert shifted is not None
    assert torch.equal(again[:, [0, 2]], left[:, [0, 2]])
    target = (0.5 * x + 0.5 * own) @ weight.mT + bias
    ones = torch.ones(tokens, 1)
    wanted = torch.linalg.lstsq(torch.cat([own[:, 4:5], ones], 1).double(), target.double())
    if tokens > 400:  # where halves agree, the ridge is small
        torch.testing.assert_close(again[:, 1].double(), wanted.solution[0], rtol=0.05, atol=0.02)


def test_beside_a_bias_what_changes_little_is_solved_for() -> None:
    weight, left, _, x, _ = a_case(20_000, torch.float32)
    chosen = torch.tensor([1, 4, 6])
    x = 0.2 * x + 3  # of its square the variance is 1 in 226
    found = Normal(weight, chosen, 0.5)
    for part in x.split(100):
        found.add_(part, part)
    again, _ = found.solve(left, torch.zeros(OUT))
    wanted = torch.linalg.lstsq(
        (x - x.mean(0))[:, chosen].double(), x.double() @ weight.mT.double()
    )
    torch.testing.assert_close(again.mT.double(), wanted.solution, rtol=0.01, atol=0.01)


def test_what_processes_add_up_is_two_halves_of_everything() -> None:
    weight, _, right, _, _ = a_case()
    sums = Normal(weight, right, 0.5).sums
    assert sum(x.numel() for x in sums) == 2 * (RANK * RANK + IN * RANK + RANK + IN + 1)


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


# The ridge


def centred(x: Tensor, bias: bool) -> Tensor:
    return x - x.mean(0) if bias else x


def ridge_solution(wanted: Tensor, z: Tensor, left: Tensor, ridge: float, bias: bool) -> Tensor:
    """Least squares with a row for every column of the left factor that would stay."""
    if math.isinf(ridge):
        return left
    wanted, z = centred(wanted, bias), centred(z, bias)
    pull = ridge**0.5 * z.norm(dim=0).diag()
    both = torch.cat([z, pull]), torch.cat([wanted, pull @ left.mT])
    return torch.linalg.lstsq(*both).solution.mT


def by_halves(
    wanted: list[Tensor], z: list[Tensor], left: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """The definition: every ridge is tried on either half; returns the left factor and the bias."""
    lost = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for one, other in ((0, 1), (1, 0)):
            found = ridge_solution(wanted[one], z[one], left, ridge, bias)
            error = centred(wanted[other], bias) - centred(z[other], bias) @ found.mT
            lost[ridge] += float(error.square().sum())
    best = min(lost, key=lost.__getitem__)
    target, read = torch.cat(wanted), torch.cat(z)
    found = ridge_solution(target, read, left, best, bias)
    return found, target.mean(0) - found @ read.mean(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_is_the_one_that_is_best_on_the_other_half(
    noise: float, seed: int, bias: bool
) -> None:
    torch.manual_seed(seed)
    weight, _, right, x, own = a_case(12)
    left = weight @ torch.linalg.pinv(right)
    x = own + noise * torch.randn_like(own)
    sums, offset = Normal(weight, right, 1.0), torch.randn(OUT, dtype=torch.float64)
    for number in range(4):
        part = slice(3 * number, 3 * number + 3)
        sums.add_(x[part], own[part], number)
    halves = [torch.cat([torch.arange(6) % 3 + 6 * (torch.arange(6) // 3) + 3 * i]) for i in (0, 1)]
    z, target = own @ right.mT, x @ weight.mT + (offset if bias else 0)
    wanted = by_halves([target[i] for i in halves], [z[i] for i in halves], left, bias)

    found, moved = sums.solve(left, offset if bias else None)

    torch.testing.assert_close(found, wanted[0])
    if bias:
        torch.testing.assert_close(moved, wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_single_token_the_bias_takes_up_what_is_left(dtype: torch.dtype) -> None:
    weight, left, right, x, own = a_case(1, dtype)
    bias = torch.randn(OUT, dtype=dtype)
    found, shifted = equations(weight, right, x, own, 1.0).solve(left, bias)
    assert shifted is not None
    assert found.dtype == shifted.dtype == dtype
    assert torch.equal(found, left)
    torch.testing.assert_close(found @ right @ own[0] + shifted, weight @ x[0] + bias)
