"""Blocks are narrowed in a model: what it computes then, and what goes along."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrcompress.engine.narrow_blocks
from lrcompress.engine.compress import compress, factor_, preview
from lrcompress.engine.narrow_blocks import BlockSummary, put_pruned_
from lrcompress.engine.observation import observe
from lrcompress.engine.settings import Settings
from lrcompress.errors import LayerError, SettingError
from lrcompress.export.dense import merge_dense
from lrcompress.nn import LowRankLinear, PrunedLinear
from lrcompress.objective import COMPARABLE, metric_of
from lrcompress.report import Report
from lrcompress.solvers.narrowing import narrowings
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.feed_forward import Block, Blocks
from lrcompress.structure.plan import Plan

WIDTH, INNER = 8, 24
BLOCKS = Blocks(tuple(Block((f"blocks.{i}.up",), f"blocks.{i}.down") for i in range(2)))
GATED = Blocks(
    tuple(Block((f"blocks.{i}.gate", f"blocks.{i}.up"), f"blocks.{i}.down") for i in range(2))
)


class Part(nn.Module):
    def __init__(self, gated: bool, conv: bool, bias: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.gate = nn.Linear(WIDTH, INNER, bias=bias) if gated else None
        self.up = Conv1D(INNER, WIDTH) if conv else nn.Linear(WIDTH, INNER, bias=bias)
        self.down = Conv1D(WIDTH, INNER) if conv else nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        h = self.up(x)
        h = h.sigmoid() if self.gate is None else self.gate(x).sigmoid() * h
        return x + self.down(h)


class Net(nn.Module):
    def __init__(self, gated: bool = False, conv: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Part(gated, conv, bias) for _ in range(2)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def data(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(64, WIDTH, generator=made), torch.randint(3, (64,), generator=made))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def narrowed(model: nn.Module, keep: float = 0.6, **settings: Any) -> Any:
    given = {"align": 1, "narrow_blocks": True, **settings}
    return compress(model, data(), loss_of, keep=keep, **given)


def statistics_of(model: nn.Module, method: str = "kfac") -> Statistics:
    with observe(model, method=method) as recorder:
        for batch in data():
            with recorder.step():
                loss = loss_of(model, batch)
                recorder.commit(64)
                loss.backward()
    model.zero_grad()
    return recorder.statistics


# What it computes


@pytest.mark.parametrize("method", COMPARABLE)
@pytest.mark.parametrize(
    "kind", [{}, {"gated": True}, {"conv": True}, {"bias": False}, {"gated": True, "bias": False}]
)
def test_narrow_layers_take_the_place_of_dense_ones(kind: dict[str, bool], method: str) -> None:
    model = Net(**kind)
    dense = copy.deepcopy(model)
    record = narrowed(model, method=method)
    narrow = {x.name: x for x in record.layers if x.narrow}
    assert narrow, record.note
    assert "feed-forward blocks narrowed" in record.note
    assert record.keep <= 0.6
    for name, one in narrow.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PrunedLinear)
        k, n = one.narrow
        assert n == INNER
        assert k in layer.weight.shape
        assert layer.weight.numel() == one.after
        assert not one.dense
    for batch in data():
        model(batch[0])
    lost = sum((loss_of(model, b) - loss_of(dense, b)).item() for b in data()) / 6
    assert abs(lost) < 0.2
    x = data()[0][0]
    merged = merge_dense(copy.deepcopy(model))
    assert not len(Plan.of(merged))
    torch.testing.assert_close(merged(x), model(x))
    assert Report.from_dict(Report([record]).to_dict()).points[0].layers == record.layers
    assert len(record.layers) == (8 if kind.get("gated") else 6)


def test_what_is_predicted_is_what_the_definition_says() -> None:
    """With the metric's own moments: ``½ tr(G ΔW C ΔWᵀ)``, the bias taking up the mean."""
    model = Net()
    dense, statistics = copy.deepcopy(model), statistics_of(model)
    settings = Settings(keep=0.6, narrow_blocks=True, align=1, ranks={"*.mix": 8})
    record = factor_(model, statistics, settings, blocks=BLOCKS)
    found = {x.name: x for x in record.layers}
    for i in range(2):
        name = f"blocks.{i}.down"
        metric = metric_of("kfac", statistics, name, refit_bias=True, shrink=(0.0, 0.1))
        new, old = model.get_submodule(name), dense.get_submodule(name)
        if not isinstance(new, PrunedLinear):
            continue
        lost = (old.weight - new.to_dense().weight).detach().double()
        predicted = 0.5 * torch.trace(metric.output @ lost @ metric.input @ lost.mT)
        once = 1 - 3 * new.in_features / (6 * 64)  # the features fitted what is gone to the tokens
        assert found[name].predicted_loss == pytest.approx(float(predicted) / once**2, rel=1e-3)
        shift = (new.bias - old.bias).detach().double()
        torch.testing.assert_close(shift, lost @ metric.mean, rtol=1e-4, atol=1e-6)
        up = model.get_submodule(f"blocks.{i}.up")
        assert up.weight.equal(dense.get_submodule(f"blocks.{i}.up").weight[new.columns])
        assert up.rows.equal(new.columns)
    assert any(x.narrow for x in record.layers)


