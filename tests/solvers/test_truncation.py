"""The solver against the definition: the objective, the textbook route, and its symmetries."""

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.solvers.truncation import Factors, rank_energies, truncate

KINDS = ["none", "diagonal", "full"]
SHAPES = [(5, 9), (9, 5), (6, 6)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square"])
each_output = pytest.mark.parametrize("output", KINDS)
each_input = pytest.mark.parametrize("input_", KINDS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def metric(kind: str, size: int, samples: int = 40) -> Tensor | None:
    """A random metric with a spread of scales."""
    if kind == "none":
        return None
    x = randn(samples, size) * torch.logspace(0, 1.5, size).double()
    return x.square().mean(0) if kind == "diagonal" else x.mT @ x / samples


def whole(side: Tensor | None, size: int) -> Tensor:
    if side is None:
        return torch.eye(size, dtype=torch.float64)
    return side.diag() if side.ndim == 1 else side


def objective(change: Tensor, g: Tensor | None, c: Tensor | None) -> float:
    """``‖P change Q‖²``, as ``tr(G change C changeᵀ)``: no root of anything is needed."""
    m, n = change.shape
    return float((whole(g, m) @ change @ whole(c, n) * change).sum())


def symmetric_root(side: Tensor) -> Tensor:
    energy, basis = torch.linalg.eigh(side)
    return basis @ energy.clamp(min=0).sqrt().diag() @ basis.mT


def textbook(
    w: Tensor, g: Tensor | None, c: Tensor | None, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The optimum by symmetric roots, a full SVD and a pseudo-inverse; with it, ``P`` and ``Q``."""
    p, q = symmetric_root(whole(g, w.shape[0])), symmetric_root(whole(c, w.shape[1]))
    u = torch.linalg.svd(p @ w @ q).U[:, :rank]
    return torch.linalg.pinv(p, rtol=1e-7, hermitian=True) @ u @ u.mT @ p @ w, p, q


def product(factors: Factors) -> Tensor:
    return factors.left @ factors.right


@each_shape
@each_output
@each_input
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_agrees_with_the_textbook_in_product_error_and_energies(
    shape: tuple[int, int], output: str, input_: str, rank: int
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    solved = truncate(w, g, c)
    factors = solved.factors(rank)

    expected, p, q = textbook(w, g, c, rank)
    torch.testing.assert_close(product(factors), expected)
    torch.testing.assert_close(solved.energies, torch.linalg.svdvals(p @ w @ q).square())
    lost = objective(w - product(factors), g, c)
    assert factors.error == pytest.approx((lost / objective(w, g, c)) ** 0.5, abs=1e-6)
    assert factors.left.shape == (shape[0], rank)
    assert factors.right.shape == (rank, shape[1])


@each_shape
@each_output
@each_input
def test_no_other_matrix_of_that_rank_does_better(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    best = truncate(w, g, c).factors(2)
    least = objective(w - product(best), g, c)

    for _ in range(20):
        random = randn(shape[0], 2)  # a random column space, used as well as it can be
        g_random = whole(g, shape[0]) @ random
        right = torch.linalg.solve(random.mT @ g_random, g_random.mT @ w)
        assert objective(w - random @ right, g, c) > least
        nearby = [factor + 1e-3 * torch.randn_like(factor) for factor in (best.left, best.right)]
        assert objective(w - nearby[0] @ nearby[1], g, c) > least


@each_shape
@each_output
@each_input
def test_the_objective_has_no_slope_at_the_solution(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    best = truncate(w, g, c).factors(2)
    left, right = (f.clone().requires_grad_() for f in (best.left, best.right))
    change = w - left @ right
    loss = (whole(g, shape[0]) @ change @ whole(c, shape[1]) * change).sum()
    for slope in torch.autograd.grad(loss, (left, right)):
        assert slope.abs().max() < 1e-8 * loss.item()


@each_shape
@each_output
@each_input
def test_transposing_everything_transposes_the_solution(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    one, other = truncate(w, g, c).factors(3), truncate(w.mT, c, g).factors(3)
    torch.testing.assert_close(product(one), product(other).mT)
    assert one.error == pytest.approx(other.error)


@each_shape
def test_a_diagonal_metric_is_that_matrix_and_none_is_the_identity(shape: tuple[int, int]) -> None:
    w, g, c = randn(*shape), metric("diagonal", shape[0]), metric("diagonal", shape[1])
    torch.testing.assert_close(
        product(truncate(w, g, None).factors(3)),
        product(truncate(w, whole(g, shape[0]), whole(None, shape[1])).factors(3)),
    )
    torch.testing.assert_close(
        product(truncate(w, None, c).factors(3)),
        product(truncate(w, whole(None, shape[0]), whole(c, shape[1])).factors(3)),
    )


@each_shape
def test_the_lower_triangle_in_place_of_the_upper_would_be_no_solution(
    shape: tuple[int, int],
) -> None:
    """``G = R Rᵀ`` has ``P = Rᵀ``. With ``R`` the answer is another, and a worse one."""
    w, g, c = randn(*shape), metric("full", shape[0]), metric("full", shape[1])
    assert g is not None
    r = torch.linalg.cholesky(g)
    q = symmetric_root(whole(c, shape[1]))

    def with_root(p: Tensor) -> Tensor:
        u = torch.linalg.svd(p @ w @ q).U[:, :2]
        return torch.linalg.solve(p, u @ u.mT @ p @ w)

    ours = product(truncate(w, g, c).factors(2))
    torch.testing.assert_close(ours, with_root(r.mT))
    trap = objective(w - with_root(r), g, c)
    assert trap > 1.05 * objective(w - ours, g, c)


@each_shape
@each_output
@pytest.mark.parametrize("case", ["few tokens", "dead inputs", "zero entries"])
def test_is_exact_on_the_inputs_once_the_rank_covers_them(
    shape: tuple[int, int], output: str, case: str
) -> None:
    w, g = randn(*shape), metric(output, shape[0])
    x = randn(30, shape[1])
    if case == "few tokens":
        x = x[:3]
    else:
        x[:, 1:-2] = 0
    moment = x.mT @ x
    solved = truncate(w, g, moment.diagonal() if case == "zero entries" else moment)
    factors = solved.factors(3)
    torch.testing.assert_close(x @ product(factors).mT, x @ w.mT)
    assert factors.error < 1e-6
    assert solved.factors(2).error > 1e-3


@each_shape
@each_input
@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_output_metric_that_sees_three_directions_is_used_as_far_as_it_sees(
    shape: tuple[int, int], input_: str, kind: str, rank: int
) -> None:
    w, c = randn(*shape), metric(input_, shape[1])
    gradients = randn(30, shape[0]) if kind == "diagonal" else randn(3, shape[0])
    if kind == "diagonal":
        gradients[:, 3:] = 0
    moment = gradients.mT @ gradients
    g = moment.diagonal() if kind == "diagonal" else moment
    factors = truncate(w, g, c).factors(rank)
    expected, p, q = textbook(w, g, c, rank)
    seen = (p @ product(factors) @ q, p @ expected @ q)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4 * float(seen[1].abs().max()))
    assert product(factors).isfinite().all()
    # what is not seen is not blown up: regressed on what is, or left as it was
    assert product(factors).norm() < 10 * w.norm()


@each_shape
@each_output
@each_input
@pytest.mark.parametrize("samples", [40, 2], ids=["definite", "singular"])
def test_full_rank_reproduces_the_weight(
    shape: tuple[int, int], output: str, input_: str, samples: int
) -> None:
    w = randn(*shape)
    g, c = metric(output, shape[0], samples), metric(input_, shape[1], samples)
    factors = truncate(w, g, c).factors(min(shape))
    torch.testing.assert_close(product(factors), w, rtol=1e-5, atol=1e-5)
    assert factors.error < 1e-6


@each_shape
def test_every_component_of_a_truncation_can_be_trained(shape: tuple[int, int]) -> None:
    """A component that is zero on both sides would never get a gradient."""
    x = randn(2, shape[1])
    factors = truncate(randn(*shape), None, x.mT @ x).factors(4)
    assert (factors.left.norm(dim=0) > 0).all()
    assert (factors.right.norm(dim=1) > 0).all()


@each_shape
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_metric_that_is_all_zero_counts_as_the_identity(
    shape: tuple[int, int], side: str, kind: str
) -> None:
    size = shape[0] if side == "output" else shape[1]
    zero = torch.zeros(size if kind == "diagonal" else (size, size))
    w = randn(*shape)
    solved, plain = truncate(w, **{side: zero}).factors(2), truncate(w).factors(2)
    torch.testing.assert_close(product(solved), product(plain))
    assert solved.error == plain.error


@each_shape
def test_a_zero_weight_has_zero_factors(shape: tuple[int, int]) -> None:
    g, c = metric("full", shape[0]), metric("full", shape[1])
    factors = truncate(torch.zeros(shape), g, c).factors(2)
    assert product(factors).equal(torch.zeros(shape))
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()
    assert factors.error == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
@each_shape
def test_factors_have_the_dtype_of_the_weight_and_its_precision(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    w = randn(*shape).to(dtype)
    g, c = metric("full", shape[0]), metric("full", shape[1])
    assert g is not None
    assert c is not None
    low = truncate(w, g.float(), c.float()).factors(3)
    exact = truncate(w.double(), g, c).factors(3)
    assert low.left.dtype == low.right.dtype == dtype
    assert low.error == pytest.approx(exact.error, rel=1e-3)
    torch.testing.assert_close(
        low.left.double() @ low.right.double(),
        product(exact),
        rtol=0,
        atol=tolerance * float(product(exact).abs().max()),
    )


@each_shape
@each_output
@each_input
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_metrics_does_not_matter(
    shape: tuple[int, int], output: str, input_: str, scale: float
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    plain = truncate(w, g, c).factors(3)
    scaled = truncate(
        w, None if g is None else scale * g, None if c is None else scale * c
    ).factors(3)
    torch.testing.assert_close(product(scaled), product(plain))
    assert scaled.error == pytest.approx(plain.error)


@each_shape
@each_output
@each_input
def test_reordering_rows_and_columns_reorders_the_solution(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])

    def reordered(side: Tensor | None, order: Tensor) -> Tensor | None:
        if side is None:
            return None
        return side[order] if side.ndim == 1 else side[order][:, order]

    moved = truncate(w[rows][:, columns], reordered(g, rows), reordered(c, columns)).factors(3)
    expected = product(truncate(w, g, c).factors(3))[rows][:, columns]
    torch.testing.assert_close(product(moved), expected)


@each_shape
def test_scaling_the_weight_scales_the_product_and_keeps_the_error(shape: tuple[int, int]) -> None:
    w, g, c = randn(*shape), metric("full", shape[0]), metric("full", shape[1])
    one, ten = truncate(w, g, c).factors(2), truncate(10 * w, g, c).factors(2)
    torch.testing.assert_close(product(ten), 10 * product(one))
    assert ten.error == pytest.approx(one.error)


@each_shape
@each_output
@each_input
def test_truncating_a_truncation_again_changes_nothing(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    once = truncate(w, g, c).factors(2)
    twice = truncate(product(once), g, c)
    torch.testing.assert_close(product(twice.factors(2)), product(once))
    assert twice.error(2) < 1e-6


@each_shape
def test_both_factors_carry_the_same_norm(shape: tuple[int, int]) -> None:
    g, c = metric("full", shape[0]), metric("full", shape[1])
    factors = truncate(randn(*shape), g, c).factors(4)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


@each_shape
def test_the_error_falls_with_every_rank_to_nothing(shape: tuple[int, int]) -> None:
    solved = truncate(randn(*shape), metric("full", shape[0]), metric("full", shape[1]))
    errors = [solved.error(rank) for rank in range(min(shape) + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(1)
    assert errors[-1] == 0


def test_arguments_are_left_as_they_were() -> None:
    arguments = (randn(5, 9), metric("full", 5), metric("full", 9))
    before = [None if a is None else a.clone() for a in arguments]
    truncate(*arguments).factors(3)
    for argument, kept in zip(arguments, before, strict=True):
        torch.testing.assert_close(argument, kept, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [-1, 0, 6])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(
        SettingError, match=rf"rank must be from 1 to 5 for a weight of shape \(5, 9\), got {rank}"
    ):
        truncate(randn(5, 9)).factors(rank)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_and_counted(position: int, value: float) -> None:
    arguments = [randn(3, 4), randn(3), randn(4)]
    arguments[position].view(-1)[:2] = value
    name = ("weight", "output metric", "input metric")[position]
    total = arguments[position].numel()
    with pytest.raises(NotFiniteError, match=f"{name} holds 2 non-finite of {total} values"):
        truncate(*arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3,), None, None), r"weight must be \(out, in\), got shape \(3,\)"),
        (((2, 3, 4), None, None), r"weight must be \(out, in\), got shape \(2, 3, 4\)"),
        (((3, 4), (4,), None), r"output metric must be \(3,\) or \(3, 3\) .* got shape \(4,\)"),
        (((3, 4), (3, 4), None), r"output metric must be .* got shape \(3, 4\)"),
        (((3, 4), None, (3,)), r"input metric must be \(4,\) or \(4, 4\) .* got shape \(3,\)"),
        (((3, 4), None, (4, 3)), r"input metric must be .* weight \(3, 4\), got shape \(4, 3\)"),
    ],
)
def test_what_does_not_fit_together_is_named(
    shapes: tuple[tuple[int, ...] | None, ...], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        truncate(*(None if shape is None else torch.ones(shape) for shape in shapes))  # type: ignore[arg-type]


@each_shape
@pytest.mark.parametrize(("most", "held"), [(None, 5), (3, 3), (1, 1), (0, 1), (99, 5)])
@pytest.mark.parametrize("seen", [2, 5], ids=["singular", "regular"])
def test_as_many_ranks_are_held_as_were_asked_for(
    shape: tuple[int, int], most: int | None, held: int, seen: int
) -> None:
    w = randn(*shape)
    moment = metric("full", shape[1])
    assert moment is not None
    if seen == 2:
        x = randn(2, shape[1])
        moment = x.mT @ x
    held += shape == (6, 6) and held == 5
    some, every = truncate(w, None, moment, most=most), truncate(w, None, moment)
    assert (some.left.shape[1], some.right.shape[0]) == (held, held)
    torch.testing.assert_close(some.energies, every.energies)
    for rank in range(1, held + 1):
        torch.testing.assert_close(product(some.factors(rank)), product(every.factors(rank)))
        torch.testing.assert_close(some.basis(rank), every.left[:, :rank])
    with pytest.raises(SettingError, match=f"rank must be from 1 to {held} "):
        some.factors(held + 1)


@each_shape
@each_output
@each_input
def test_what_is_lost_is_the_objective(shape: tuple[int, int], output: str, input_: str) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    factors = truncate(w, g, c).factors(2)
    assert factors.lost == pytest.approx(objective(w - factors.product(), g, c))
    assert factors.product().equal(factors.left @ factors.right)
    assert [x.shape for x in factors.values] == [(2, shape[1]), (shape[0], 2)]


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_what_is_held_is_of_float32_at_least_and_the_basis_of_float64(
    dtype: torch.dtype, held: torch.dtype
) -> None:
    found = truncate(torch.randn(4, 6).to(dtype))
    assert (found.left.dtype, found.right.dtype) == (held, held)
    assert found.basis(2).dtype == found.factors(2).product().dtype == torch.float64


@each_shape
@each_input
def test_the_curve_alone_is_that_of_the_truncation(shape: tuple[int, int], input_: str) -> None:
    w, c = randn(*shape) / 10, metric(input_, shape[1])
    found = rank_energies(w, c)
    torch.testing.assert_close(found, truncate(w, None, c).energies)
    low = randn(shape[0], 1) @ randn(1, shape[1])
    assert (rank_energies(low, c) >= 0).all()
