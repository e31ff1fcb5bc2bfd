"""Pruning against a slow sort of single units, and what it promises of models and optimizers."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.engine.settings import Settings
from lrcompress.importance import Importance
from lrcompress.nn import LowRankLinear, LowRankSparseLinear
from lrcompress.pruning import LoSparseBudget, Pruner, Quota, split_
from lrcompress.report.record import LayerRecord
from lrcompress.schedules import Cubic
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view

EACH_SHARE: list[dict[str, Any]] = [
    {},
    {"low_rank_share": 0.5, "row_score": "group"},
    {"granularity": "entries"},
    {"low_rank_share": 0.5, "initial_rank": 0.5},
    {"low_rank_share": 0.5, "initial_rank": 0.4, "granularity": "entries"},
    {"low_rank_share": "auto", "initial_rank": 0.5},
    {"low_rank_share": 1},
    {"low_rank_share": 1, "initial_rank": 0.6},
]
each_share = pytest.mark.parametrize("given", EACH_SHARE, ids=str)
KEEP, START, STOP = 0.3, 2, 14
CUBIC = Cubic(START, STOP, 0.0)
Make = Callable[..., Any]
Unit = tuple[str, str, int]


def alive(pruner: Pruner) -> set[Unit]:
    """Every unit that has not been pruned: its layer, its part and its place there."""
    units = set()
    for name, layer in pruner.layers.items():
        ranks, rows = layer.kept[: layer.rank], layer.kept[layer.rank :]
        if pruner.shares.granularity == "entries":
            rows = pruner.masks.get(name, rows.repeat_interleave(layer.in_features))
        for part, kept in (("components", ranks), ("rows", rows)):
            units |= {(name, part, int(i)) for i in kept.nonzero()}
    return units


def cost_of(pruner: Pruner, unit: Unit) -> int:
    layer = pruner.layers[unit[0]]
    if unit[1] == "components":
        return layer.out_features + layer.in_features
    return 1 if pruner.shares.granularity == "entries" else layer.in_features


def spent(pruner: Pruner) -> int:
    return sum(cost_of(pruner, unit) for unit in alive(pruner))


def dense_of(pruner: Pruner) -> int:
    return sum(layer.out_features * layer.in_features for layer in pruner.layers.values())


def slow_scores(pruner: Pruner) -> dict[Unit, float]:
    """``|p·∂L/∂p|`` of this step, unit by unit, in loops over parameters."""
    scores: dict[Unit, float] = {}
    shares = pruner.shares
    for name, layer in pruner.layers.items():
        inner, left = layer.inner.weight, layer.left.weight
        assert inner.grad is not None
        assert left.grad is not None
        products = (inner.detach().double() * inner.grad.double()).tolist()
        of_left = (left.detach().double() * left.grad.double()).tolist()
        for k in range(layer.rank):
            total = abs(sum(row[k] for row in of_left))
            scores[name, "components", k] = total / (layer.out_features + layer.in_features)
        for i, row in enumerate(products[layer.rank :]):
            if shares.granularity == "entries":
                for j, value in enumerate(row):
                    scores[name, "rows", i * layer.in_features + j] = abs(value)
            elif shares.row_score == "group" or shares.competes:
                scores[name, "rows", i] = abs(sum(row)) / layer.in_features
            else:
                scores[name, "rows", i] = sum(map(abs, row)) / layer.in_features
    return scores


def slow_prune(
    pruner: Pruner, before: set[Unit], scores: Mapping[Unit, float], share: float
) -> set[Unit]:
    """What stays: of each layer its best component, then the best of all while they fit."""
    parts = {part for quota in pruner.quotas for part in quota.parts}
    stays = {unit for unit in before if unit[1] not in parts}
    spare = 0.0
    for quota in pruner.quotas:
        budget = quota.final + (quota.start - quota.final) * share + spare
        asking = [unit for unit in before if unit[1] in quota.parts]
        first = []
        if "components" in quota.parts:
            for name in pruner.layers:
                own = [u for u in asking if u[:2] == (name, "components")]
                first.append(max(own, key=lambda u: scores[u]))
        others = sorted(set(asking) - set(first), key=lambda u: -scores[u])
        paid = 0
        for count, unit in enumerate(first + others):
            if count >= len(first) and paid + cost_of(pruner, unit) > budget:
                break
            stays.add(unit)
            paid += cost_of(pruner, unit)
        spare = budget - paid
    return stays


def everything(bench: Any) -> tuple[Any, Any]:
    return bench.model.state_dict(), bench.optimizer.state_dict()["state"]


def train_and_prune(bench: Any, pruner: Pruner, steps: int = STOP + 3) -> None:
    """Train and prune as a callback would."""
    for step in range(steps):
        if step >= START and pruner.importance.steps == 0:
            pruner.prune_(CUBIC(step), [bench.optimizer])
        bench.train(1, pruner)
    pruner.prune_(0.0, [bench.optimizer])


# Which units stay


@each_share
@pytest.mark.parametrize(("window", "beta2"), [(1, 1.0), (3, 1.0), (2, 0.9)])
def test_what_stays_are_the_best_of_all_layers_by_their_average_scores(
    make: Make, given: dict[str, Any], window: int, beta2: float
) -> None:
    bench = make(torch.float64)
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given), Importance(0.85, beta2, window))
    open_: list[dict[Unit, float]] = []
    mean: dict[Unit, float] = {}
    spread: dict[Unit, float] = {}
    masks = 0
    for step in range(STOP + 3):
        if step >= START and pruner.importance.steps == 0:
            before = alive(pruner)
            pruner.prune_(CUBIC(step), [bench.optimizer])
            if mean:
                ranked = mean if beta2 == 1 else {u: mean[u] * spread[u] for u in mean}
                assert alive(pruner) == slow_prune(pruner, before, ranked, CUBIC(step))
                assert pruner.keep == spent(pruner) / dense_of(pruner)
                masks += len(alive(pruner)) < len(before)
        bench.backward()
        open_.append(slow_scores(pruner))
        pruner.observe()
        bench.optimizer.step()
        pruner.hold_([bench.optimizer])
        if len(open_) == window:
            for unit in open_[0]:
                seen = sum(scores[unit] for scores in open_) / window
                mean[unit] = 0.85 * mean.get(unit, 0.0) + 0.15 * seen
                gap = abs(seen - mean[unit])
                spread[unit] = beta2 * spread.get(unit, 0.0) + (1 - beta2) * gap
            open_ = []
    assert masks > 2


@each_share
def test_what_is_pruned_stays_pruned_and_pruning_twice_is_pruning_once(
    make: Make, given: dict[str, Any]
) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given))
    before, keeps = alive(pruner), []
    for step in range(STOP + 5):
        if step >= START and pruner.importance.steps == 0:
            pruner.prune_(CUBIC(step), [bench.optimizer])
            now = alive(pruner)
            assert now <= before
            state = copy.deepcopy(everything(bench))
            pruner.prune_(CUBIC(step), [bench.optimizer])
            assert alive(pruner) == now
            torch.testing.assert_close(everything(bench), state, rtol=0, atol=0)
            before = now
            keeps.append(pruner.keep)
        bench.train(1, pruner)
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[0] > 1.5 * keeps[-1]
    assert keeps[-1] <= KEEP


@pytest.mark.parametrize("granularity", ["rows", "entries"])
@pytest.mark.parametrize("revive", [False, True])
def test_only_with_revive_a_row_returns_when_it_matters_again(
    make: Make, granularity: str, revive: bool
) -> None:
    bench = make()
    shares = LoSparseBudget(keep=KEEP, revive=revive, granularity=granularity)
    pruner = bench.pruner(shares, Importance(0.0, 1.0, 1))
    bench.train(1, pruner)
    pruner.prune_(0.0, [bench.optimizer])
    before = alive(pruner)
    units = {name: len(score) for name, score in pruner.importance.scores().items()}
    width = 1 if granularity == "rows" else pruner.layers["blocks.0.up"].in_features
    layer = pruner.layers["blocks.0.up"]
    row = next(i for i, kept in enumerate(layer.kept[layer.rank :]) if not kept)
    scores = {name: torch.rand(size) for name, size in units.items()}
    place = layer.rank + row * width
    scores["blocks.0.up"][place : place + width] = 100.0
    pruner.importance.add(scores)
    pruner.prune_(0.0, [bench.optimizer])

    assert bool(layer.kept[layer.rank + row]) == revive
    assert not layer.rows[row].any()  # it comes back from zero
    assert spent(pruner) <= KEEP * bench.dense
    if not revive:
        assert alive(pruner) <= before
    weight = layer.rows[row].clone()
    bench.train(1, pruner)
    moved = bool((layer.rows[row] != weight).any())
    assert moved == revive


@pytest.mark.parametrize("given", [EACH_SHARE[5], EACH_SHARE[6], EACH_SHARE[3]], ids=str)
def test_of_each_layer_one_component_always_stays(make: Make, given: dict[str, Any]) -> None:
    """Also of a layer whose components all matter less than any other's."""
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given), Importance(0.0, 1.0, 1))
    layers = pruner.layers
    scores = {name: torch.rand(len(layer.kept)) + 1 for name, layer in layers.items()}
    poor = layers["blocks.1.gate"]
    scores["blocks.1.gate"][: poor.rank] = torch.linspace(1e-9, 2e-9, poor.rank)
    pruner.importance.add(scores)
    pruner.prune_(0.0, [bench.optimizer])
    assert [bool(kept) for kept in poor.kept[: poor.rank]] == [False] * (poor.rank - 1) + [True]
    assert all(layer.kept[: layer.rank].any() for layer in layers.values())
    assert spent(pruner) <= KEEP * bench.dense


