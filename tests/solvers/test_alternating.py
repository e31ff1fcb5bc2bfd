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
def test_it_ends_where_the_gradient_is_zero_and_tells_what_is_lost(
    solve: Callable[..., tuple[Tensor, Tensor, float, float, int]],
    samples: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alternating, "_SWEEPS", 3000)
    monkeypatch.setattr(alternating, "_ENOUGH", 1e-13)
    target, metric = randn(ROWS, E, H), moment(E * H, samples).view(E, H, E, H)
    start = randn(ROWS, E, TERMS), randn(H, TERMS)
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
    assert all(part.isfinite().all() for part in found[:2])

    target = torch.einsum("ies,hs->ieh", x[..., :1], y[:, :1])
    x, y, error, *_ = solve(target, x, y, metric)
    assert error < 1e-4
    torch.testing.assert_close(torch.einsum("ies,hs->ieh", x, y), target, rtol=0, atol=1e-3)
