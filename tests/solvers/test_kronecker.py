"""Sums of Kronecker products against slow loops, other optimisers and the definition."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.solvers import alternating
from lrcompress.solvers.kronecker import (
    KroneckerFactors,
    KroneckerSums,
    are_sizes,
    check_divides,
    divisors,
    kronecker_sums,
    multiply_adds,
    nearest_shape,
)

SHAPE = (6, 12)
FIRSTS = [(2, 3), (3, 12), (6, 4), (1, 2), (3, 1), (1, 12)]
each_first = pytest.mark.parametrize("first", FIRSTS, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moment(size: int, samples: int = 60) -> Tensor:
    x = randn(samples, size) * torch.logspace(0, 1, size).double()
    return x.mT @ x / samples


def whole(factors: KroneckerFactors) -> Tensor:
    pairs = zip(factors.first, factors.second, strict=True)
    return torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)


def lost(change: Tensor, g: Tensor | None, c: Tensor | None) -> Tensor:
    for side, axis in ((g, 0), (c, 1)):
        assert side is None or len(side) == change.shape[axis]
    left = change if g is None else (g[:, None] * change if g.ndim == 1 else g @ change)
    both = left if c is None else (left * c if c.ndim == 1 else left @ c)
    return (both * change).sum()


def blocks(weight: Tensor, first: tuple[int, int]) -> Tensor:
    """The rearrangement as its definition says it, entry by entry."""
    (m1, n1), (m, n) = first, weight.shape
    m2, n2 = m // m1, n // n1
    result = torch.zeros(m1 * n1, m2 * n2, dtype=weight.dtype)
    for i, j, k, q in product(range(m1), range(n1), range(m2), range(n2)):
        result[i * n1 + j, k * n2 + q] = weight[i * m2 + k, j * n2 + q]
    return result


@each_first
@pytest.mark.parametrize("terms", [1, 2])
def test_without_a_metric_it_is_the_truncation_of_the_blocks(
    first: tuple[int, int], terms: int
) -> None:
    weight = randn(*SHAPE)
    solved = kronecker_sums(weight, first)
    factors = solved.factors(terms)

    values = torch.linalg.svdvals(blocks(weight, first)).square()
    torch.testing.assert_close(solved.energies, values)
    best = values[terms:].sum()
    torch.testing.assert_close(lost(weight - whole(factors), None, None), best)
    assert factors.lost == pytest.approx(float(best), abs=1e-9)
    assert factors.error == pytest.approx(float((best / weight.square().sum()).sqrt()), abs=1e-6)
    assert factors.first.shape == (terms, *first)
    assert solved.unit == factors.first[0].numel() + factors.second[0].numel()
    torch.testing.assert_close(factors.product(), whole(factors))
    norms = factors.first.flatten(1).norm(dim=1), factors.second.flatten(1).norm(dim=1)
    torch.testing.assert_close(*norms)


@each_first
def test_all_terms_together_are_the_weight(first: tuple[int, int]) -> None:
    weight = randn(*SHAPE)
    solved = kronecker_sums(weight, first, moment(6), moment(12))
    factors = solved.factors(len(solved.energies))
    torch.testing.assert_close(whole(factors), weight)
    assert factors.error == pytest.approx(0, abs=1e-6)


@each_first
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_separable_metric_is_found_and_solved_exactly(
    first: tuple[int, int], diagonal: bool
) -> None:
    sizes = (first[0], 6 // first[0]), (first[1], 12 // first[1])
    g, c = (torch.kron(moment(one), moment(two)) for one, two in sizes)
    if diagonal:
        g, c = (torch.kron(*(moment(k).diagonal() for k in pair)) for pair in sizes)
    weight = randn(*SHAPE)
    solved = kronecker_sums(weight, first, g, c)
    factors = solved.factors(1)
    assert solved.exact
    assert factors.sweeps == 0

    reached = lost(weight - whole(factors), g, c)
    assert factors.lost == pytest.approx(float(reached), rel=1e-6)
    assert reached <= _descended(weight, first, 1, g, c) * (1 + 1e-6)


def _descended(
    weight: Tensor, first: tuple[int, int], terms: int, g: Tensor | None, c: Tensor | None
) -> Tensor:
    """The least of what a general optimiser finds from several random starts."""
    found = []
    for _ in range(2):
        a = randn(terms, *first).requires_grad_()
        b = randn(terms, 6 // first[0], 12 // first[1]).requires_grad_()
        optimizer = torch.optim.LBFGS([a, b], max_iter=80, line_search_fn="strong_wolfe")

        def closure(a: Tensor = a, b: Tensor = b, opt: torch.optim.LBFGS = optimizer) -> Tensor:
            opt.zero_grad()
            made = torch.stack([torch.kron(x, y) for x, y in zip(a, b, strict=True)]).sum(0)
            value = lost(weight - made, g, c)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        found.append(closure().detach())
    return torch.stack(found).min()


HALVES = [(1, 6), (6, 2), (2, 12), (3, 1)]  # of which one factor is solved exactly


@pytest.mark.parametrize("first", [(2, 3), (6, 4), (1, 2), *HALVES], ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_in_any_other_metric_it_ends_in_a_stationary_point(
    first: tuple[int, int], diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SWEEPS", 400), ("_STEPS", 12), ("_ENOUGH", 1e-13)):
        monkeypatch.setattr(alternating, name, value)
    weight, g, c = randn(*SHAPE), moment(6), moment(12)
    if diagonal:
        g, c = g.diagonal().clone(), c.diagonal().clone()
    solved = kronecker_sums(weight, first, g, c)
    factors = solved.factors(1)
    assert not solved.exact
    assert factors.sweeps > 0

    a, b = (x.clone().requires_grad_() for x in factors.values)
    value = lost(weight - torch.kron(a[0], b[0]), g, c)
    value.backward()  # type: ignore[no-untyped-call]
    scale = float(lost(weight, g, c))
    assert a.grad is not None
    assert b.grad is not None
    with torch.no_grad():
        assert max((x.grad * x).norm() for x in (a, b)) < 1e-4 * scale  # type: ignore[operator]
    assert factors.lost == pytest.approx(value.item(), rel=1e-6)
    assert factors.error == pytest.approx((value.item() / scale) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("first", [(2, 4), *HALVES], ids=str)
@pytest.mark.parametrize("terms", [1, 2])
def test_every_sweep_only_lowers_the_error(
    first: tuple[int, int], terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternating, "_ENOUGH", 0.0)
    weight, g, c = randn(*SHAPE), moment(6), moment(12)
    solved, errors = kronecker_sums(weight, first, g, c), []
    for sweeps in range(6):
        monkeypatch.setattr(alternating, "_SWEEPS", sweeps)
        factors = solved.factors(terms)
        assert factors.sweeps == sweeps
        errors.append(factors.lost)
        torch.testing.assert_close(lost(weight - whole(factors), g, c).item(), factors.lost)
    assert errors == sorted(errors, reverse=True)
    # an exact half is there before the first sweep
    assert errors[1] < (1.0 if first in HALVES else 0.99) * errors[0]


@pytest.mark.parametrize("first", [(1, 24), (12, 2), (2, 48), (6, 1)], ids=str)
def test_an_exact_half_loses_no_more_than_steps_in_turn(
    first: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, g, c = randn(12, 48), moment(12, 300), moment(48, 300)
    solved = kronecker_sums(weight, first, g, c)
    for sweeps in (0, 4):
        monkeypatch.setattr(alternating, "_SWEEPS", sweeps)
        exact = solved.factors(2).lost
        with monkeypatch.context() as other:
            other.setattr(KroneckerSums, "_in_halves", lambda *_: None)
            steps = solved.factors(2).lost
        assert exact < (1.005 if sweeps else 1) * steps


@pytest.mark.parametrize("first", [(2, 3), (6, 2), (2, 12)], ids=str)
@pytest.mark.parametrize("samples", [60, 3])
def test_float32_weights_lose_what_float64_ones_do(first: tuple[int, int], samples: int) -> None:
    weight, g, c = randn(*SHAPE), moment(6, samples), moment(12, samples)
    weight, g, c = weight.float(), g.float(), c.float()
    found = kronecker_sums(weight, first, g, c).factors(1)
    expected = kronecker_sums(weight.double(), first, g, c).factors(1)
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    told = lost(weight.double() - found.product(), g.double(), c.double())
    assert found.lost == pytest.approx(float(told), rel=2e-3)


@pytest.mark.parametrize("first", [(3, 4), *HALVES], ids=str)
def test_singular_moments_need_no_damping(first: tuple[int, int]) -> None:
    weight, g, c = randn(*SHAPE), moment(6, samples=2), moment(12, samples=3)
    c[:, 4:8] = c[4:8] = 0  # inputs that are never anything but zero
    factors = kronecker_sums(weight, first, g, c).factors(2)
    assert all(value.isfinite().all() for value in factors.values)
    assert factors.error < 0.9
    torch.testing.assert_close(lost(weight - whole(factors), g, c).item(), factors.lost)

    nothing = kronecker_sums(weight, (3, 4), torch.zeros(6), torch.zeros(12, 12)).factors(2)
    torch.testing.assert_close(whole(nothing), whole(kronecker_sums(weight, (3, 4)).factors(2)))
    zero = kronecker_sums(torch.zeros(*SHAPE), (3, 4), g, c).factors(1)
    assert zero.error == 0
    assert not whole(zero).any()


def test_an_embedding_by_token_counts_takes_memory_of_its_own_size_only() -> None:
    """``(vocabulary, width / f)`` by ``(1, f)``: counts are a diagonal metric on the rows."""
    table, counts = torch.randn(20_000, 12), torch.rand(20_000)
    solved = kronecker_sums(table, (20_000, 3), counts)
    factors = solved.factors(1)
    assert solved.exact
    assert factors.first.shape == (1, 20_000, 3)
    assert factors.second.shape == (1, 1, 4)
    rows = (table.double() * counts.double().sqrt()[:, None]).view(-1, 4)
    torch.testing.assert_close(solved.energies, torch.linalg.svdvals(rows).square())


def test_the_dtype_is_the_weights() -> None:
    factors = kronecker_sums(torch.randn(6, 12).bfloat16(), (2, 3), None, moment(12)).factors(1)
    assert {value.dtype for value in factors.values} == {torch.bfloat16}


def test_the_shape_is_that_of_a_weight_which_is_a_kronecker_product() -> None:
    weight = torch.kron(randn(12, 24), randn(2, 1))
    assert nearest_shape(weight, 290) == (12, 24)
    assert nearest_shape(weight, 300, moment(24), moment(24), terms=1) == (12, 24)


def test_the_shape_is_that_which_the_metric_sees() -> None:
    """Rows and columns that count for nothing hide what the others are."""
    weight = torch.kron(randn(4, 6), randn(6, 8))
    output, input = torch.ones(24), torch.ones(48)
    output[::6], input[::8] = 1e-9, 1e-9
    weight[::6] += 5 * randn(4, 48)
    weight[:, ::8] += 5 * randn(24, 6)
    for sides in ((output, input), (output.diag(), input.diag())):
        assert nearest_shape(weight, 300, *sides, terms=1) == (4, 6)
    assert nearest_shape(weight, 300, terms=1) != (4, 6)


@pytest.mark.parametrize("draw", range(3))
def test_the_shape_loses_little_more_than_the_best_of_all(draw: int) -> None:
    torch.manual_seed(draw)
    weight, budget = randn(12, 24) + randn(12, 3) @ randn(3, 24), 130
    g, c = moment(12, 300), moment(24, 300)
    ends = {}
    for m1, n1 in product(divisors(12), divisors(24)):
        unit = m1 * n1 + 288 // (m1 * n1)
        small = unit <= budget and min(multiply_adds((m1, n1), (12 // m1, 24 // n1))) <= 195
        if small and (m1, n1) not in ((12, 1), (1, 24), (1, 1), (12, 24)):
            ends[m1, n1] = kronecker_sums(weight, (m1, n1), g, c).factors(budget // unit).error
    found = nearest_shape(weight, budget, g, c)
    assert found is not None
    assert ends[found] < 1.15 * min(ends.values())
    assert ends[found] < 0.8 * sorted(ends.values())[len(ends) // 2]


@pytest.mark.parametrize("metric", [False, True])
def test_no_shape_takes_more_than_the_budget_and_none_is_of_rank_one(metric: bool) -> None:
    weight = randn(12, 18)
    sides = (moment(12), moment(18)) if metric else (None, None)
    for budget in (60, 110, 150):
        first = nearest_shape(weight, budget, *sides)
        assert first is not None
        second = 12 // first[0], 18 // first[1]
        unit = first[0] * first[1] + second[0] * second[1]
        assert unit <= budget
        assert budget // unit * min(multiply_adds(first, second)) <= 1.5 * budget
        a, b = randn(*first), randn(*second)
        assert torch.linalg.matrix_rank(torch.kron(a, b)) > 1
    assert nearest_shape(weight, 20) is None
    assert nearest_shape(weight, 200, terms=30) is None


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (8, 8)])
def test_of_every_shape_what_is_lost_is_what_the_definition_says(
    shape: tuple[int, int], sides: str
) -> None:
    weight = randn(*shape)
    g = moment(shape[0]) if sides != "input" else None
    c = moment(shape[1]) if sides != "output" else None
    for first in product(*map(divisors, shape)):
        found = kronecker_sums(weight, first, g, c)
        for terms in {1, min(2, len(found.energies))}:
            factors = found.factors(terms)
            left = float(lost(weight - whole(factors), g, c))
            assert factors.lost == pytest.approx(left, rel=1e-6, abs=1e-9), first
            assert factors.error == pytest.approx(
                (left / float(lost(weight, g, c))) ** 0.5, abs=1e-5
            )


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_metric_is_separable_whatever_its_scale(scale: float) -> None:
    weight, near = randn(6, 12), torch.kron(moment(3), moment(4))
    assert kronecker_sums(weight, (2, 3), None, scale * near).exact
    assert not kronecker_sums(weight, (2, 3), None, scale * moment(12)).exact


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_shape_is_the_best_of_those_that_fit_with_so_many_terms(
    terms: int, scale: float
) -> None:
    weight = scale * randn(12, 18)
    for budget in range(60, 200, 20):
        ends = {}
        for m1, n1 in product(divisors(12), divisors(18)):
            other = 12 // m1, 18 // n1
            work = terms * min(multiply_adds((m1, n1), other))
            fits = terms * (m1 * n1 + other[0] * other[1]) <= budget
            fits &= terms <= min(m1 * n1, other[0] * other[1]) and work <= min(216, 1.5 * budget)
            if fits and torch.linalg.matrix_rank(torch.kron(randn(m1, n1), randn(*other))) > 1:
                ends[m1, n1] = kronecker_sums(weight, (m1, n1)).factors(terms).error, work
        found = nearest_shape(weight, budget, terms=terms)
        assert (found is None) == (not ends)
        if found is not None:
            assert ends[found][0] == pytest.approx(min(ends.values())[0], abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 4), (3, 5)), ((7, 1), (2, 3)), ((1, 5), (4, 2))]
)
def test_multiply_adds_are_those_of_both_orders(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    a, b, x = randn(*first), randn(*second), randn(first[1], second[1])
    counted = []
    for apply in (lambda: (a @ x) @ b.mT, lambda: a @ (x @ b.mT)):
        with FlopCounterMode(display=False) as flops:
            apply()
        counted.append(flops.get_total_flops() // 2)
    assert multiply_adds(first, second) == tuple(counted)


def test_bad_input_is_told() -> None:
    weight = randn(*SHAPE)
    with pytest.raises(
        ShapeError, match=r"\(6, 12\) cannot be \[4, 5\].*nearest that does is \[3, 4\]"
    ):
        kronecker_sums(weight, (4, 5))
    with pytest.raises(ShapeError, match=r"here: the first factor needs two whole sizes.*\(3,\)"):
        check_divides((3,), (6, 12), "here: ")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"two whole sizes from 1, got \(0, 2\)"):
        kronecker_sums(weight, (0, 2))
    with pytest.raises(ShapeError, match=r"input metric must be \(12,\) or \(12, 12\)"):
        kronecker_sums(weight, (2, 3), None, torch.ones(6))
    with pytest.raises(ShapeError, match=r"output metric must be \(6,\) or \(6, 6\)"):
        kronecker_sums(weight, (2, 3), torch.ones(12))
    with pytest.raises(ShapeError, match=r"^the first factor needs two whole sizes"):
        check_divides("23", (6, 12))  # type: ignore[arg-type]
    assert not any(map(are_sizes, (None, 6, "23", (2,), (2, 3, 1), (2, 0.5), (True, 2))))
    assert all(map(are_sizes, ((2, 3), [1, 1])))
    with pytest.raises(NotFiniteError, match=r"weight holds 72 non-finite of 72"):
        kronecker_sums(weight / 0, (2, 3))
    for terms in (0, 7):
        with pytest.raises(
            SettingError, match=rf"terms must be from 1 to 6 .*\(2, 3\), got {terms}"
        ):
            kronecker_sums(weight, (2, 3)).factors(terms)