@pytest.mark.parametrize("given", [{"low_rank_share": 0.01, "initial_rank": 0.5}], ids=str)
@pytest.mark.parametrize("keep", [0.0858, 0.1])
def test_components_that_have_to_stay_are_paid_by_rows(
    make: Make, given: dict[str, Any], keep: float
) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=keep, **given))
    train_and_prune(bench, pruner)
    assert all(layer.kept[: layer.rank].sum() == 1 for layer in pruner.layers.values())
    assert keep * bench.dense - 32 < spent(pruner) <= keep * bench.dense


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_single_entries_are_chosen_layer_by_layer(
    share: float, counting: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(20)))
    shares, settings = (
        LoSparseBudget(keep=0.3, granularity="entries"),
        Settings(method="svd", targets=["*"]),
    )
    _, quotas = split_(model, Statistics(), settings, shares)
    importance = Importance(0.0, 1.0, 1)
    pruner = Pruner(model, [f"{i}" for i in range(20)], quotas, shares, importance)
    sizes = {name: layer.rank + 10_000 for name, layer in pruner.layers.items()}
    scores = {name: (torch.rand(size) * 50).round() for name, size in sizes.items()}  # ties
    importance.add(scores)
    pruner.prune_(1.0)
    flat = torch.cat([scores[n][layer.rank :] for n, layer in pruner.layers.items()])
    with counting() as counted:
        pruner.prune_(share)
    kept = torch.cat(list(pruner.masks.values()))
    place = flat.argsort(descending=True, stable=True)[: int(quotas[0].at(share))]
    assert kept.equal(torch.zeros_like(kept).index_fill(0, place, True))
    # a byte for every entry, which is what is remembered, and a few tensors of one layer
    assert counted.peak < 20 * 10_000 + 10_000 * 4 * 3


