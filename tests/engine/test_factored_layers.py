"""Factors in the storage asked for: the same matrices, and optimizer state by the chain rule."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.embedding import EmbeddingSettings, factor_tables_
from lrcompress.engine.compress import compress, factor_, preview
from lrcompress.engine.factored_layers import store_pivoted_
from lrcompress.engine.settings import Settings
from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.surgery import check_kinds

WIDE, NARROW = 14, 10


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW))


def data(count: int = 3) -> list[Tensor]:
    return [torch.randn(32, NARROW) for _ in range(count)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.roll(1, 1)).square().mean()


def squeezed(model: nn.Module, batches: list[Tensor], **settings: Any) -> Any:
    return compress(model, batches, loss_of, **({"align": 1} | settings))


@pytest.mark.parametrize("method", ["svd", "drone", "kfac"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_pivoted_rows_are_the_same_matrices(method: str, rank: int) -> None:
    model, batches = net(), data()
    rows = copy.deepcopy(model)
    ranks = {"*": rank}
    record = squeezed(rows, batches, method=method, ranks=ranks, storage="pivoted")
    assert [x.stored for x in record.layers] == [rank * (WIDE + NARROW - rank)] * 2
    assert record.model_after == sum(p.numel() for p in rows.parameters())
    assert "pivoted rows" in record.note
    assert all(isinstance(rows[i], PivotedLinear) for i in (0, 2))
    if rank * (WIDE + NARROW) < WIDE * NARROW:
        squeezed(model, batches, method=method, ranks=ranks)
        for i in (0, 2):
            torch.testing.assert_close(rows[i].weight[:], model[i].weight[:])
            torch.testing.assert_close(rows[i].bias, model[i].bias)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("keep", [0.4, 0.9, 0.97])
def test_a_keep_is_met_and_less_is_lost(allocation: str, keep: float) -> None:
    losses = {}
    batches, model = data(), net()
    for storage in ("balanced", "pivoted"):
        record = squeezed(
            copy.deepcopy(model), batches, keep=keep, allocation=allocation, storage=storage
        )
        losses[storage] = record.predicted_loss
        assert record.keep <= keep
    assert losses["pivoted"] < losses["balanced"]
    assert keep - record.keep < 0.1


def test_a_preview_counts_rows() -> None:
    records, _, _ = preview(net(), Settings(keep=0.9, align=1, storage="pivoted"))
    assert all(x.rank and x.stored == x.rank * (WIDE + NARROW - x.rank) for x in records)


def gathered(model: nn.Module, name: str, batches: list[Tensor], optimizer: Any) -> Tensor:
    """The weight's momentum after steps that change next to nothing."""
    moment = torch.zeros(model.get_submodule(name).weight.shape)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        grad = model.get_submodule(name).weight.grad
        assert grad is not None
        moment = 0.9 * moment + grad
    return moment


@pytest.mark.parametrize("first", ["balanced", "pivoted"])
def test_first_moments_follow_exactly_the_first_time_and_the_second(first: str) -> None:
    model, batches, name = net(), data(), "0"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    moment = gathered(model, name, batches, optimizer)
    for storage, rank in ((first, 5), ("pivoted", 3)):
        settings = Settings(
            method="svd", ranks={"*": rank}, targets=[name], storage=storage, refit_bias=False
        )
        factor_(model, Statistics(), settings, optimizers=[optimizer])
        layer = model.get_submodule(name)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in layer.factors} <= set(map(id, held))
        if isinstance(layer, PivotedLinear):
            others = layer.order.argsort()[rank:]
            expected = [layer.left.mT @ moment, (moment @ layer.right.mT)[others]]
            for p, value in zip(layer.factors, expected, strict=True):
                found = optimizer.state[p]["momentum_buffer"]
                torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranks", [(6, 2), (10, 4)])
