"""Both alternations against the definition of what they lower, and against its gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrcompress.solvers import alternating
from lrcompress.solvers.alternating import alternating_least_squares, alternating_minimization

ROWS, E, H, TERMS = 5, 2, 7, 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moment(size: int, samples: int = 40) -> Tensor:
    x = randn(samples, size)
    return x.mT @ x / samples


def lost(target: Tensor, x: Tensor, y: Tensor, metric: Tensor) -> Tensor:
    """``‖T − M‖²`` entry by entry of the last two axes, ``M[i, e, h] = Σ_s X[i, e, s] Y[h, s]``."""
    change = target - torch.einsum("ies,hs->ieh", x, y)
    return torch.einsum("ieh,ehfg,ifg->", change, metric, change)


def in_halves(target: Tensor, x: Tensor, y: Tensor, metric: Tensor) -> tuple[object, ...]:
    near, far = metric.diagonal(dim1=1, dim2=3).sum(-1), metric.diagonal(dim1=0, dim2=2).sum(-1)
    root = torch.linalg.inv(torch.linalg.cholesky(far + 1e-6 * torch.eye(H))).mT
    return alternating_least_squares(target, metric, x, y, near, root)


def in_turn(target: Tensor, x: Tensor, y: Tensor, metric: Tensor) -> tuple[object, ...]:
    c = metric.reshape(E * H, E * H)

    def product(change: Tensor) -> Tensor:
        return (change.reshape(ROWS, E * H) @ c).view(ROWS * E, H)

    found, other, *told = alternating_minimization(
        target.reshape(-1, H), x.reshape(-1, TERMS), y.mT.contiguous(), product
    )
    return found.view(ROWS, E, TERMS), other.mT, *told


@pytest.mark.parametrize("solve", [in_halves, in_turn])
@pytest.mark.parametrize("samples", [40, 9])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_it_ends_where_the_gradient_is_zero_and_tells_what_is_lost(
    solve: Callable[..., tuple[Tensor, Tensor, float, float, int]],
    samples: int,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alternating, "_SWEEPS", 3000)
    monkeypatch.setattr(alternating, "_ENOUGH", 1e-13)
    target, metric = scale * randn(ROWS, E, H), moment(E * H, samples).view(E, H, E, H)
    start = scale * randn(ROWS, E, TERMS), randn(H, TERMS)
    x, y, error, left, sweeps = solve(target, *start, metric)
    assert sweeps > 1
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = lost(target, x, y, metric)
    assert left == pytest.approx(value.item(), rel=1e-6)
    assert left < lost(target, *start, metric).item()
    whole = lost(target, torch.zeros_like(x), y, metric)
    assert error == pytest.approx((value / whole).sqrt().item(), rel=1e-6)
    for gradient, at in zip(torch.autograd.grad(value, (x, y)), (x, y), strict=True):
        assert (gradient * at).norm() < 1e-4 * whole


@pytest.mark.parametrize("solve", [in_halves, in_turn])
def test_nothing_to_find_and_terms_that_are_one_another_are_no_trouble(
    solve: Callable[..., tuple[Tensor, Tensor, float, float, int]],
) -> None:
    metric = moment(E * H).view(E, H, E, H)
    x, y = randn(ROWS, E, 1).expand(-1, -1, 2), randn(H, 1).expand(-1, 2)
    found = solve(torch.zeros(ROWS, E, H).double(), x, y, metric)
    assert found[2] == 0
    if solve is in_turn:
        assert solve(torch.zeros(ROWS, E, H).double(), 0 * x, y, metric)[4] == 0
    assert all(part.isfinite().all() for part in found[:2])

    target = torch.einsum("ies,hs->ieh", x[..., :1], y[:, :1])
    x, y, error, *_ = solve(target, x, y, metric)
    assert error < 1e-4
    torch.testing.assert_close(torch.einsum("ies,hs->ieh", x, y), target, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solve", [in_halves, in_turn])
def test_each_sweep_is_told_of_and_lowers_what_is_lost(
    solve: Callable[..., tuple[Tensor, Tensor, float, float, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alternating, "_ENOUGH", 1e-9)
    target, metric = randn(ROWS, E, H), moment(E * H).view(E, H, E, H)
    start = randn(ROWS, E, TERMS), randn(H, TERMS)
    before = float("inf")
    for most in range(5):
        monkeypatch.setattr(alternating, "_SWEEPS", most)
        *_, left, sweeps = solve(target, *start, metric)
        assert sweeps == most
        assert left < before * (1 - 1e-9)
        before = left


@pytest.mark.parametrize("solve", [in_halves, in_turn])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_ends_after_a_sweep_that_hardly_helps(
    solve: Callable[..., tuple[Tensor, Tensor, float, float, int]], scale: float
) -> None:
    target, metric = scale * randn(ROWS, E, H), moment(E * H).view(E, H, E, H)
    x, y, sweeps = randn(ROWS, E, TERMS), randn(H, TERMS), 0
    first = solve(target, x, y, metric)
    assert first[4] > 1
    for _ in range(30):
        x, y, _, _, sweeps = solve(target, x, y, metric)
    assert sweeps == 1


def test_where_the_metric_is_the_one_it_is_near_to_a_sweep_solves_for_either_factor() -> None:
    """However large the nearest one is said to be."""
    near, far = moment(E), moment(H)
    metric = torch.einsum("ef,gh->egfh", near, far)
    target, x, y = randn(ROWS, E, H), randn(ROWS, E, TERMS), randn(H, TERMS)
    root = torch.linalg.inv(torch.linalg.cholesky(far)).mT
    half = [torch.linalg.cholesky(side).mT for side in (near, far)]
    rows = torch.einsum("ieh,fe->ifh", target, half[0]).reshape(ROWS * E, H) @ half[1].mT

    def solved() -> tuple[Tensor, Tensor]:
        """The exact solutions for one factor after the other, in the roots of the metric."""
        one = torch.linalg.lstsq(half[1] @ y, rows.mT).solution.mT
        two = torch.linalg.lstsq(one, rows).solution.mT
        return one, torch.linalg.lstsq(two, rows.mT).solution.mT @ two.mT

    _, wanted = solved()
    least = (rows - wanted).square().sum()
    for size in (0.01, 1.0, 100.0):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(alternating, "_SWEEPS", 1)
            *_, left, sweeps = alternating_least_squares(target, metric, x, y, size * near, root)
        assert sweeps == 1
        assert left == pytest.approx(float(least), rel=1e-8)


def test_a_factor_that_cannot_be_bettered_stays_and_so_does_one_that_rounding_would_spoil() -> None:
    target = torch.diag(torch.tensor([2.0, 1.0]))
    x, y = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    found = alternating_minimization(target, x, y, lambda change: change)
    torch.testing.assert_close(found[0] @ found[1], x @ y)
    assert found[2:] == (pytest.approx(5**-0.5), pytest.approx(1.0), 1)

    signs = torch.tensor([1.0, -1e-3])  # the second as if rounding had made it of a zero
    target, x, y = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0]]), torch.tensor([[0.0, 1.0]])
    found = alternating_minimization(target, x, y, lambda change: change * signs)
    assert found[3] <= 9 - 1e-3
    metric = signs.diag().view(1, 2, 1, 2)
    halves = alternating_least_squares(
        target.view(1, 1, 2), metric, x.view(1, 1, 1), y.mT, torch.ones(1, 1), torch.eye(2)
    )
    assert all(part.isfinite().all() for part in halves[:2])
