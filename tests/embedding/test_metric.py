"""What an error in a table counts."""

import pytest
import torch
from torch import Tensor

from lrcompress.embedding.metric import Metric, metric_of, solve
from lrcompress.embedding.settings import EmbeddingSettings, EmbeddingTable
from lrcompress.errors import NotFiniteError, ObservationError
from lrcompress.linalg import packed, packed_shape
from lrcompress.statistics.moments import Statistics, Sums

TABLE = EmbeddingTable("words", ("again",), ("head",), (6, 4), 0)
COUNTS = {"words": [9, 3, 0, 0, 1, 0], "again": [0, 1, 0, 0, 1, 0]}


def statistics(fisher: float = 1.0, moment: Tensor | None = None) -> Statistics:
    found = Statistics(steps=3)
    for name, counts in COUNTS.items():
        read, gave = Sums.zeros({"token_count": (6,)}), Sums.zeros({"token_fisher": (6,)})
        read.values["token_count"] += torch.tensor(counts)
        gave.values["token_fisher"] += fisher * torch.tensor(counts) ** 2
        found.inputs[name], found.outputs[name] = read, gave
    if moment is not None:
        head = Sums.zeros({"input_moment": packed_shape(4), "input_sum": (4,)})
        head.values["input_moment"] += packed(moment)
        head.tokens += 5
        found.inputs["head"], found.source["head"] = head, "head"
    return found


def test_rows_count_by_all_readings_but_padding_and_none_for_nothing() -> None:
    found = metric_of(TABLE, statistics(), EmbeddingSettings(keep=0.5, floor=0.1))
    counts = torch.tensor([0, 4, 0, 0, 2, 0]).double()
    assert found.rows is not None
    torch.testing.assert_close(found.rows, 0.9 * counts + 0.1)  # the mean is 1
    assert "4 of 6 rows were never read" in found.note
    assert "its head was never called" in found.note
    assert (
        metric_of(TABLE, Statistics(), EmbeddingSettings(keep=0.5, weighting="none")).rows is None
    )


def test_fisher_falls_back_to_frequency_where_no_gradient_came() -> None:
    settings = EmbeddingSettings(keep=0.5, weighting="fisher", floor=0)
    found = metric_of(TABLE, statistics(), settings)
    assert found.rows is not None
    assert found.rows.tolist() == [81, 10, 0, 0, 2, 0]
    blind = metric_of(TABLE, statistics(0.0), settings)
    assert blind.rows is not None
    assert blind.rows.tolist() == [0, 4, 0, 0, 2, 0]
    assert "no gradient reached it: rows count by frequency" in blind.note


def test_columns_count_for_the_head_and_for_the_embedding() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    moment = (x.mT @ x).double()
    seen = statistics(moment=x.mT @ x)
    for share in (1.0, 0.5):
        found = metric_of(TABLE, seen, EmbeddingSettings(keep=0.5, head_share=share)).columns
        own = moment.diagonal().mean() * torch.eye(4)
        assert found is not None
        torch.testing.assert_close(found, share * moment + (1 - share) * own, rtol=1e-6, atol=1e-6)
    for options in ({"head_share": 0}, {"heads": "untied"}):
        assert metric_of(TABLE, seen, EmbeddingSettings(keep=0.5, **options)).columns is None


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(ObservationError, match="embedding 'words' was never read in 0 observed st"):
        metric_of(TABLE, Statistics(), EmbeddingSettings(keep=0.5))
    with pytest.raises(NotFiniteError, match="row weights of 'words' hold a NaN"):
        metric_of(TABLE, statistics(torch.nan), EmbeddingSettings(keep=0.5, weighting="fisher"))
    with pytest.raises(NotFiniteError, match="input_moment of head 'head' holds a NaN"):
        metric_of(
            TABLE, statistics(moment=torch.full((4, 4), torch.nan)), EmbeddingSettings(keep=0.5)
        )


def test_kronecker_rows_are_the_best_of_one_block() -> None:
    torch.manual_seed(0)
    table, rows = torch.randn(6, 4).double(), torch.rand(6).double()
    found = solve(table, "kronecker", 2, Metric(rows, None, ""))
    assert (found.left.shape, found.right.shape) == ((6, 2), (1, 2))

    def cost(left: Tensor, block: Tensor) -> Tensor:
        return (rows[:, None] * (table - torch.kron(left, block)).square()).sum()

    left, block = (torch.randn(s).double().requires_grad_() for s in ((6, 2), (1, 2)))
    descent = torch.optim.LBFGS([left, block], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        value = cost(left, block)
        value.backward()
        return value

    descent.step(closure)
    torch.testing.assert_close(cost(found.left, found.right), cost(left, block).detach())
