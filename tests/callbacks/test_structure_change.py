"""Other callbacks follow a change of structure, as averages of weights do here."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lrcompress
from lrcompress.callbacks.structure_change import Structure
from lrcompress.errors import PlatformError
from tests.callbacks.conftest import Loader, Tagger, sentences
from tests.callbacks.short_runs import RUNS, callbacks
from tests.callbacks.short_runs import tagger as module_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Distilled takes the model as it is"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "report_path": None}
DECAY = 0.8


class Averages(L.Callback):
    """Exponential moving averages of all parameters, with which the fit validates."""

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] | None = None
        self.changes: list[dict[str, list[str]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            self.averages.setdefault(name, parameter.detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            self.averages[name].lerp_(parameter.detach(), 1 - DECAY)

    def on_structure_change(
        self, trainer: L.Trainer, pl_module: nn.Module, changes: dict[str, list[str]]
    ) -> None:
        self.changes.append(changes)
        for old, new in changes.items():
            self.averages.pop(old)
            for name in new:
                self.averages[name] = pl_module.get_parameter(name).detach().clone()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: nn.Module) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # else it is lrcompress that measures
            self.kept = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self.put(pl_module, self.averages)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: nn.Module) -> None:
        if self.kept is not None:
            self.put(pl_module, self.kept)
            self.kept = None

    def put(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"averages": {name: value.clone() for name, value in self.averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = dict(state_dict["averages"])


class Notes(L.Callback):
    """The weights after every step, and the names that were replaced."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        self.steps.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def factorize(**kwargs: Any) -> lrcompress.Factorize:
    return lrcompress.Factorize(
        **({"keep": 0.5, "at": "step:4", "every_n_steps": 1} | QUIET | kwargs)
    )


def model(kind: type[Tagger] = Tagger) -> Tagger:
    L.seed_everything(0, verbose=False)
    return kind(dropout=0.0)


def test_averages_follow_and_those_of_other_layers_go_on(trainer: Make) -> None:
    averages, notes, made = Averages(), Notes(), model()
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    trainer(factorize(validate=False), averages, notes).fit(made, Loader(sentences()))
    assert averages.averages.keys() == dict(made.named_parameters()).keys()
    wanted = start["head.weight"]
    for weights in notes.steps:
        wanted = wanted.lerp(weights["head.weight"], 1 - DECAY)
    torch.testing.assert_close(averages.averages["head.weight"], wanted)
    (changes,) = averages.changes
    assert changes["blocks.0.down.weight"] == [
        "blocks.0.down.right.weight",
        "blocks.0.down.left.weight",
    ]
    assert changes["blocks.0.down.bias"] == ["blocks.0.down.left.bias"]
    assert not any(name.startswith(("head", "embed")) for name in changes)


def test_validation_at_a_point_is_without_averages_and_that_of_the_fit_with_them(
    trainer: Make,
) -> None:
    ours, made = factorize(at="epoch:1"), model()
    trainer(ours, Averages()).fit(made, Loader(sentences()), Loader(sentences(2)))
    again, plain = factorize(at="epoch:1"), model()
    trainer(again).fit(plain, Loader(sentences()), Loader(sentences(2)))
    assert ours.report.points[0].metrics == again.report.points[0].metrics
    assert ours.report.history != again.report.history
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        assert one.equal(other)


def test_averages_resumed_at_any_step_end_as_those_of_the_whole_run(
    trainer: Make, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> dict[str, Tensor]:
        averages = Averages()
        fit = trainer(factorize(storage="pivoted"), averages, max_epochs=2, every_step=not kwargs)
        fit.fit(model(), Loader(sentences()), **kwargs)
        return averages.averages

    whole = run()
    for step in (3, 4, 9):
        again = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.keys() == whole.keys()
        assert all(again[name].equal(value) for name, value in whole.items()), step


@pytest.mark.parametrize("run", RUNS)
def test_the_map_leads_from_all_old_names_to_all_new_ones(
    run: str, trainer: Make, tmp_path: Path
) -> None:
    class Follow(Averages):
        def on_structure_change(
            self, trainer: L.Trainer, pl_module: nn.Module, changes: dict[str, list[str]]
        ) -> None:
            led = [new for old in self.averages for new in changes.get(old, [old])]
            assert {*led} == dict(pl_module.named_parameters()).keys()
            assert changes.keys() <= self.averages.keys()
            super().on_structure_change(trainer, pl_module, changes)

    follow = Follow()
    given = callbacks(run)
    trainer(*given, follow, max_epochs=1).fit(module_of(run, tmp_path), Loader(sentences(10)))
    assert len(follow.changes) >= 1


def test_the_module_hears_of_it_too(trainer: Make) -> None:
    class Hears(Tagger):
        def on_structure_change(self, changes: dict[str, list[str]]) -> None:
            self.heard = changes

    made = model(Hears)
    trainer(factorize(validate=False)).fit(made, Loader(sentences()))
    assert "blocks.0.down.weight" in made.heard


def test_factors_that_become_dense_and_layers_that_stay_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(4, 4), lrcompress.nn.LowRankLinear(4, 4, 2))
    before = Structure(net)
    assert before.changes(net) == {}
    net[1] = lrcompress.merge_dense(net)[1]
    assert before.changes(net) == {
        "1.right.weight": ["1.weight", "1.bias"],
        "1.left.weight": ["1.weight", "1.bias"],
        "1.left.bias": ["1.weight", "1.bias"],
    }
    assert any(vars(parameter) for parameter in net.parameters())
    before.forget(net)
    assert not any(vars(parameter) for parameter in net.parameters())


class Stale(L.Callback):
    """Keeps something of the weights and does not follow."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.what == "by name":
            self.kept: Any = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        elif self.what == "parameters":
            self.kept = list(pl_module.parameters())
        elif self.what == "copy":
            self.kept = AveragedModel(pl_module)
        else:
            self.kept = AveragedModel(pl_module.blocks)


@pytest.mark.filterwarnings("error:Stale.kept keeps:UserWarning")  # which ends the run there
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("what", ["by name", "parameters", "copy", "copy of a part"])
def test_who_keeps_parameters_and_cannot_follow_is_named_before_the_first_step(
    what: str, first: bool, trainer: Make
) -> None:
    both = [factorize(validate=False), Stale(what)]
    run = trainer(*(both if first else both[::-1]))
    message = re.escape(
        "Stale.kept keeps parameters of layers that are to be replaced, such as 'bl"
    )
    with pytest.raises(UserWarning, match=message):
        run.fit(model(), Loader(sentences()))
    assert run.global_step == 0


@pytest.mark.parametrize(
    "callback",
    [WeightAveraging(), EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)],
    ids=lambda one: type(one).__name__,
)
def test_averages_of_lightning_are_refused_by_name(callback: L.Callback, trainer: Make) -> None:
    message = (
        r"WeightAveraging keeps a copy of the dense weights .* by the hook on_structure_change"
    )
    with pytest.raises(PlatformError, match=message):
        trainer(factorize(), callback).fit(model(), Loader(sentences()))