@each_share
@pytest.mark.parametrize("revive", [False, True])
def test_a_mask_waits_as_often_for_many_layers_as_for_few_and_other_steps_never_do(
    given: dict[str, Any], revive: bool, counting: Callable[[], Any]
) -> None:
    waits = {}
    for num_layers in (3, 9):
        torch.manual_seed(0)
        layers = [nn.Linear(16, 16) for _ in range(num_layers)]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        shares = LoSparseBudget(keep=0.4, revive=revive, **given)
        settings = Settings(method="svd", targets=["*"])
        _, quotas = split_(model, Statistics(), settings, shares, optimizers=[optimizer])
        names = [f"{i}" for i in range(num_layers)]
        means = {name: torch.rand(16) for name in names}
        pruner = Pruner(model, names, quotas, shares, Importance(0.85, 0.9, 1), means)
        found = []
        for share in (0.8, 0.5, 0.2, 0.0):
            model(torch.randn(8, 16)).square().sum().backward()
            with counting() as step:
                pruner.observe()
                pruner.hold_([optimizer])
            assert step.waits == 0
            optimizer.step()
            with counting() as update:
                pruner.prune_(share, [optimizer])
                assert pruner.keep > 0
            found.append(update.waits)
        waits[num_layers] = found
    assert waits[3] == waits[9]
    # what is left are entries that are equal, of one layer
    assert max(waits[9]) <= (1 if given.get("granularity") == "entries" else 0)


