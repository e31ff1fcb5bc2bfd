"""The optimum of a table, against gradient descent, perturbation and the general solver."""

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, ShapeError
from lrcompress.solvers import embedding as module
from lrcompress.solvers.embedding import truncate_embedding
from lrcompress.solvers.truncation import truncate


def problem(vocabulary: int = 40, width: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    table = torch.randn(vocabulary, width, dtype=torch.float64)
    rows = torch.rand(vocabulary, dtype=torch.float64) ** 3
    x = torch.randn(50, width, dtype=torch.float64) * torch.linspace(0.2, 3, width)
    return table, rows, x.mT @ x / 50


def cost(table: Tensor, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    lost = table - left @ right
    return (rows[:, None] * lost * (lost @ columns)).sum()


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_descent_finds_nothing_better(tied: bool) -> None:
    table, rows, moment = problem()
    columns = moment if tied else torch.eye(10, dtype=torch.float64)
    found = truncate_embedding(table, rows, moment if tied else None)
    best = found.factors(3)
    least = cost(table, best.left, best.right, rows, columns)
    scale = rows.max()  # of the energies: weights count relatively
    torch.testing.assert_close(found.energies[3:].sum() * scale, least)
    assert best.lost == pytest.approx(float(least / scale))

    left, right = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((40, 3), (3, 10))
    )
    descent = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        value = cost(table, left, right, rows, columns)
        value.backward()
        return value

    descent.step(closure)
    reached = cost(table, left, right, rows, columns).detach()
    assert least <= reached * (1 + 1e-9)
    torch.testing.assert_close(reached, least, rtol=1e-4, atol=0)
    for _ in range(20):
        moved = [f + 1e-3 * torch.randn_like(f) for f in (best.left, best.right)]
        assert cost(table, *moved, rows, columns) > least


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_it_is_the_general_optimum(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)  # of which 40 is no multiple
    table, rows, moment = problem()
    for columns in (None, moment):
        ours = truncate_embedding(table, rows, columns).factors(rank)
        known = truncate(table, rows, columns).factors(rank)
        torch.testing.assert_close(ours.left @ ours.right, known.left @ known.right)
        assert ours.error == pytest.approx(known.error, abs=1e-9)
    assert truncate_embedding(table.bfloat16(), rows).factors(rank).left.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("seen", [1, 3])
def test_directions_that_no_column_metric_sees_do_no_harm(seen: int, scale: float) -> None:
    table, rows, _ = problem()
    x = torch.randn(seen, 10, dtype=torch.float64)
    columns = scale * x.mT @ x
    found = truncate_embedding(table, rows, columns)
    whole = cost(table, table[:, :0], table[:0], rows, columns)
    for rank in (1, 2, 3):
        best = found.factors(rank)
        left = cost(table, best.left, best.right, rows, columns) / whole
        assert left == pytest.approx(found.factors(rank).error ** 2, abs=1e-6)
        assert (left < 1e-6) == (rank >= seen)


def test_metrics_of_less_precision_are_taken() -> None:
    table, rows, moment = problem()
    one, other = (
        truncate_embedding(table, rows, moment),
        truncate_embedding(table, rows.float(), moment.float()),
    )
    torch.testing.assert_close(one.energies, other.energies, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_wide_or_of_low_rank_is_exact_at_full_rank() -> None:
    table, rows, moment = problem(5, 10)
    low = torch.cat([table, table])[:, :4] @ table[:4]
    for one, weights in ((table, rows), (low, torch.cat([rows, rows]))):
        factors = truncate_embedding(one, weights, moment).factors(min(one.shape))
        torch.testing.assert_close(factors.left @ factors.right, one)
    assert len(truncate_embedding(table, rows).energies) == 5


def test_a_vocabulary_of_5000_and_rows_that_do_not_count() -> None:
    torch.manual_seed(0)
    table, rows = torch.randn(5000, 64), torch.zeros(5000)
    rows[:40] = 1.0  # no more than there are ranks: these are exact
    factors = truncate_embedding(table, rows).factors(40)
    torch.testing.assert_close((factors.left @ factors.right)[:40], table[:40], rtol=0, atol=1e-4)
    alike = truncate_embedding(table, torch.zeros(5000)).factors(8)
    torch.testing.assert_close(
        alike.left @ alike.right, (p := truncate_embedding(table).factors(8)).left @ p.right
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3),), ShapeError, r"table must be \(vocabulary, width\), got shape \(3,\)"),
        ((torch.ones(3, 2), torch.ones(2)), ShapeError, r"rows must be \(3,\) to match .*\(3, 2\)"),
        ((torch.ones(3, 2), None, torch.ones(3, 3)), ShapeError, r"columns must be \(2, 2\)"),
        ((torch.full((3, 2), torch.nan),), NotFiniteError, "^table holds 6 non-finite of 6"),
        (
            (torch.ones(3, 2), torch.tensor([1, torch.inf, 0])),
            NotFiniteError,
            "^rows holds 1 non-finite of 3",
        ),
        (
            (torch.ones(3, 2), None, torch.full((2, 2), torch.nan)),
            NotFiniteError,
            "^columns holds 4 non-finite of 4",
        ),
        ((torch.ones(3, 2), -torch.ones(3)), SettingError, "rows must not be negative, got -1"),
    ],
)
def test_what_does_not_fit_is_said(
    arguments: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        truncate_embedding(*arguments)


def test_a_rank_out_of_range_is_named() -> None:
    with pytest.raises(SettingError, match=r"from 1 to 2 for a table of shape \(3, 2\), got 3"):
        truncate_embedding(torch.ones(3, 2)).factors(3)
