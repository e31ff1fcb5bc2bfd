"""Splitting loses nothing, carries everything, and gives every layer the rank it should have."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.engine.settings import Settings
from lrcompress.errors import LayerError, SettingError
from lrcompress.nn import LowRankSparseLinear
from lrcompress.objective import LOW_RANK, METHODS, metric_of
from lrcompress.pruning import LoSparseBudget, preview, split_
from lrcompress.pruning.ranks_and_rows import allocate_ranks_and_rows
from lrcompress.solvers.truncation import truncate
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view

COMPARABLE = [name for name, method in METHODS.items() if method.comparable]
EACH_SHARE: list[dict[str, Any]] = [
    {},
    {"low_rank_share": 0.6},
    {"low_rank_share": 1},
    {"initial_rank": 0.5},
    {"low_rank_share": "auto", "initial_rank": 1.0},
    {"granularity": "entries"},
]
each_method = pytest.mark.parametrize("method", LOW_RANK)
each_share = pytest.mark.parametrize("given", EACH_SHARE, ids=str)
Make = Callable[..., Any]


def layers_of(bench: Any) -> dict[str, LowRankSparseLinear]:
    layers = {name: bench.model.get_submodule(name) for name in bench.names}
    assert all(isinstance(layer, LowRankSparseLinear) for layer in layers.values())
    return layers


def ranks_of(bench: Any) -> dict[str, int]:
    return {name: layer.rank for name, layer in layers_of(bench).items()}


def cost_of(bench: Any) -> int:
    layers = layers_of(bench).values()
    return sum(layer.rank * (layer.out_features + layer.in_features) for layer in layers)


def weights_of(bench: Any) -> dict[str, Tensor]:
    layers = {name: bench.model.get_submodule(name) for name in bench.names}
    return {name: view(layer).weight.clone() for name, layer in layers.items()}


def assert_nothing_is_lost(bench: Any, split: Callable[[], object], tolerance: float) -> None:
    x = bench.batches[0][0].to(next(bench.model.parameters()))
    before, weights = bench.model(x), weights_of(bench)
    split()
    assert len(layers_of(bench)) == 6
    for name, weight in weights_of(bench).items():
        scale = float(weights[name].abs().max())
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(bench.model(x), before, rtol=10 * tolerance, atol=10 * tolerance)


@each_method
@each_share
def test_nothing_is_lost_but_by_rounding(make: Make, method: str, given: dict[str, Any]) -> None:
    bench = make()
    shares = LoSparseBudget(keep=0.3, **given)
    assert_nothing_is_lost(bench, lambda: bench.split(shares, method), 3e-6)


@pytest.mark.parametrize("method", COMPARABLE)
def test_nothing_is_lost_where_ranks_and_rows_share_one_budget(make: Make, method: str) -> None:
    bench = make(torch.float64)
    shares = LoSparseBudget(keep=0.3, low_rank_share="auto")
    assert_nothing_is_lost(bench, lambda: bench.split(shares, method), 1e-6)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("sizes", [(8, 30), (30, 8), (16, 16)])
@pytest.mark.parametrize("given", [{}, {"low_rank_share": 1}], ids=str)
def test_linear_and_conv1d_of_any_shape_are_split_exactly(
    kind: type[nn.Module], sizes: tuple[int, int], given: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = kind(*sizes)
    model = nn.Sequential(layer)
    nn.init.normal_(layer.bias)
    fan_in = view(layer).shape[1]
    x, bias = torch.randn(2, 3, fan_in), layer.bias
    before = model(x).detach()
    split_(model, Statistics(), Settings(method="svd"), LoSparseBudget(keep=0.9, **given))
    new = model[0]
    assert isinstance(new, LowRankSparseLinear)
    assert new.bias is bias
    assert new.num_rows == (0 if given else new.out_features)
    assert given == {} or new.rank == min(sizes)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert type(new.to_dense()) is kind


@each_method
def test_the_factors_are_the_best_of_their_rank_in_the_metric(make: Make, method: str) -> None:
    bench = make(torch.float64)
    statistics, weights = bench.statistics(), weights_of(bench)
    settings = Settings(method=method)
    split_(bench.model, statistics, settings, LoSparseBudget(keep=0.4, low_rank_share=0.5))
    for name, layer in layers_of(bench).items():
        refit = layer.bias is not None
        metric = metric_of(method, statistics, name, refit_bias=refit, shrink=settings.shrink)
        best = truncate(weights[name], metric.output, metric.input).factors(layer.rank)
        torch.testing.assert_close(layer.left.weight @ layer.right, best.left @ best.right)


# Optimizers


def state_of(bench: Any, parameter: Tensor) -> dict[str, Any]:
    state = bench.optimizer.state[parameter]
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("given", [{}, {"low_rank_share": 1}], ids=str)
def test_the_optimizer_goes_on_with_the_state_that_belongs_to_every_part(
    make: Make, given: dict[str, Any]
) -> None:
    bench = make()
    before, transposed = {}, {}
    for name in bench.names:
        old = view(bench.model.get_submodule(name))
        before[name], transposed[name] = state_of(bench, old.parameters[0]), old.transposed
    assert any(transposed.values())
    bench.split(LoSparseBudget(keep=0.3, **given))
    held = {id(p) for group in bench.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in bench.model.parameters()}
    assert all(id(p) in held for p in bench.optimizer.state)
    for name, layer in layers_of(bench).items():
        inner = bench.optimizer.state[layer.inner.weight]
        left = bench.optimizer.state[layer.left.weight]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            whole = before[name][key].mT if transposed[name] else before[name][key]
            if not given:
                assert inner[key][layer.rank :].equal(whole)
            a, b = layer.left.weight.detach(), layer.right.detach()
            a, b = (a, b) if key == "exp_avg" else (a.square(), b.square())
            of_right, of_left = a.mT @ whole, whole @ b.mT
            if key != "exp_avg":  # no less than the square of the average
                (one, two), step = bench.optimizer.defaults["betas"], float(inner["step"])
                scale = (1 - two**step) / (1 - one**step) ** 2
                of_right = of_right.maximum(scale * inner["exp_avg"][: layer.rank].square())
                of_left = of_left.maximum(scale * left["exp_avg"].square())
            torch.testing.assert_close(inner[key][: layer.rank], of_right)
            torch.testing.assert_close(left[key], of_left)
        assert inner["step"].equal(before[name]["step"])
    bench.train(2)


def test_the_first_step_after_splitting_moves_rows_as_it_would_have_moved_the_weight(
    make: Make,
) -> None:
    dense, split = make(), make()
    split.split(LoSparseBudget(keep=0.3))
    rows = {name: layer.rows.detach().clone() for name, layer in layers_of(split).items()}
    weights = weights_of(dense)
    for bench in (dense, split):
        for group in bench.optimizer.param_groups:
            group["weight_decay"] = 0.0  # decays S and not W
        bench.train(1)
    for name, layer in layers_of(split).items():
        moved = view(dense.model.get_submodule(name)).weight - weights[name]
        torch.testing.assert_close(layer.rows - rows[name], moved, rtol=1e-3, atol=1e-5)


# Ranks


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_uniform_ranks_are_the_same_share_of_every_layer_rounded_up(
    make: Make, keep: float, share: float
) -> None:
    bench = make()
    sizes = {name: weight.shape for name, weight in weights_of(bench).items()}
    bench.split(LoSparseBudget(keep=keep, low_rank_share=share))
    assert cost_of(bench) <= keep * bench.dense
    for name, (out, fan_in) in sizes.items():
        rank, wanted = ranks_of(bench)[name], keep * share * out * fan_in
        assert (rank - 1) * (out + fan_in) < wanted + 1e-6
        assert rank * (out + fan_in) >= wanted - 1e-6


@pytest.mark.parametrize("keep", [0.0858, 0.09, 0.11, 0.2])
@pytest.mark.parametrize("share", [0.01, 0.9, 0.999])
def test_ranks_that_rounding_up_would_make_too_dear_still_fit(
    make: Make, keep: float, share: float
) -> None:
    bench = make()
    _, quotas = bench.split(LoSparseBudget(keep=keep, low_rank_share=share))
    assert all(rank >= 1 for rank in ranks_of(bench).values())
    budget = math.floor(keep * bench.dense + 1e-6)
    assert cost_of(bench) + sum(quota.final for quota in quotas) == budget


@pytest.mark.parametrize("method", COMPARABLE)
def test_global_ranks_go_where_the_predicted_loss_is_within_the_same_budget(
    make: Make, method: str
) -> None:
    bench = make(torch.float64)
    weights, statistics = weights_of(bench), bench.statistics()
    curves = {}
    for name in bench.names:
        refit = bench.model.get_submodule(name).bias is not None
        metric = metric_of(method, statistics, name, refit_bias=refit, shrink=(0.0, 0.1))
        solved = truncate(weights[name], metric.output, metric.input)
        assert metric.loss_scale is not None
        curves[name] = solved.energies * metric.loss_scale
    bench.split(LoSparseBudget(keep=0.6, low_rank_share=0.8), method)
    ranks = ranks_of(bench)
    part, unit = 0.48 * bench.dense, 52
    assert part - unit < cost_of(bench) <= part
    assert len(set(ranks.values())) > 1
    # to move a rank between two layers of one size, which costs nothing, would lose more
    for one, other in itertools.permutations(ranks, 2):
        size, rank = sum(weights[other].shape), ranks[other]
        if sum(weights[one].shape) == size and rank < min(weights[other].shape) // 2 - 1:
            taken, given = curves[one][ranks[one] - 1], curves[other][rank]
            assert ranks[one] == 1 or taken >= given * (1 - 1e-9)


@pytest.mark.parametrize("start", range(1, 21))
def test_an_initial_rank_is_that_share_of_the_full_rank(make: Make, start: int) -> None:
    bench = make()
    bench.split(LoSparseBudget(keep=0.3, initial_rank=start / 20))
    assert set(ranks_of(bench).values()) == {start}


def test_a_share_of_a_rank_is_a_rank(make: Make) -> None:
    for given in ({"initial_rank": 1e-12}, {"low_rank_share": 1e-12}, {"initial_rank": 0.51 / 20}):
        bench = make()
        bench.split(LoSparseBudget(keep=0.3, **given))
        assert set(ranks_of(bench).values()) == {1}


@pytest.mark.parametrize("method", COMPARABLE)
@pytest.mark.parametrize("keep", [0.15, 0.4])
def test_auto_ranks_are_those_that_divide_the_predicted_losses(
    make: Make, method: str, keep: float
) -> None:
    bench = make(torch.float64)
    weights, statistics = weights_of(bench), bench.statistics()
    losses = {}
    for name, weight in weights.items():
        refit = bench.model.get_submodule(name).bias is not None
        metric = metric_of(method, statistics, name, refit_bias=refit, shrink=(0.0, 0.1))
        g, c = metric.output, metric.input
        assert g is not None
        assert c is not None
        assert metric.loss_scale is not None
        solved, rows = truncate(weight, g, c), []
        for rank in range(weight.numel() // sum(weight.shape) + 1):
            factors = solved.factors(rank) if rank else None
            rest = weight - factors.left @ factors.right if factors else weight
            heights = g if g.ndim == 1 else g.diagonal()
            rows.append(0.5 * metric.loss_scale * heights * (rest @ c * rest).sum(1))
        losses[name] = torch.stack(rows)
    units = {name: sum(weight.shape) for name, weight in weights.items()}
    budget = math.floor(keep * sum(w.numel() for w in weights.values()))

    _, quotas = bench.split(LoSparseBudget(keep=keep, low_rank_share="auto"), method)
    assert ranks_of(bench) == allocate_ranks_and_rows(losses, units, budget)
    assert [quota.final for quota in quotas] == [budget - cost_of(bench)]


# Quotas


@each_share
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.8, 0.99])
def test_quotas_start_with_what_there_is_and_add_up_to_keep(
    make: Make, given: dict[str, Any], keep: float
) -> None:
    bench = make()
    shares = LoSparseBudget(keep=keep, **given)
    _, quotas = bench.split(shares)
    budget = math.floor(keep * bench.dense + 1e-6)
    pruned = [part for quota in quotas for part in quota.parts]
    fixed = 0 if "components" in pruned else cost_of(bench)
    assert fixed + sum(quota.final for quota in quotas) == budget
    held = cost_of(bench) + (bench.dense if shares.sparse else 0)
    assert fixed + sum(quota.start for quota in quotas) == held
    assert ("rows" in pruned) == shares.sparse
    assert ("components" in pruned) == (shares.start_rank is not None)
    assert (len(quotas[0].parts) == 2) == shares.competes
    assert all(0 <= quota.final <= quota.start for quota in quotas)


@each_share
def test_at_keep_one_there_is_nothing_to_prune(make: Make, given: dict[str, Any]) -> None:
    assert make().split(LoSparseBudget(keep=1, **given))[1] == []


@pytest.mark.parametrize(
    ("method", "settings", "given"),
    [
        ("svd", {}, False),
        ("fwsvd", {}, False),
        ("asvd", {}, False),
        ("drone", {}, True),
        ("kfac", {}, True),
        ("weighted_kfac", {}, True),
        ("drone", {"refit_bias": False}, False),
    ],
)
def test_means_are_those_of_the_inputs_of_layers_with_a_bias(
    make: Make, method: str, settings: dict[str, Any], given: bool
) -> None:
    bench = make()
    seen: list[Tensor] = []
    up = bench.model.get_submodule("blocks.1.up")
    handle = up.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for batch in bench.batches:
        bench.loss(batch)
    handle.remove()
    means, _ = bench.split(LoSparseBudget(keep=0.3), method, **settings)
    with_bias = {name for name in bench.names if "gate" not in name}
    assert set(means) == (with_bias if given else set())
    if means and method != "weighted_kfac":
        torch.testing.assert_close(means["blocks.1.up"].float(), torch.cat(seen).mean(0))


# Errors, which leave everything as it was


@pytest.fixture
def untouched(make: Make) -> Any:
    bench = make()
    modules = list(bench.model.modules())
    state = copy.deepcopy(everything(bench))
    yield bench
    assert list(bench.model.modules()) == modules
    torch.testing.assert_close(everything(bench), state, rtol=0, atol=0)


def everything(bench: Any) -> tuple[Any, Any]:
    return bench.model.state_dict(), bench.optimizer.state_dict()["state"]


@each_share
def test_a_keep_below_one_rank_a_layer_says_which_could_be_met(
    untouched: Any, given: dict[str, Any]
) -> None:
    message = (
        "^keep=0.05 leaves 168 of 3,360 parameters, but one rank and no row in each of 6 layers "
        "take 288; the least keep is 0.0858$"
    )
    with pytest.raises(SettingError, match=message):
        untouched.split(LoSparseBudget(keep=0.05, **given))


def test_the_least_keep_that_is_named_can_be_met(make: Make) -> None:
    for given in EACH_SHARE:
        bench = make()
        bench.split(LoSparseBudget(keep=0.0858, **given))
        layers = [bench.model.get_submodule(name) for name in bench.names]
        assert all(isinstance(layer, LowRankSparseLinear) for layer in layers)


@pytest.mark.parametrize("method", sorted(set(LOW_RANK) - set(COMPARABLE)))
def test_auto_ranks_need_a_method_that_predicts_the_loss(untouched: Any, method: str) -> None:
    message = (
        "^low_rank_share='auto' compares predicted losses of ranks and rows, which "
        f"method {method!r} does not know; use one of {', '.join(COMPARABLE)}, "
        "or give initial_rank=$"
    )
    with pytest.raises(SettingError, match=message):
        untouched.split(LoSparseBudget(keep=0.3, low_rank_share="auto"), method)


@pytest.mark.parametrize("given", EACH_SHARE[:3], ids=str)
def test_a_layer_that_is_factored_already_is_refused_by_name(
    make: Make, given: dict[str, Any]
) -> None:
    bench = make()
    bench.split(LoSparseBudget(keep=0.3), targets=["blocks.1.down"])
    layers = list(bench.model.modules())
    message = (
        "^layer 'blocks.1.down' is factored already; LoSparse starts from dense layers: leave it "
        "out with exclude=, or use one of Factorize and LoSparse$"
    )
    with pytest.raises(LayerError, match=message):
        bench.split(LoSparseBudget(keep=0.3, **given))
    assert list(bench.model.modules()) == layers


# Before anything is done


@each_share
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_an_outlook_is_about_as_large_as_keep_says(
    make: Make, given: dict[str, Any], keep: float
) -> None:
    bench = make()
    before = copy.deepcopy(bench.model.state_dict())
    shares = LoSparseBudget(keep=keep, **given)
    records, selection, nbytes = preview(bench.model, Settings(method="kfac"), shares)
    assert [record.name for record in records] == list(selection.names) == list(bench.names)
    for record in records:
        assert record.rank is not None
        unit = record.out_features + record.in_features
        assert record.rank >= 1
        assert abs(record.after - keep * record.before) <= unit
    assert nbytes > 0
    assert all(value.equal(before[key]) for key, value in bench.model.state_dict().items())