@each_share
def test_a_step_has_few_kernels_a_layer(given: dict[str, Any], counting: Callable[[], Any]) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    shares, settings = LoSparseBudget(keep=0.4, **given), Settings(method="svd", targets=["*"])
    _, quotas = split_(model, Statistics(), settings, shares)
    pruner = Pruner(model, [f"{i}" for i in range(20)], quotas, shares, Importance())
    model(torch.randn(8, 16)).square().sum().backward()
    pruner.observe()
    with counting() as counted:
        pruner.observe(0.5)
    assert counted.kernels < 13 * 20, "it was 19 to 21 a layer"


def test_without_scores_or_quotas_nothing_is_pruned(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP), Importance(0.85, 1.0, 3))
    before = alive(pruner)
    bench.train(2, pruner)
    pruner.prune_(0.0, [bench.optimizer])
    assert not pruner.done
    assert alive(pruner) == before

    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=1))
    before = alive(pruner)
    bench.train(4, pruner)
    pruner.prune_(0.0, [bench.optimizer])
    assert pruner.done
    assert alive(pruner) == before


@each_share
def test_a_layer_the_loss_never_depends_on_goes_first(make: Make, given: dict[str, Any]) -> None:
    bench = make()
    bench.model.reads_all = False  # the gates
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given))
    train_and_prune(bench, pruner)
    gates = [pruner.layers[name] for name in bench.names if "gate" in name]
    assert len(gates) == 2
    for gate in gates:
        assert not gate.kept[gate.rank :].any()
        assert gate.kept[: gate.rank].any()
    assert spent(pruner) <= KEEP * bench.dense
    pruner.compact_(bench.model, [bench.optimizer])
    bench.train(1)


def test_gradients_are_scaled_as_asked(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP), Importance(0.0, 1.0, 1))
    bench.backward()
    pruner.observe()
    plain = {name: score.clone() for name, score in pruner.importance.scores().items()}
    pruner.observe(scale=0.25)
    for name, score in pruner.importance.scores().items():
        torch.testing.assert_close(score, 0.25 * plain[name])


def test_it_knows_which_optimizer_trains_its_layers(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP))
    assert pruner.trained_by(bench.optimizer)
    assert not pruner.trained_by(torch.optim.SGD(bench.model.head.parameters(), lr=0.1))


# Zeros


