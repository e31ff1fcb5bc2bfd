"""Sizes by the time of the whole model: met as measured anew, least that is lost, or said."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.bench.timing import interleaved, ratio
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.compress import compress
from lrcompress.engine.latency import check_unsharded, choose_by_latency
from lrcompress.engine.observation import observe_batches
from lrcompress.engine.passes import Passes
from lrcompress.engine.settings import Settings
from lrcompress.engine.solved_model import SolvedModel, solve_model
from lrcompress.errors import ObservationError, SettingError
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder

WIDTH = 192
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def batches() -> list[Batch]:
    drawn = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 32, WIDTH, generator=drawn), torch.randint(2, (16,), generator=drawn))
        for _ in range(3)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def passes(given: list[Batch] | None = None) -> Passes:
    return Passes(batches() if given is None else given, loss, lambda _: (None, None, None))


def solved(**settings: Any) -> SolvedModel:
    model, asked = Network(), Settings(**{"latency": 0.5, **settings})
    recorder = Recorder(model, asked.select(model).names, METHODS[asked.method].kinds)
    blocks = observe_batches(
        recorder, model, batches(), loss, mask=None, find_blocks=bool(asked.narrow_blocks)
    )
    return solve_model(model, recorder.statistics, asked, blocks=blocks)


def time_of(model: nn.Module, dense: nn.Module) -> float:
    batch = batches()[0]
    with torch.no_grad():
        work = {"model": lambda: loss(model, batch), "dense": lambda: loss(dense, batch)}
        taken = interleaved(work, 15)
    return ratio(taken["model"], taken["dense"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "drone", "allocation": "uniform"},
        {"storage": "pivoted"},
        {"narrow_blocks": True},
        {"narrow_blocks": "low_rank", "refit": 0.5},
    ],
    ids=str,
)
def test_the_model_takes_the_time_that_was_asked_for(settings: dict[str, Any]) -> None:
    dense = Network()
    model = copy.deepcopy(dense)
    record = compress(model, batches(), loss, mask=None, latency=0.6, **settings)
    found = record.latency
    assert found is not None
    assert found.asked == 0.6
    assert 0.3 < found.measured <= 0.6
    assert found.shape == (16,)
    assert found.measured in [trial.measured for trial in found.trials]
    assert record.note.startswith(found.note)
    assert record.keep == pytest.approx(
        next(x.kept for x in found.trials if x.measured == found.measured), abs=0.02
    )
    assert 0.25 < time_of(model, dense) < 0.75  # of a busy machine


def test_keep_and_latency_both_hold() -> None:
    small = compress(Network(), batches(), loss, mask=None, keep=0.1, latency=0.6)
    assert small.keep <= 0.1
    assert small.latency is not None
    assert len(small.latency.trials) == 1  # what keep gives is fast enough
    fast = compress(Network(), batches(), loss, mask=None, keep=0.95, latency=0.6)
    assert fast.latency is not None
    assert fast.latency.measured <= 0.6 < fast.latency.trials[0].measured
    assert fast.keep < 0.8


def test_a_budget_of_time_that_takes_too_many_parameters_is_cut() -> None:
    # what keep gives is too slow for the first trial alone: others must have fewer parameters too
    model = solved(keep=0.3, latency=0.08)
    _, found = choose_by_latency(model, passes())
    assert all(trial.kept <= 0.3 + 1e-9 for trial in found.trials)


@pytest.mark.parametrize("settings", [{}, {"keep": 0.5}, {"refit": 0.5}], ids=str)
def test_what_cannot_be_reached_is_said_and_the_layers_stay(settings: dict[str, Any]) -> None:
    model, dense = Network(), Network()
    told = r"latency=0.01 cannot be reached, and the layers stay as they were: .*; nearest: latency"
    with pytest.warns(UserWarning, match=told):
        record = compress(model, batches(), loss, mask=None, latency=0.01, **settings)
    assert record.latency is not None
    assert not record.latency.taken
    assert record.note.startswith(record.latency.note)
    fastest = min(record.latency.trials, key=lambda x: x.measured)
    assert record.latency.measured == fastest.measured
    assert f"{fastest.kept:.3f} of the parameters, the model takes 0." in record.note
    assert min(x.kept for x in record.latency.trials) < 0.05  # all layers at their least rank
    assert record.keep == 1
    assert record.left_alone
    assert all(layer.dense for layer in record.layers)
    for (name, one), other in zip(
        model.state_dict().items(), dense.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_layers_that_are_factored_already_stay_so_where_it_cannot_be_reached() -> None:
    model = Network()
    compress(model, batches(), loss, mask=None, keep=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"latency=0.01 cannot be reached"):
        record = compress(model, batches(), loss, mask=None, latency=0.01)
    assert record.keep == pytest.approx(0.5, abs=0.02)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("measured", "taken"), [(0.49, True), (0.515, True), (0.53, False)])
def test_a_miss_by_less_than_noise_is_taken(
    measured: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrcompress.engine.latency.ratio", lambda *_: measured)
    sizes, found = choose_by_latency(solved(latency=0.5), passes())
    assert (sizes is not None, found.taken) == (taken, taken)
    assert ("is missed" in found.note) == (taken and measured > 0.5)
    assert ("cannot be reached" in found.note) != taken


def test_ranks_and_keeps_of_their_own_stay() -> None:
    own = {"ranks": {"*.0.mix": 180}, "keeps": {"*.1.mix": 1.0, "*.2.up": 0.25}}
    record = compress(Network(), batches(), loss, mask=None, latency=0.6, align=1, **own)
    given = compress(Network(), batches(), loss, mask=None, keep=0.5, align=1, **own)
    ranks = [{x.name: x.rank for x in one.layers} for one in (record, given)]
    for name in ("layers.0.mix", "layers.1.mix", "layers.2.up"):
        assert ranks[0][name] == ranks[1][name]
    assert ranks[0] != ranks[1]


def test_trials_leave_no_trace() -> None:
    model = solved(narrow_blocks=True)
    layers = dict(model.model.named_modules())
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    model.model.train()
    torch.manual_seed(5)
    told: list[str] = []
    choose_by_latency(model, passes(), told.append)
    drawn = torch.randn(2)
    assert dict(model.model.named_modules()) == layers
    assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
    assert all(module.training for module in model.model.modules())
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(2))
    assert told
    assert all(line.startswith("latency: 0.") and "0.5 asked" in line for line in told)


def test_a_model_that_is_factored_already_is_made_faster_than_it_is() -> None:
    model = Network()
    compress(model, batches(), loss, mask=None, keep=0.5)
    before = copy.deepcopy(model)
    record = compress(model, batches(), loss, mask=None, latency=0.7)
    assert record.latency is not None
    assert record.latency.measured <= 0.7
    assert time_of(model, before) < 0.85


def test_the_batch_has_the_shape_that_is_asked_for() -> None:
    given = [{"input_ids": torch.randint(9, (4, 6)), "labels": torch.zeros(4, dtype=torch.int64)}]

    class Embedded(Network):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(self.embed(ids))

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])

    record = compress(
        Embedded(), given, loss_of, mask=None, latency=0.6, latency_shape=(2, 64), method="drone"
    )
    assert record.latency is not None
    assert record.latency.shape == (2, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency": 0}, r"latency must be above 0 and below 1 .* such as 0.5, got 0"),
        ({"latency": 1}, "latency must be above 0 and below 1"),
        ({"latency": True}, "latency must be above 0 and below 1"),
        ({"latency": 50}, r"such as 0.5, got 50; did you mean 0.5\?"),
        ({"latency": "50%"}, r"got '50%'; did you mean 0.5\?"),
        ({"latency": "half"}, "latency must be above 0 and below 1"),
        ({"latency_shape": (1, 2)}, "give latency=, or leave latency_shape out"),
        ({"latency": 0.5, "latency_shape": 3}, r"latency_shape must be two whole numbers from 1"),
        ({"latency": 0.5, "latency_shape": (0, 8)}, r"such as \(1, 128\), got \(0, 8\)"),
        ({"latency": 0.5, "method": "kronecker"}, "method 'kronecker' would solve anew for each"),
        ({"latency": 0.5, "keep_measured": True}, "as keep_measured does; leave one of them out"),
    ],
)
def test_settings_that_exclude_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings(**settings)


def test_without_a_batch_it_says_so() -> None:
    model = solved()
    with pytest.raises(SettingError, match="latency is measured on a batch that the model reads"):
        choose_by_latency(model, None)
    with pytest.raises(ObservationError, match="there is no batch to measure the model on"):
        choose_by_latency(model, passes([]))
    with pytest.raises(SettingError, match="refit and latency make further passes over batches"):
        compress(Network(), iter(batches()), loss, mask=None, latency=0.5)


def test_sharded_parameters_are_refused() -> None:
    class Sharded(Processes):
        sharded = True

    check_unsharded(ONE_PROCESS)
    with pytest.raises(SettingError, match="latency puts layers in and takes them out again"):
        check_unsharded(Sharded())
