"""Narrowings against brute force over all subsets, and against definitions."""

import itertools

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.solvers.narrowing import _inverse, narrowings


def problem(out: int, n: int, seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x, g = (torch.randn(tokens, size, dtype=torch.float64) for size in (n, out))
    x, g = (
        y @ (torch.eye(y.shape[1]) + torch.randn(y.shape[1], y.shape[1]) / 3).double()
        for y in (x, g)
    )
    weight = torch.randn(out, n, dtype=torch.float64)
    return weight, g.mT @ g / tokens, x.mT @ x / tokens


def lost(weight: Tensor, narrow: Tensor, kept: Tensor, g: Tensor, c: Tensor) -> float:
    """The definition: ``tr(G (W − M) C (W − M)ᵀ)`` with zeros for what is gone."""
    m = torch.zeros_like(weight)
    m[:, kept] = narrow
    return float(torch.trace(g @ (weight - m) @ c @ (weight - m).mT))


def best(weight: Tensor, g: Tensor, c: Tensor, kept: list[int]) -> float:
    """What a subset loses, by least squares on a root of the moment."""
    energies, basis = torch.linalg.eigh(c)
    half = basis * energies.clamp(min=0).sqrt()
    m = torch.linalg.lstsq(half[kept].mT, (weight @ half).mT, driver="gelsd").solution.mT
    return lost(weight, m, torch.tensor(kept), g, c)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("out", "n"), [(4, 7), (9, 6)])
def test_greedy_is_near_the_best_of_all_subsets_and_equal_at_both_ends(
    out: int, n: int, seed: int
) -> None:
    weight, g, c = problem(out, n, seed)
    found = narrowings(weight, g, c)
    for k in range(1, n):
        every = min(best(weight, g, c, list(s)) for s in itertools.combinations(range(n), k))
        one = found.solved(weight, c, k)
        assert one.lost == pytest.approx(lost(weight, one.weight, one.kept, g, c), rel=1e-6)
        assert one.lost == pytest.approx(best(weight, g, c, one.kept.tolist()), rel=1e-6)
        assert one.kept.equal(found.kept(k))
        whole = lost(weight, weight[:, :0], one.kept[:0], g, c)
        assert one.error == found.error(k) == pytest.approx((one.lost / whole) ** 0.5)
        assert every * (1 - 1e-9) <= one.lost <= 2 * every
        if k in (1, n - 1):
            assert one.lost == pytest.approx(every)


@pytest.mark.parametrize("seed", range(4))
def test_each_choice_saves_most_or_costs_least_of_all_that_are_left(seed: int) -> None:
    weight, g, c = problem(5, 8, seed)
    chosen, given_up = narrowings(weight, g, c).orders.tolist()
    for k in range(1, 8):
        others = [best(weight, g, c, [*chosen[: k - 1], j]) for j in chosen[k - 1 :]]
        assert others[0] == pytest.approx(min(others))
        stay = given_up[: k + 1]
        others = [best(weight, g, c, [j for j in stay if j != i]) for i in stay]
        assert others[-1] == pytest.approx(min(others), rel=1e-6)


def test_more_features_than_are_chosen_between_two_products_lose_what_the_definition_says() -> None:
    weight, g, c = problem(20, 150, tokens=400)
    found = narrowings(weight, g, c)
    assert sorted(found.orders[0].tolist()) == list(range(150))
    assert sorted(found.orders[1].tolist()) == list(range(150))
    for k in (1, 63, 64, 65, 128, 149):
        one = found.solved(weight, c, k)
        assert one.lost == pytest.approx(lost(weight, one.weight, one.kept, g, c), rel=1e-6)
    assert found.losses[0] == pytest.approx(float(torch.trace(g @ weight @ c @ weight.mT)))
    assert (found.losses.diff() <= 0).all()
    assert found.losses[-1] == 0


@pytest.mark.parametrize("k", [1, 3, 6])
def test_never_worse_than_dropping_the_same_features_without_solving_anew(k: int) -> None:
    weight, g, c = problem(5, 8)
    one = narrowings(weight, g, c).solved(weight, c, k)
    assert one.lost <= lost(weight, weight[:, one.kept], one.kept, g, c) * (1 + 1e-9)


def test_duplicate_and_dead_features_are_given_up_without_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    x = torch.cat([x, x[:, :2], 3 * x[:, 2:3] - x[:, 3:4], torch.zeros(300, 2)], 1)
    weight, g = torch.randn(6, 10), torch.eye(6)
    c = x.mT @ x / 300
    found = narrowings(weight, g, c)
    assert found.losses[5] == 0
    assert found.losses[4] > 0
    for k in (5, 6, 9):  # with singular moments of what is kept
        one = found.solved(weight, c, k)
        torch.testing.assert_close(x[:, one.kept] @ one.weight.mT, x @ weight.mT)
    assert not {8, 9} & set(found.solved(weight, c, 8).kept.tolist())