def pruned_parts(
    pruner: Pruner, optimizer: torch.optim.Optimizer, *, state: bool = True
) -> dict[str, Tensor]:
    """Every value that belongs to a pruned unit: parameters, and an optimizer's state of them."""
    parts = {}
    for name, layer in pruner.layers.items():
        gone = ~layer.kept[:, None].expand_as(layer.inner.weight)
        if name in pruner.masks:
            gone = gone.clone()
            gone[layer.rank :] |= ~pruner.masks[name].view(layer.num_rows, layer.in_features)
        of_left = ~layer.kept[: layer.rank].expand_as(layer.left.weight)
        for key, p, mask in (
            ("inner", layer.inner.weight, gone),
            ("left", layer.left.weight, of_left),
        ):
            parts[f"{name}.{key}"] = p.detach()[mask]
            for kind, value in optimizer.state[p].items() if state else ():
                if value.shape == p.shape:
                    parts[f"{name}.{key}.{kind}"] = value[mask]
    return parts


@each_share
@pytest.mark.parametrize("revive", [False, True])
def test_pruned_units_and_their_optimizer_state_are_zero_and_stay_zero(
    make: Make, given: dict[str, Any], revive: bool
) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, revive=revive, **given))
    for step in range(STOP + 2):
        if step >= START and pruner.importance.steps == 0:
            pruner.prune_(CUBIC(step), [bench.optimizer])
            if step < START + 2:
                continue
            zeros = pruned_parts(pruner, bench.optimizer)
            assert len(zeros) == 6 * 2 * 4  # the parameter and three tensors of amsgrad's state
            assert sum(len(value) for value in zeros.values()) > 0
            assert not any(value.any() for value in zeros.values())
        bench.train(1, pruner)
        assert not any(value.any() for value in pruned_parts(pruner, bench.optimizer).values())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("given", [EACH_SHARE[2], EACH_SHARE[5]], ids=str)
def test_no_optimizer_moves_what_was_pruned(
    make: Make, given: dict[str, Any], optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given))
    bench.optimizer = optimizer(bench.model.parameters())
    train_and_prune(bench, pruner)
    for _ in range(5):
        bench.train(1, pruner)
        zeros = pruned_parts(pruner, bench.optimizer)
        assert not any(value.any() for value in zeros.values())


def test_single_entries_are_put_back_to_zero_only_by_holding_them(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, granularity="entries"))
    train_and_prune(bench, pruner)
    bench.train(1)  # without holding
    assert any(v.any() for v in pruned_parts(pruner, bench.optimizer, state=False).values())
    pruner.hold_([bench.optimizer])
    assert not any(value.any() for value in pruned_parts(pruner, bench.optimizer).values())


# What pruning takes away


@each_share
@pytest.mark.parametrize("revive", [False, True])
def test_the_output_at_the_mean_input_does_not_change_where_a_bias_can_take_it_up(
    make: Make, given: dict[str, Any], revive: bool
) -> None:
    bench = make(torch.float64)
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, revive=revive, **given), method="drone")
    assert len(pruner.means) == 4
    pruned = 0
    for step in range(STOP + 2):
        if step >= START and pruner.importance.steps == 0:
            inputs = {}
            for name, mean in pruner.means.items():
                tokens = torch.randn(64, len(mean), dtype=torch.float64)
                inputs[name] = tokens - tokens.mean(0) + mean
            before = {n: pruner.layers[n](x).mean(0) for n, x in inputs.items()}
            weights = {name: pruner.layers[name].weight.clone() for name in inputs}
            pruner.prune_(CUBIC(step), [bench.optimizer])
            for name, x in inputs.items():
                pruned += not pruner.layers[name].weight.equal(weights[name])
                torch.testing.assert_close(pruner.layers[name](x).mean(0), before[name])
        bench.train(1, pruner)
    assert pruned > 4


@each_share
def test_without_means_biases_stay_as_they_are(make: Make, given: dict[str, Any]) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given))
    bench.train(4, pruner)
    biases = {n: layer.bias.clone() for n, layer in pruner.layers.items() if layer.bias is not None}
    pruner.prune_(0.0, [bench.optimizer])
    assert all(pruner.layers[name].bias.equal(bias) for name, bias in biases.items())


