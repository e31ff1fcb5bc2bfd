"""Low rank on top of narrowed blocks: what is predicted, what is put in place, what goes along."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.budget import cost
from lrcompress.engine.compress import factor_
from lrcompress.engine.narrow_low_rank import tried_widths
from lrcompress.engine.settings import LOW_RANK, Settings
from lrcompress.engine.solved_model import SolvedModel, solve_model
from lrcompress.errors import LayerError, SettingError
from lrcompress.export.dense import merge_dense
from lrcompress.nn import (
    NarrowLowRank,
    NarrowLowRankLinear,
    NarrowPivotedLinear,
    PrunedLinear,
)
from lrcompress.objective import metric_of
from lrcompress.report import Report
from lrcompress.statistics.views import view
from lrcompress.structure.plan import Plan

from .test_narrow_blocks import BLOCKS, GATED, INNER, Net, data, loss_of, narrowed, statistics_of

KINDS: list[dict[str, bool]] = [{}, {"gated": True}, {"conv": True}, {"bias": False}]


def settings(**given: Any) -> Settings:
    return Settings(**{"keep": 0.2, "align": 1, "narrow_blocks": LOW_RANK, **given})


def solved(model: nn.Module, **given: Any) -> SolvedModel:
    blocks = GATED if model.get_submodule("blocks.0").gate is not None else BLOCKS
    return solve_model(model, statistics_of(model), settings(**given), blocks=blocks)


def low_rank(model: nn.Module) -> dict[str, NarrowLowRank]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NarrowLowRank)}


# What is predicted


@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_predicted_losses_are_those_of_the_change_as_a_whole(
    kind: dict[str, bool], storage: str
) -> None:
    """``½ tr(G ΔW C ΔWᵀ)`` of the layer as it ends against the dense one, in the metric of all.

    Of what reads the features the two errors add up: that of the factors is made of the features
    that stay, and what these do not tell of the others is orthogonal to them.
    """
    model = Net(**kind)
    if "conv" in kind:  # starts so small that its features are alike, to rounding
        for part in model.blocks:
            nn.init.normal_(part.up.weight, std=0.3)
    dense, statistics = copy.deepcopy(model), statistics_of(model)
    one = solve_model(
        model, statistics, settings(storage=storage, shrink=(0.0, 0.0)), blocks=blocks(kind)
    )
    sizes = one.choose()
    told = one.predicted_loss(sizes)
    record = one.install_(sizes)
    layers = low_rank(model)
    assert layers
    assert told == pytest.approx(record.predicted_loss, rel=1e-5)
    found = {x.name: x for x in record.layers}
    for name, layer in layers.items():
        given = {"refit_bias": "bias" not in kind, "shrink": (0.0, 0.0)}
        metric = metric_of("kfac", statistics, name, **given)
        new, old = layer.to_dense(), dense.get_submodule(name)
        lost = (view(old).weight - view(new).weight).double()
        width = found[name].narrow[0]
        once = 1 - 3 * width / (6 * 64)
        if name.endswith("down"):
            narrow = one.narrowing.measured[name]
            predicted = quadratic(metric.output, lost, metric.input)
            expected = predicted + 0.5 * float(narrow.losses[width]) * (once**-2 - 1)
            total = quadratic(metric.output, view(old).weight.double(), metric.input)
            assert found[name].error == pytest.approx((predicted / total) ** 0.5, rel=1e-3)
        else:
            assert lost[~layer.rows].equal(view(old).weight[~layer.rows].double())
            rows = metric.output[layer.rows][:, layer.rows]
            expected = quadratic(rows, lost[layer.rows], metric.input)
        assert found[name].predicted_loss == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert found[name].after == sum(p.numel() for p in layer.factors)
    for batch in data():
        model(batch[0])


def blocks(kind: dict[str, bool]) -> Any:
    return GATED if "gated" in kind else BLOCKS


def quadratic(output: Tensor, lost: Tensor, input: Tensor) -> float:
    return 0.5 * float(torch.trace(output @ lost @ input @ lost.mT))


def test_the_biases_take_up_the_mean_of_what_is_lost() -> None:
    model = Net()
    dense, statistics = copy.deepcopy(model), statistics_of(model)
    factor_(model, statistics, settings(), blocks=BLOCKS)
    for name, layer in low_rank(model).items():
        metric = metric_of("kfac", statistics, name, refit_bias=True, shrink=(0.0, 0.1))
        old, new = dense.get_submodule(name), layer.to_dense()
        lost = (old.weight - new.weight).double()[layer.rows]
        shift = (new.bias - old.bias).double()[layer.rows]
        torch.testing.assert_close(shift, lost @ metric.mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keep", [0.2, 0.35, 0.5, 0.8])
def test_never_predicts_more_loss_than_narrowing_alone(keep: float) -> None:
    for kind in KINDS:
        losses = []
        for option in (True, LOW_RANK):
            one = solved(Net(**kind), keep=keep, narrow_blocks=option)
            sizes = one.choose()
            assert one.kept(sizes) <= keep
            losses.append(one.predicted_loss(sizes))
        assert losses[1] <= losses[0] * (1 + 1e-9)


def test_without_it_narrowing_is_as_it_was() -> None:
    plain, other = Net(), Net()
    narrowed(plain, keep=0.5)
    record = narrowed(other, keep=0.5, narrow_blocks=LOW_RANK, keep_range=(0.5, 0.5))
    assert not low_rank(plain)
    assert record.keep <= 0.5


def test_widths_are_tried_at_even_distances() -> None:
    assert tried_widths(8, 1, narrow=False) == [1, 2, 3, 4, 5, 6, 7]
    assert tried_widths(4, 8, narrow=False) == []
    assert tried_widths(4, 8, narrow=True) == [4]


# What is put in place


@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_are_low_rank_and_narrow_and_can_be_stored(
    kind: dict[str, bool], storage: str
) -> None:
    model = Net(**kind)
    record = narrowed(model, keep=0.2, narrow_blocks=LOW_RANK, storage=storage)
    layers, x = low_rank(model), data()[0][0]
    made = NarrowPivotedLinear if storage == "pivoted" else NarrowLowRankLinear
    assert layers
    assert all(isinstance(layer, made) for layer in layers.values())
    assert "of them with low rank on top" in record.note
    assert record.keep <= 0.2
    stored = sum(layer.after for layer in record.layers)
    now = [model.get_submodule(layer.name) for layer in record.layers]
    held = sum(sum(p.numel() for p in getattr(m, "factors", (view(m).weight,))) for m in now)
    assert stored == held
    fresh = Net(**kind)
    Plan.matching(fresh, model.state_dict()).apply_(fresh).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert Plan.of(fresh) == Plan.from_dict(Plan.of(model).to_dict())
    merged = merge_dense(copy.deepcopy(model))
    assert type(merged.get_submodule("blocks.0.up")) is (Conv1D if "conv" in kind else nn.Linear)
    torch.testing.assert_close(merged(x), model(x))
    assert Report.from_dict(Report([record]).to_dict()).points[0].layers == record.layers


@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
def test_what_is_tried_leaves_no_trace_and_is_what_is_installed(storage: str) -> None:
    model = Net(gated=True)
    one = solved(model, storage=storage)
    before, x = copy.deepcopy(model.state_dict()), data()[0][0]
    sizes = one.choose(0.25)
    kept = one.kept(sizes)
    with one.on_trial(sizes):
        assert low_rank(model)
        tried = model(x)
    assert model.state_dict().keys() == before.keys()
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    record = one.install_(sizes)
    assert torch.equal(model(x), tried)
    assert record.keep == pytest.approx(kept)


# What goes along


@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_first_moments_are_those_of_the_factors_of_what_is_left(
    kind: dict[str, bool], storage: str
) -> None:
    model = Net(**kind)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for batch in data(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    given = {"blocks": blocks(kind), "optimizers": [optimizer]}
    factor_(model, statistics_of(model), settings(storage=storage), **given)
    assert low_rank(model)
    for name, layer in low_rank(model).items():
        was = before[f"{name}.weight"]["exp_avg"]
        was = (was.mT if layer.plain is Conv1D else was)[layer.rows][:, layer.columns]
        left = layer.left if storage == "pivoted" else layer.left.weight
        now = optimizer.state[layer.factors[0]]["exp_avg"]
        torch.testing.assert_close(now, left.detach().mT @ was, rtol=1e-4, atol=1e-7)
    group = optimizer.param_groups[0]
    assert dict(zip(group["param_names"], group["params"], strict=True)).keys() == {
        name for name, _ in model.named_parameters()
    }
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    loss_of(model, data()[0]).backward()
    optimizer.step()


@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
@pytest.mark.parametrize("gated", [False, True])
def test_further_points_go_on_from_whatever_is_there(gated: bool, storage: str) -> None:
    model, last = Net(gated=gated), 1.0
    dense = sum(x.before for x in narrowed(copy.deepcopy(model)).layers)
    for keep in (0.6, 0.45, 0.3, 0.2):
        was = {n: m.sizes for n, m in low_rank(model).items()}
        record = narrowed(model, keep=keep, narrow_blocks=LOW_RANK, storage=storage)
        assert record.keep <= keep
        assert sum(x.after for x in record.layers) / dense == pytest.approx(record.keep)
        assert record.keep <= last + 1e-9
        last = record.keep
        for layer in record.layers:
            now = model.get_submodule(layer.name)
            assert (layer.out_features, layer.in_features) == shape_of(now)
            if layer.name in was:
                assert now.sizes["rank"] <= was[layer.name]["rank"]
                assert layer.narrow in ((now.sizes["rows"], INNER), (now.sizes["columns"], INNER))
        model(data()[0][0])
    assert low_rank(model)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    sizes = getattr(layer, "sizes", None)
    return (sizes["out"], sizes["in"]) if sizes else view(layer).shape


def test_layers_of_which_others_have_low_rank_can_still_be_factored() -> None:
    model = Net()
    narrowed(model, keep=0.5)
    up = model.blocks[0].up
    assert isinstance(up, PrunedLinear)
    down = NarrowLowRankLinear.narrow_as(model.blocks[0].down, 3)
    for factor in down.factors:
        nn.init.normal_(factor, std=0.3)
    model.blocks[0].down = down
    with pytest.raises(LayerError, match=r"'blocks.0.up' has lost heads, .* or features"):
        narrowed(copy.deepcopy(model), keep=0.2)
    record = narrowed(model, keep=0.2, narrow_blocks=LOW_RANK)
    assert isinstance(model.blocks[0].up, NarrowLowRank)
    assert model.blocks[0].down.rank <= 3
    assert record.keep <= 0.2
    model(data()[0][0])


def test_a_refit_leaves_such_layers_alone_and_says_so() -> None:
    model = Net(gated=True)
    record = narrowed(model, keep=0.25, narrow_blocks=LOW_RANK, refit=0.5)
    both = low_rank(model)
    assert both
    notes = {x.name: x.note for x in record.layers}
    assert all("not refitted: it is of low rank in a narrowed block" in notes[x] for x in both)
    narrowed(model, keep=0.2, narrow_blocks=LOW_RANK, refit=0.5)
    model(data()[0][0])


def test_what_it_may_be_is_said() -> None:
    with pytest.raises(SettingError, match="narrow_blocks must be True, False or 'low_rank', got"):
        Settings(keep=0.5, narrow_blocks="ranks")
    one = solved(Net())
    sizes = one.choose()
    inner = one.narrowing.sized(sizes.widths, sizes.choice.ranks, (0.0, 1.0))
    spent = sum(cost(*x) for x in inner)
    assert 0 < spent < sum(x.before for x, _ in inner)
