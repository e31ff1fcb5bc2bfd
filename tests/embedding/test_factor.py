"""Tables replaced on a bare module: all or nothing, and what optimizers know of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.embedding import EmbeddingSettings, factor_tables_
from lrcompress.errors import LayerError, NotFiniteError, ObservationError
from lrcompress.nn import KroneckerEmbedding, LowRankEmbedding, LowRankLinear, SafeEmbedding
from lrcompress.statistics.moments import Statistics


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(30, 8), nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30)
        self.again.weight = self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).tanh() + self.again(ids))


def trained() -> tuple[Model, torch.optim.Adam]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 30, (4, 5))).square().mean().backward()
        optimizer.step()
    return model, optimizer


def cut(method: str, **options: object) -> EmbeddingSettings:
    return EmbeddingSettings(method=method, targets=["words"], weighting="none", **options)  # type: ignore[arg-type]


def test_all_that_hold_a_table_share_the_nearest_one() -> None:
    model, _ = trained()
    table = model.words.weight.detach().clone()
    record = factor_tables_(model, Statistics(), cut("low_rank", rank=3, head_share=0))
    assert isinstance(model.words, LowRankEmbedding)
    assert isinstance(model.head, LowRankLinear)
    assert model.again.left.weight is model.words.left.weight is model.head.left.weight
    u, s, vh = torch.linalg.svd(table, full_matrices=False)
    torch.testing.assert_close(model.words.weight, (u[:, :3] * s[:3]) @ vh[:3])
    assert record.layers[0].error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
    assert record.keep == 3 * 38 / 240


@pytest.mark.parametrize(
    ("method", "kind", "rank"),
    [("kronecker", KroneckerEmbedding, 4), ("safe", SafeEmbedding, 2)],
)
def test_other_forms_leave_the_table_to_the_head(method: str, kind: type, rank: int) -> None:
    model, optimizer = trained()
    weight = model.words.weight
    dense = optimizer.state[weight]["exp_avg"].clone()
    settings = cut(method, rank=rank, heads="untied")
    factor_tables_(model, Statistics(), settings, optimizers=[optimizer])
    assert type(model.words) is kind
    assert model.head.weight is weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], dense)
    assert all(a is b for a, b in zip(model.words.factors, model.again.factors, strict=True))
    left = optimizer.state[model.words.left.weight]["exp_avg"]
    if method == "kronecker":
        expected = dense.view(30, 4, 2) @ model.words.block[0]
        torch.testing.assert_close(left, expected)
    else:
        torch.testing.assert_close(left, dense @ model.words.lift.weight)
        fresh = [model.words.attention.weight, model.words.feed_out.weight]
        assert all(p not in optimizer.state for p in fresh)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    optimizer.zero_grad()
    model(torch.randint(0, 30, (4, 5))).square().mean().backward()
    optimizer.step()
    with pytest.raises(LayerError, match=f"'words' is a {kind.__name__} already, and only low-r"):
        factor_tables_(model, Statistics(), settings)


def test_an_error_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    weight, state = model.words.weight, optimizer.state[model.words.weight]
    with pytest.raises(ObservationError, match="'words' was never read"):
        factor_tables_(model, Statistics(), EmbeddingSettings(rank=2, targets=["words"]))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr("lrcompress.embedding.factor.swap_parameters_", broken)
    with pytest.raises(RuntimeError, match="no more"):
        factor_tables_(model, Statistics(), cut("low_rank", rank=2), optimizers=[optimizer])
    assert model.words.weight is model.head.weight is model.again.weight is weight
    assert optimizer.state[weight] is state


def test_a_table_that_is_not_finite_is_named() -> None:
    model, _ = trained()
    model.words.weight.data[2, 2] = torch.inf
    with pytest.raises(NotFiniteError, match=r"^layer 'words': table holds 1 non-finite of 240"):
        factor_tables_(model, Statistics(), cut("low_rank", rank=3, head_share=0))


def test_a_solver_that_failed_at_first_is_told_in_the_record(
    fails_at_first: Callable[[str], list[Any]],
) -> None:
    calls = fails_at_first("eigh")
    model, _ = trained()
    record = factor_tables_(model, Statistics(), cut("low_rank", rank=3, head_share=0))
    assert calls
    assert "solved on the CPU, for the solver of its device failed" in record.layers[0].note