def test_dead_and_duplicate_features_go_first_and_cost_nothing() -> None:
    model = Net()
    with torch.no_grad():
        for part in model.blocks:
            part.up.weight[12:] = part.up.weight[:12]
            part.up.bias[12:] = part.up.bias[:12]
    dense = copy.deepcopy(model)
    record = narrowed(model, keep=0.7)
    assert all(x.narrow for x in record.layers if "mix" not in x.name)
    assert record.predicted_loss < 1e-6
    x = data()[0][0]
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-4)


def test_without_the_option_nothing_is_different() -> None:
    one, other = Net(), Net()
    record = compress(one, data(), loss_of, keep=0.5, align=1)
    factor_(other, observed_by_compress(other), Settings(keep=0.5, align=1), blocks=BLOCKS)
    assert all(x.narrow is None for x in record.layers)
    assert all(p.equal(q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def observed_by_compress(model: nn.Module) -> Statistics:
    held: list[Statistics] = []
    original = lrcompress.engine.compress.factor_

    def kept(model: nn.Module, statistics: Statistics, *args: Any, **more: Any) -> Any:
        held.append(statistics)
        return original(copy.deepcopy(model), statistics, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lrcompress.engine.compress, "factor_", kept)
        compress(model, data(), loss_of, keep=0.5, align=1)
    return held[0]


def test_a_second_point_narrows_further_and_leaves_their_layers_without_factors() -> None:
    model = Net(gated=True)
    first = {x.name: x.narrow for x in narrowed(model, keep=0.7).layers}
    assert any(first.values())
    record = narrowed(model, keep=0.35)
    for layer in record.layers:
        if first[layer.name]:
            assert layer.narrow[0] <= first[layer.name][0]
            assert layer.narrow[1] == INNER
            assert layer.stood == first[layer.name][0] * WIDTH
    assert record.keep <= 0.35
    model(data()[0][0])
    assert narrowed(model, keep=0.9).keep <= 0.9  # nothing grows


def test_what_is_expected_on_other_tokens_is_what_is_found_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For independent tokens of normal features; real text asks for more, as was measured."""
    monkeypatch.setattr("lrcompress.engine.narrow_blocks._ALIKE", 1.0)
    tokens, n, found, told, seen = 160, 40, 0.0, 0.0, 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        mix = torch.eye(n) + torch.randn(n, n) / 6
        weight, x = torch.randn(8, n), torch.randn(tokens, n) @ mix
        moment = x.mT @ x / tokens
        solved = narrowings(weight, None, moment)
        summary = BlockSummary(solved.losses, 1.0, "", tokens)
        one = solved.solved(weight, moment, 30)
        whole = torch.zeros_like(weight)
        whole[:, one.kept] = one.weight
        lost = (weight - whole) @ mix.mT  # of all tokens there could be
        found += float(lost.square().sum()) / 2
        told += summary.loss(30)
        seen += one.lost / 2
    assert told == pytest.approx(found, rel=0.15)
    assert seen < 0.75 * found
    nothing = BlockSummary(solved.losses, 1.0, "", 10)
    assert float(nothing.expected[30]) == pytest.approx(4 * float(solved.losses[30]))
    assert (nothing.expected.diff() <= 0).all()


# What goes along


@pytest.mark.parametrize("kind", [{}, {"gated": True}, {"conv": True}])
def test_optimizer_state_goes_with_its_entries(kind: dict[str, bool]) -> None:
    model = Net(**kind)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for batch in data(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    settings = Settings(keep=0.6, narrow_blocks=True, align=1)
    blocks = GATED if "gated" in kind else BLOCKS
    record = factor_(model, statistics_of(model), settings, blocks=blocks, optimizers=[optimizer])
    assert any(x.narrow for x in record.layers)
    for name in (x.name for x in record.layers if x.narrow):
        layer = model.get_submodule(name)
        for key in ("exp_avg", "exp_avg_sq"):
            was, now = before[f"{name}.weight"][key], optimizer.state[layer.weight][key]
            was = was.mT if layer.plain is Conv1D else was
            assert now.equal(was[layer.rows][:, layer.columns])
            held = optimizer.state[layer.bias][key]
            assert held.equal(before[f"{name}.bias"][key][layer.rows])
    group = optimizer.param_groups[0]
    assert dict(zip(group["param_names"], group["params"], strict=True)).keys() == {
        name for name, _ in model.named_parameters()
    }
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    loss_of(model, data()[0]).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "narrow", [{"keep": 0.5}, {"keep": 0.2, "narrow_blocks": "low_rank", "align": 1}]
)
def test_an_error_leaves_everything_as_it_was(
    narrow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    before, layers = copy.deepcopy(model.state_dict()), [*model.modules()]
    statistics = statistics_of(model)

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lrcompress.engine.solved_model.install_factors_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        factor_(
            model,
            statistics,
            Settings(**{"narrow_blocks": True, **narrow}),
            blocks=BLOCKS,
            optimizers=[optimizer],
        )
    assert [*model.modules()] == layers
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, model.parameters())]


def test_put_pruned_composes() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    dense = copy.deepcopy(model[0])
    put_pruned_(model, "0", [], rows=torch.tensor([1, 1, 0, 1, 0, 1]).bool())
    layer = put_pruned_(model, "0", [], rows=torch.tensor([0, 1, 1, 0]).bool())
    assert layer.rows.nonzero().flatten().tolist() == [1, 3]
    assert layer.weight.equal(dense.weight[[1, 3]])
    assert layer.bias.equal(dense.bias[[1, 3]])
    assert (layer.to_dense().weight[[0, 2, 4, 5]] == 0).all()


@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_pivoted_rows_and_narrow_blocks_share_one_budget(keep: float) -> None:
    record = narrowed(model := Net(), keep=keep, storage="pivoted", ranks={"*.0.mix": 3})
    assert record.keep == pytest.approx(keep, abs=0.03)
    assert any(x.narrow for x in record.layers)
    kinds = {layer.kind for layer in Plan.of(model)}
    assert kinds == {"narrow", "pivoted"}
    model(data()[0][0])


# What is refused, and said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "drone"}, "which method 'drone' does not know; use row_fisher or kfac or"),
        ({"method": "kronecker"}, "which method 'kronecker' does not know"),
        ({"allocation": "uniform"}, "which allocation='uniform' does not look at"),
        ({"keep_measured": True}, "keep_measured measures low-rank factors only"),
    ],
)
def test_settings_that_exclude_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings(keep=0.5, narrow_blocks=True, **settings)


def test_blocks_have_to_be_given() -> None:
    model = Net()
    with pytest.raises(SettingError, match="no step was looked at for feed-forward blocks"):
        factor_(model, statistics_of(model), Settings(keep=0.5, narrow_blocks=True))


def test_layers_that_lost_heads_are_refused_still() -> None:
    model = Net()
    mix = model.blocks[0].mix
    model.blocks[0].mix = PrunedLinear.of(mix, rows=torch.ones(WIDTH, dtype=torch.bool))
    with pytest.raises(LayerError, match=r"layer 'blocks.0.mix' has lost heads, which DSEE"):
        narrowed(model)
    with pytest.raises(LayerError, match=r"layer 'blocks.0.mix' has lost heads, which DSEE"):
        narrowed(model, narrow_blocks=False)


def test_blocks_that_stay_are_named_with_the_reason() -> None:
    model = Net()
    model.blocks[0].up = LowRankLinear(WIDTH, INNER, 3)
    nn.init.normal_(model.blocks[0].up.left.weight)
    record = narrowed(model, keep=0.5)
    notes = {x.name: x.note for x in record.layers}
    assert notes["blocks.0.down"] == (
        "its block is not narrowed: 'blocks.0.up' is factored already"
    )
    targeted = narrowed(Net(), keep=0.5, exclude=["*.up"])
    assert targeted.note == "no feed-forward block is narrowed"
    notes = {x.name: x.note for x in targeted.layers}
    assert "'blocks.0.up', which is before it, is not among" in notes["blocks.0.down"]


def test_a_preview_has_ranks_alone() -> None:
    records, _, _ = preview(Net(), Settings(keep=0.5, narrow_blocks=True))
    assert all(x.narrow is None for x in records)


def test_a_solver_that_failed_at_first_is_told_in_the_record(
    fails_at_first: Callable[[str], list[Any]],
) -> None:
    fails_at_first("eigh")
    few = [(data()[0][0][:10], data()[0][1][:10])]  # whose moments have low rank
    given = {"align": 1, "narrow_blocks": True, "keep": 0.4}
    record = compress(Net(), few, loss_of, **given)
    told = [layer for layer in record.layers if "solver of its device failed" in layer.note]
    assert [layer.name for layer in told] == ["blocks.0.down"]
    assert told[0].narrow