# Compaction


def real_size(bench: Any, name: str, record: LayerRecord) -> int:
    """Parameters that stand there now; those that are not zero, where single ones were pruned."""
    module = bench.model.get_submodule(name)
    parameters = view(module).parameters
    if record.entries is None:
        return sum(p.numel() for p in parameters)
    assert isinstance(module, LowRankSparseLinear)
    assert record.entries == int(module.rows.count_nonzero())
    return module.left.weight.numel() + module.right.numel() + int(module.rows.count_nonzero())


@each_share
@pytest.mark.parametrize(
    ("keep", "revive"), [(0.12, False), (0.3, False), (0.3, True), (0.5, False)]
)
def test_what_remains_is_keep_to_within_one_unit(
    make: Make, given: dict[str, Any], revive: bool, keep: float
) -> None:
    bench = make()
    dense = sum(view(bench.model.get_submodule(name)).weight.numel() for name in bench.names)
    pruner = bench.pruner(LoSparseBudget(keep=keep, revive=revive, **given))
    train_and_prune(bench, pruner)
    left = spent(pruner)
    largest = max(cost_of(pruner, (n, q.parts[0], 0)) for q in pruner.quotas for n in bench.names)
    assert keep * dense - largest < left <= keep * dense

    names = bench.names
    records = pruner.compact_(bench.model, [bench.optimizer])
    assert [record.name for record in records] == list(names)
    for record in records:
        assert record.after == real_size(bench, record.name, record)
        assert (record.rank is None) == (type(bench.model.get_submodule(record.name)) in PLAIN)
    assert sum(record.before for record in records) == dense
    # less only where factors and rows together were larger than the layer they came from
    assert sum(record.after for record in records) <= left
    if all(record.rank is not None for record in records):
        assert sum(record.after for record in records) == left


PLAIN = (nn.Linear, Conv1D)


@each_share
def test_the_compacted_model_gives_what_the_masked_one_did(
    make: Make, given: dict[str, Any]
) -> None:
    bench = make(torch.float64)
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, **given), method="drone")
    train_and_prune(bench, pruner)
    x = bench.batches[0][0].double()
    before = bench.model(x)
    pruner.compact_(bench.model, [bench.optimizer])
    torch.testing.assert_close(bench.model(x), before)


@each_share
def test_training_goes_on_as_if_nothing_had_been_compacted(
    make: Make, given: dict[str, Any]
) -> None:
    benches = [make(torch.float64), make(torch.float64)]
    for compact, bench in enumerate(benches):
        pruner = bench.pruner(LoSparseBudget(keep=0.25, **given))
        train_and_prune(bench, pruner)
        if compact:
            records = pruner.compact_(bench.model, [bench.optimizer])
            assert all(record.rank is not None for record in records)
            held = {id(p) for group in bench.optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in bench.model.parameters()}
        bench.train(4, pruner, observe=False)
    masked, compacted = (bench.model.eval()(bench.batches[0][0].double()) for bench in benches)
    torch.testing.assert_close(compacted, masked, rtol=1e-6, atol=1e-8)


def test_single_entries_are_still_held_after_compaction(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, granularity="entries"))
    train_and_prune(bench, pruner)
    records = {r.name: r for r in pruner.compact_(bench.model, [bench.optimizer])}
    assert set(pruner.masks) == set(pruner.layers) != set()
    for _ in range(3):
        bench.train(1, pruner, observe=False)
        for name, layer in pruner.layers.items():
            assert bench.model.get_submodule(name) is layer
            assert int(layer.rows.count_nonzero()) == records[name].entries
        assert not any(value.any() for value in pruned_parts(pruner, bench.optimizer).values())


def test_rows_need_no_holding_after_compaction(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP))
    train_and_prune(bench, pruner)
    pruner.compact_(bench.model, [bench.optimizer])
    assert pruner.masks == pruner.layers == {}