@pytest.mark.parametrize("alike", [2, 4, 7])
def test_features_that_are_one_another_share_what_they_tell(alike: int) -> None:
    torch.manual_seed(alike)
    x = (torch.randn(300, 1).expand(-1, alike) * torch.randn(alike)).double()
    weight, c = torch.randn(6, alike).double(), x.mT @ x / 300
    found = narrowings(weight, None, c)
    for k in range(1, alike):
        one = found.solved(weight, c, k)
        torch.testing.assert_close(
            x[:, one.kept] @ one.weight.mT, x @ weight.mT, rtol=1e-6, atol=1e-6
        )
        told = (one.weight - weight[:, one.kept]) * x[0, one.kept]
        torch.testing.assert_close(told, told[:, :1].expand(-1, k), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_moment_that_rounding_made_indefinite_is_inverted_above_a_floor(seed: int) -> None:
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    c = basis * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, -1e-3]) @ basis.mT
    inverse, scale = _inverse(c)
    torch.testing.assert_close(scale, c.diagonal().rsqrt())
    energies, directions = torch.linalg.eigh(c * scale * scale[:, None])
    wanted = directions / energies.clamp(min=1e-6) @ directions.mT
    torch.testing.assert_close(inverse, wanted, rtol=1e-3, atol=1e-3)
    found = narrowings(torch.randn(4, 6), None, c)
    assert found.losses.isfinite().all()


def test_errors_are_relative_however_small_the_metric_is() -> None:
    weight, g, c = problem(5, 8)
    one, small = narrowings(weight, g, c), narrowings(weight, g, 1e-9 * c)
    assert one.error(0) == small.error(0) == 1
    assert small.error(3) == pytest.approx(one.error(3))


def test_all_features_give_the_weight_itself() -> None:
    weight, g, c = problem(5, 8)
    assert narrowings(weight, g, c).solved(weight, c, 8).weight.equal(weight)


@pytest.mark.parametrize("full", [True, False])
def test_diagonal_metrics_and_none_are_the_full_ones(full: bool) -> None:
    weight, _, _ = problem(4, 6)
    g, c = torch.rand(4).double() + 0.1, torch.rand(6).double() + 0.1
    one = narrowings(weight, g, c)
    other = narrowings(weight, g.diag() if full else g, c.diag())
    torch.testing.assert_close(one.losses, other.losses)
    assert one.orders.equal(other.orders)
    plain = narrowings(weight)
    torch.testing.assert_close(plain.losses, narrowings(weight, torch.eye(4), torch.eye(6)).losses)
    assert plain.solved(weight, None, 2).weight.equal(weight[:, plain.orders[0, :2].sort().values])


def test_the_scale_of_the_metrics_changes_neither_order_nor_weight() -> None:
    weight, g, c = problem(5, 9)
    one, other = narrowings(weight, g, c), narrowings(weight, 1e-8 * g, 1e8 * c)
    assert one.orders.equal(other.orders)
    torch.testing.assert_close(
        one.solved(weight, c, 4).weight, other.solved(weight, 1e8 * c, 4).weight
    )


def test_a_permutation_of_the_features_is_that_of_the_order() -> None:
    weight, g, c = problem(5, 9)
    p = torch.randperm(9)
    one, other = narrowings(weight, g, c), narrowings(weight[:, p], g, c[p][:, p])
    assert p[other.orders].equal(one.orders)


def test_keeps_the_dtype_of_the_weight() -> None:
    weight, g, c = problem(3, 5)
    found = narrowings(weight.bfloat16(), g, c).solved(weight.bfloat16(), c, 2)
    assert found.weight.dtype == torch.bfloat16
    assert found.kept.dtype == torch.int64


def test_a_weight_of_zeros_loses_nothing() -> None:
    _, g, c = problem(3, 5)
    found = narrowings(torch.zeros(3, 5), g, c)
    assert not found.losses.any()
    assert found.error(2) == 0


def test_says_what_does_not_fit() -> None:
    weight, g, c = problem(3, 5)
    with pytest.raises(ShapeError, match=r"input metric must be .* got shape \(4, 4\)"):
        narrowings(weight, g, c[:4, :4])
    with pytest.raises(NotFiniteError, match="output metric holds 1 non-finite"):
        narrowings(weight, g.index_fill(0, torch.tensor(0), torch.inf).diagonal(), c)
    with pytest.raises(SettingError, match="from 1 to 5 inputs can be kept, got 6"):
        narrowings(weight, g, c).solved(weight, c, 6)
