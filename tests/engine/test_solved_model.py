"""A model that is solved once: sizes are tried without a trace, and installed as tried."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.compress import compress, factor_
from lrcompress.engine.observation import observe_batches
from lrcompress.engine.settings import Settings
from lrcompress.engine.solved_model import solve_model
from lrcompress.errors import SettingError
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import Statistics

BATCHES = [torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24), nn.Linear(24, 24))


def seen(model: nn.Module, settings: Settings) -> tuple[Statistics, Any]:
    kinds = METHODS[settings.method].kinds
    recorder = Recorder(model, settings.select(model).names, kinds)
    blocks = None
    if kinds:
        find = settings.narrow_blocks
        blocks = observe_batches(recorder, model, BATCHES, loss, mask=None, find_blocks=find)
    return recorder.statistics, blocks


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


OPTIONS: list[dict[str, Any]] = [
    {"method": "kfac"},
    {"method": "svd"},
    {"method": "drone", "allocation": "uniform"},
    {"method": "kfac", "storage": "pivoted"},
    {"method": "kfac", "narrow_blocks": True},
    {"method": "kfac", "narrow_blocks": "low_rank"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_tried_leaves_no_trace_and_is_what_factoring_at_once_gives(
    options: dict[str, Any],
) -> None:
    settings = Settings(targets=["*"], align=1, **options)
    model = network()
    before, layers = state(model), list(model)
    statistics, blocks = seen(model, settings)
    solved = solve_model(model, statistics, settings, blocks=blocks)
    for keep in (0.7, 0.4, 0.6):
        with solved.on_trial(solved.choose(keep)):
            tried = state(model)
        assert same(state(model), before)
        assert list(model) == layers
        whole = Settings(targets=["*"], align=1, keep=keep, **options)
        other = network()
        record = factor_(other, copy.deepcopy(statistics), whole, blocks=blocks)
        assert same(tried, state(other))
        assert solved.kept(solved.choose(keep)) == pytest.approx(record.keep)

    installed = solved.install_(solved.choose(0.6))
    assert same(state(model), tried)
    assert [x.rank for x in installed.layers] == [x.rank for x in record.layers]


def test_an_error_while_sizes_are_tried_puts_the_layers_back() -> None:
    settings, model = Settings(method="svd", targets=["*"]), network()
    before = state(model)
    solved = solve_model(model, Statistics(), settings)
    with pytest.raises(KeyError), solved.on_trial(solved.choose(0.5)):
        raise KeyError
    assert same(state(model), before)


def test_sizes_that_stand_already_are_left_alone() -> None:
    settings, model = Settings(method="svd", targets=["*"], align=1), network()
    dense = solve_model(model, Statistics(), settings)
    before = state(model)
    record = dense.install_(None)
    assert same(state(model), before)
    assert record.keep == 1
    assert all(layer.dense for layer in record.layers)
    assert dense.choose(1.0).key == dense.standing.key

    factor_(model, Statistics(), Settings(method="svd", targets=["*"], align=1, keep=0.5))
    before = state(model)
    factored = solve_model(model, Statistics(), settings)
    record = factored.install_(None)
    assert same(state(model), before)
    assert record.keep == pytest.approx(0.5, abs=0.03)
    assert record.model_before == record.model_after
    assert factored.kept(factored.standing) == record.keep
    assert factored.choose(0.9).key == factored.standing.key


def test_a_keep_that_cannot_be_met_is_an_error_and_others_can_still_be_had() -> None:
    settings = Settings(method="svd", targets=["*"], keep_range=(0.4, 1.0))
    solved = solve_model(network(), Statistics(), settings)
    with pytest.raises(SettingError, match=r"keep=0.2 leaves .* the least keep is 0.4"):
        solved.choose(0.2)
    with pytest.raises(SettingError, match="keep is missing"):
        solved.choose()
    assert solved.kept(solved.choose(0.5)) <= 0.5


def test_compress_is_the_same_as_ever() -> None:
    one, other = network(), network()
    settings = Settings(targets=["*"], keep=0.5, align=1)
    statistics, _ = seen(other, settings)
    factor_(other, statistics, settings)
    compress(one, BATCHES, loss, mask=None, targets=["*"], keep=0.5, align=1)
    assert same(state(one), state(other))