def test_a_layer_without_rows_becomes_low_rank_alone(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP, low_rank_share=1))
    train_and_prune(bench, pruner)
    records = pruner.compact_(bench.model, [bench.optimizer])
    for record in records:
        module = bench.model.get_submodule(record.name)
        if record.rank is not None:
            assert isinstance(module, LowRankLinear)
            assert (module.rank, record.rows, record.entries) == (record.rank, 0, None)
    assert any(record.rank is not None for record in records)


@pytest.mark.parametrize("given", EACH_SHARE[:-1], ids=str)
def test_what_is_larger_than_it_was_becomes_dense_again(make: Make, given: dict[str, Any]) -> None:
    bench = make(torch.float64)
    names, dense = bench.names, [type(bench.model.get_submodule(name)) for name in bench.names]
    sizes = {name: view(bench.model.get_submodule(name)).weight.numel() for name in names}
    pruner = bench.pruner(LoSparseBudget(keep=1, **given))
    bench.train(3, pruner)
    pruner.prune_(0.0, [bench.optimizer])
    x = bench.batches[0][0].double()
    before = bench.model(x)
    records = pruner.compact_(bench.model, [bench.optimizer])
    assert [type(bench.model.get_submodule(name)) for name in names] == dense
    assert all(r.rank is r.rows is r.entries is None for r in records)
    assert {record.name: record.after for record in records} == sizes
    torch.testing.assert_close(bench.model(x), before)
    bench.train(2)


# State


@each_share
@pytest.mark.parametrize(("revive", "at"), [(False, 1), (False, 6), (True, 8)])
def test_a_pruner_read_back_goes_on_as_if_nothing_had_happened(
    make: Make, given: dict[str, Any], revive: bool, at: int
) -> None:
    shares = LoSparseBudget(keep=KEEP, revive=revive, **given)
    whole, resumed = make(), make()
    pruners = {}
    for bench in (whole, resumed):
        pruner = bench.pruner(shares, Importance(0.85, 0.9, 3), "drone")
        for step in range(at + 1):
            if step >= START and pruner.importance.steps == 0:
                pruner.prune_(CUBIC(step), [bench.optimizer])
            bench.train(1, pruner)
        pruners[id(bench)] = pruner
    state = copy.deepcopy(pruners[id(resumed)].state_dict())
    again = Pruner.from_state(state, resumed.model, shares, Importance(0.85, 0.9, 3))
    assert again.quotas == pruners[id(whole)].quotas
    assert again.quotas == [Quota(q.parts, q.start, q.final) for q in again.quotas]
    train_and_prune(whole, pruners[id(whole)])
    train_and_prune(resumed, again)
    assert alive(again) == alive(pruners[id(whole)])
    for key, value in whole.model.state_dict().items():
        assert resumed.model.state_dict()[key].equal(value)


def test_the_state_is_of_plain_types_and_tensors(make: Make, tmp_path: Any) -> None:
    bench = make()
    shares = LoSparseBudget(keep=KEEP, granularity="entries", initial_rank=0.5)
    pruner = bench.pruner(shares, method="drone")
    train_and_prune(bench, pruner, 6)
    torch.save(pruner.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    again = Pruner.from_state(state, bench.model, shares, Importance())
    assert alive(again) == alive(pruner)
    assert all(again.means[name].equal(mean) for name, mean in pruner.means.items())


def test_the_keep_of_now_falls_from_all_to_what_was_asked(make: Make) -> None:
    bench = make()
    pruner = bench.pruner(LoSparseBudget(keep=KEEP))
    extra = sum(
        layer.rank * (layer.out_features + layer.in_features) for layer in pruner.layers.values()
    )
    assert pruner.keep == pytest.approx(1 + extra / bench.dense)
    train_and_prune(bench, pruner)
    assert math.isclose(pruner.keep, KEEP, abs_tol=32 / bench.dense)