def test_second_moments_are_no_less_than_the_squares_of_first_ones(ranks: tuple[int, int]) -> None:
    model, batches = net(), data(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for rank in ranks:
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        settings = Settings(
            method="svd", ranks={"*": min(rank, 9)}, targets=["*"], storage="pivoted"
        )
        factor_(model, Statistics(), settings, optimizers=[optimizer])
        for i in (0, 2):
            for p in model[i].factors:
                state = optimizer.state[p]
                step = float(state["step"])
                mean = state["exp_avg"] / (1 - 0.9**step)
                square = state["exp_avg_sq"] / (1 - 0.99**step)
                assert (square >= mean.square() * (1 - 1e-5)).all()
    optimizer.step()


def test_groups_name_the_new_parameters() -> None:
    model = net()
    named = {"params": list(model.parameters()), "param_names": []}
    named["param_names"] = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD([named], lr=0.1)
    for storage, rank in (("pivoted", 8), ("pivoted", 4)):
        settings = Settings(method="svd", ranks={"*": rank}, targets=["*"], storage=storage)
        factor_(model, Statistics(), settings, optimizers=[optimizer])
        (group,) = optimizer.param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_rows_that_are_factored_again_stay_rows_and_never_grow() -> None:
    model, batches = net(), data()
    squeezed(model, batches, ranks={"*": 8}, storage="pivoted")
    before = sum(p.numel() for p in model.parameters())
    record = squeezed(model, batches, keep=1.0)
    assert [x.rank for x in record.layers] == [8, 8]
    assert sum(p.numel() for p in model.parameters()) == before
    record = squeezed(model, batches, keep=0.4)
    assert all(isinstance(model[i], PivotedLinear) for i in (0, 2))
    assert record.keep <= 0.4


def test_balanced_factors_may_become_rows() -> None:
    model, batches = net(), data()
    squeezed(model, batches, ranks={"*": 4})
    assert isinstance(model[0], LowRankLinear)
    weight = model[0].weight[:].clone()
    squeezed(model, batches, method="svd", ranks={"*": 4}, storage="pivoted")
    assert isinstance(model[0], PivotedLinear)
    torch.testing.assert_close(model[0].weight[:], weight, rtol=1e-4, atol=1e-5)


def test_what_starts_from_dense_layers_refuses_rows_by_name() -> None:
    model = nn.Sequential(PivotedLinear(6, 6, 2))
    check_kinds(model, ["0"])
    with pytest.raises(LayerError, match="layer '0' is low rank already, in pivoted rows; this"):
        check_kinds(model, ["0"], dense=True)


def test_layers_are_stored_as_rows_with_the_state_of_their_factors() -> None:
    """The same products; moments as the chain rule has them; twice is once; others stay."""
    model, batches = net().append(nn.Linear(NARROW, 2)), data()
    squeezed(model, batches, method="svd", ranks={"0": 4, "2": 3}, targets=["0", "2"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model[:3], batches[0]).backward()
    optimizer.step()
    (old, last), weight = (model[0], model[3].weight), model[0].weight[:].detach()
    of_left, of_right = (
        optimizer.state[p.weight]["momentum_buffer"] for p in (old.left, old.right)
    )
    before = sum(p.numel() for p in model.parameters())

    assert store_pivoted_(model, optimizers=[optimizer]) == ["0", "2"]
    assert store_pivoted_(model, optimizers=[optimizer]) == []
    assert model[3].weight is last
    new = model[0]
    torch.testing.assert_close(new.weight[:], weight)
    assert sum(p.numel() for p in model.parameters()) == before - 4**2 - 3**2
    # G rightᵀ and leftᵀ G of any G that has the momentum of the factors, solved for and applied
    mix = torch.linalg.lstsq(old.left.weight.double(), new.left.double()).solution
    expected = mix.mT @ of_right.double()
    stored = optimizer.state[new.right]["momentum_buffer"]
    torch.testing.assert_close(stored.double(), expected, rtol=1e-4, atol=1e-6)
    turn = torch.linalg.lstsq(old.right.weight.mT.double(), new.right.mT.double()).solution
    rows = (of_left.double() @ turn)[new.order.argsort()[4:]]
    stored = optimizer.state[new.rest]["momentum_buffer"]
    torch.testing.assert_close(stored.double(), rows, rtol=1e-4, atol=1e-6)


def test_factors_that_an_embedding_shares_stay_as_they_are() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    table = EmbeddingSettings(method="low_rank", targets=["embed"], weighting="none", rank=4)
    factor_tables_(model, Statistics({}), table)
    count = sum(p.numel() for p in model.parameters())
    assert isinstance(model["head"], LowRankLinear)
    assert store_pivoted_(model) == []
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_that_was_replaced_is_as_it_was(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    weights = [model[i].weight for i in (0, 2)]
    before = [weight.detach().clone() for weight in weights]
    squeezed(model, [x.to(dtype) for x in data()], keep=0.5)
    assert all(map(torch.equal, weights, before))
