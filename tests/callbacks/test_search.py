"""keep="auto": the least within the drop is chosen, a bold point is put right, runs resume."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy

import lrcompress
from lrcompress.budget import allocate, kept_share
from lrcompress.callbacks.search import KeepSearch
from lrcompress.engine.candidates import candidates
from lrcompress.engine.settings import Settings
from lrcompress.errors import (
    NoMatchError,
    NotFiniteError,
    ObservationError,
    PlatformError,
    SettingError,
)
from lrcompress.keep_search import GRID
from lrcompress.nn import FactoredLinear
from lrcompress.report import PointRecord

from .conftest import Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:You are trying to .self.log.*barebones"),
    pytest.mark.filterwarnings("ignore:lrcompress. the run does NOT end within"),
    pytest.mark.filterwarnings("ignore:lrcompress. no smaller model was found"),
]
Make = Callable[..., Any]


def searching(**kwargs: Any) -> lrcompress.Factorize:
    defaults: dict[str, Any] = {"keep": "auto", "at": 0.5, "drop": 0.02, "monitor": "val_loss"}
    defaults |= {"every_n_steps": 2, "align": 1, "verbose": False, "report_path": None}
    return lrcompress.Factorize(**(defaults | kwargs))


class Steered(Tagger):
    """Logs, beside its loss, a quality that is a function of its size and of what was trained.

    ``lost`` gives by how much the quality is below 1, for the share of parameters that the blocks
    have left, and for whether the head was trained since it was validated at a point.
    """

    lost: Callable[[float, bool], float]
    sign = 1.0
    shares: list[float]
    heads: list[Tensor]

    @property
    def share(self) -> float:
        return sum(p.numel() for p in self.blocks.parameters() if p.ndim > 1) / 2048

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not batch_idx:
            self.trained = not any(torch.equal(self.head.weight, one) for one in self.heads)
            if self.trainer.state.fn == TrainerFn.VALIDATING:  # at a point, or to judge the end
                self.heads.append(self.head.weight.detach().clone())
            self.shares.append(self.share)
        self.log("quality", 1 - self.sign * self.lost(self.share, self.trained))


def steered(lost: Callable[[float, bool], float], sign: float = 1.0) -> Steered:
    L.seed_everything(0, verbose=False)
    model = Steered(dropout=0.0)
    model.lost, model.sign = lost, sign  # type: ignore[method-assign]
    model.shares, model.heads = [], []
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def shares_of_grid(model: Make, trainer: Make, loader: Make) -> dict[float, tuple[float, float]]:
    """What every keep of the grid gives, by brute force: fits that end after their point."""
    found: dict[float, tuple[float, float]] = {}
    for keep in GRID:
        callback = searching(keep=keep, drop=None, monitor=None, at="step:9")
        try:
            trainer(callback, max_steps=10).fit(model(), loader(), loader())
        except SettingError:  # less than the layers take at least
            continue
        (point,) = callback.report.points
        found[keep] = (point.keep, point.metrics["after"]["val_loss"])
    return found


def test_bisection_finds_what_brute_force_finds_and_installs_what_it_tried(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    every = shares_of_grid(lambda: tagger(dropout=0.0), trainer, loader)
    assert len(every) > 80
    whole = searching(drop=10.0)
    trainer(whole).fit(tagger(dropout=0.0), loader(), loader())
    found = whole.report.points[0].search
    assert found is not None
    dense = found.reference
    for trial in found.trials:  # the very figures of fits with that keep
        assert (trial.kept, trial.value) == every[trial.keep]
    for drop in (0.001, 0.004, 0.01, 0.03):
        callback, model = searching(drop=drop), tagger(dropout=0.0)
        trainer(callback).fit(model, loader(), loader())
        point = callback.report.points[0]
        found = point.search
        assert found is not None
        assert found.reference == dense == point.metrics["before"]["val_loss"]
        within = {keep: value - dense <= drop for keep, (_, value) in every.items()}
        assert found.chosen is not None
        assert within[found.chosen]
        below = [keep for keep in every if every[keep][0] < point.keep]
        assert not below or not within[max(below)]  # the next smaller one loses too much
        if all(within[keep] == (keep >= found.chosen) for keep in below):
            least = min(keep for keep in every if within[keep])
            assert every[least][0] == point.keep
        assert point.metrics["after"]["val_loss"] == every[found.chosen][1]
        assert all(trial.within == within[trial.keep] for trial in found.trials)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["higher is better", "lower is better"])
@pytest.mark.parametrize("first", [0.05, 0.23, 0.5, 0.86])
def test_the_least_of_the_grid_that_is_within_is_chosen(
    sign: float, first: float, loader: Make, trainer: Make
) -> None:
    model = steered(lambda share, _: 0.0 if share >= first else 0.5, sign)
    callback = searching(
        drop="10%",
        monitor="quality",
        monitor_mode="max" if sign > 0 else "min",
        allocation="uniform",
    )
    trainer(callback).fit(model, loader(), loader())
    asked = candidates(dense := Tagger(), names := settings().select(dense).names, settings(), {})
    assert len(names) == 4
    shares = [kept_share(asked, allocate(asked, keep, "uniform")) for keep in GRID if keep > 0.1]
    (point,) = callback.report.points
    assert point.keep == min(share for share in shares if share >= first)
    assert point.search is not None
    assert point.search.drop == pytest.approx(0.1)
    assert len(point.search.trials) <= 7


def settings() -> Settings:
    return Settings(method="kfac", allocation="uniform", align=1)


def test_a_first_point_may_lose_more_and_the_next_knows_what_came_back(
    loader: Make, trainer: Make
) -> None:
    stood = [1.0, 0.0]  # the share that was trained last, and what it has lost for good

    def lost(share: float, trained: bool) -> float:
        anew = (stood[0] - share) * 0.1
        if trained:
            stood[:] = share, stood[1] + 0.4 * anew
        return stood[1] if trained else stood[1] + anew

    callback = searching(at=[0.3, 0.6], drop=0.02, monitor="quality", monitor_mode="max")
    trainer(callback).fit(steered(lost), loader(), loader())
    one, two = callback.report.points
    assert one.search is not None
    assert two.search is not None
    assert one.search.allowed == pytest.approx(0.04)  # half is hoped to come back
    assert 1 - one.keep == pytest.approx(0.4, abs=0.02)
    # 0.6 of it came back, in 5 steps; as many at most are relied on, for what is lost anew
    left = 0.04 * (1 - one.keep)
    assert two.search.allowed == pytest.approx(left + (0.02 - left) / 0.4)
    assert two.keep < one.keep
    assert "ends within drop=0.02" in two.note


def test_a_point_that_was_too_bold_is_put_right_at_the_next(
    loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = steered(lambda share, _: (1 - share) * 0.1)  # nothing ever comes back
    callback = searching(at=[0.3, 0.6], drop=0.02, monitor="quality", monitor_mode="max")
    seen: dict[str, Any] = {}
    trainer(Watch(seen), callback).fit(model, loader(), loader())
    one, two = callback.report.points
    assert one.keep == pytest.approx(0.6, abs=0.02)
    assert "went back to the state of before point 1, of step 5" in two.note
    assert two.keep == pytest.approx(0.8, abs=0.02)
    assert two.model_before == one.model_before
    assert "ends within drop=0.02" in two.note
    assert [name for name in seen["files"] if name.startswith("lrcompress")] == [
        "lrcompress-before-point-1.pt"
    ]
    assert not list(tmp_path.glob("lrcompress*"))  # the fit has ended


def test_what_is_left_after_training_is_not_hoped_to_come_back_once_more(
    loader: Make, trainer: Make
) -> None:
    """A part came back at once, and no more would later: the point is judged by what is left."""
    model = steered(lambda share, trained: (1 - share) * (0.7 if trained else 1.0) * 0.1)
    callback = searching(at=[0.3, 0.6], drop=0.02, monitor="quality", monitor_mode="max")
    trainer(callback).fit(model, loader(), loader())
    one, two = callback.report.points
    assert one.keep == pytest.approx(0.6, abs=0.02)
    assert (one.step, two.step) == (5, 10)  # and not at the end, with no training after it
    assert "and 0.02 is allowed: went back to the state of before point 1, of step 5" in two.note
    assert two.search is not None
    assert two.search.allowed == pytest.approx(0.02 / 0.7)
    assert "ends within drop=0.02" in two.note


class Watch(L.Callback):
    """The files of the run's folder before its last step."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen["files"] = sorted(p.name for p in Path(trainer.default_root_dir).iterdir())


class Snapshot(L.Callback):
    """The model and the state of its optimizer just before a step."""

    def __init__(self, step: int) -> None:
        self.step, self.held = step, {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            state = trainer.optimizers[0].state_dict()["state"]
            self.held = {
                "model": {k: v.clone() for k, v in pl_module.state_dict().items()},
                "state": {i: {k: v.clone() for k, v in x.items()} for i, x in state.items()},
            }


def test_going_back_gives_parameters_and_optimizer_as_they_were(
    loader: Make, trainer: Make
) -> None:
    """A drop of 0 that no factors meet after the first point: the run ends dense."""
    model = steered(lambda share, trained: 0.5 if share < 1 and trained else 0.0)
    before, callback = Snapshot(9), searching(drop=0.1, monitor="quality", monitor_mode="max")
    run = trainer(before, callback)
    run.fit(model, loader(), loader())
    point, back = callback.report.points
    assert point.keep < 0.2
    assert "went back to the state of before point 1, of step 9" in back.note
    assert back.step == 18
    assert point.search is not None
    # it goes back and factors once more, as strictly: what was within just after the point; what
    # was tried from there is known: one check, before the point, trials, and the end
    assert len(model.shares) == 3 + 1 + 1 + len(point.search.trials) + 1
    assert back.keep == point.keep
    assert back.search is not None
    assert back.search.allowed == pytest.approx(0.1)
    assert [x.rank for x in back.layers] == [x.rank for x in point.layers]
    (optimizer,) = run.optimizers
    params = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == params
    untouched = [k for k in before.held["model"] if k.startswith(("head", "embed"))]
    assert len(untouched) == 3
    for key in untouched:
        assert torch.equal(model.state_dict()[key], before.held["model"][key])


def test_going_back_to_the_dense_model_is_exact(loader: Make, trainer: Make) -> None:
    """All factors lose more than the drop, but less than a first point may."""
    model = steered(lambda share, _: 0.0 if share == 1 else 0.03)
    before, after = Snapshot(5), Snapshot(10)
    callback = searching(at=[0.3, 0.6], drop=0.02, monitor="quality", monitor_mode="max")
    with pytest.warns(UserWarning, match="no smaller model was found, all layers are dense"):
        trainer(before, callback, after).fit(model, loader(), loader())
    bold, back = callback.report.points
    assert bold.keep < 0.1
    assert back.keep == 1
    assert "went back to the state of before point 1, of step 5" in back.note
    assert re.search(r"nothing smaller was found: the best of [67] tried", back.note)
    assert not any(isinstance(m, FactoredLinear) for m in model.modules())
    for key, value in after.held["model"].items():
        assert torch.equal(value, before.held["model"][key]), key
    assert after.held["state"].keys() == before.held["state"].keys()
    for index, held in before.held["state"].items():
        for key, value in held.items():
            assert torch.equal(after.held["state"][index][key], value), (index, key)


def test_a_search_that_finds_nothing_says_so_and_leaves_the_model_dense(
    loader: Make, trainer: Make
) -> None:
    model = steered(lambda share, _: 0.0 if share == 1 else 0.3 - 0.1 * share)
    callback = searching(drop=0.1, monitor="quality", monitor_mode="max")
    plain = steered(lambda *_: 0.0)
    trainer().fit(plain, loader(), loader())
    with pytest.warns(UserWarning, match="no smaller model was found, all layers are dense"):
        trainer(callback).fit(model, loader(), loader())
    (point,) = callback.report.points
    assert point.keep == 1
    assert point.search is not None
    assert point.search.chosen is None
    assert re.search(r"best of 6 tried, keep=0.9\d, loses 0.2\d+ of quality", point.note)
    assert same(model, plain)  # trained as if nothing had been


def test_a_point_at_which_nothing_smaller_is_possible_says_so(
    loader: Make, trainer: Make, capsys: Any, caplog: Any
) -> None:
    model = steered(lambda *_: 0.0)
    callback = searching(
        at=[0.3, 0.6], drop=0.1, monitor="quality", monitor_mode="max", verbose=True
    )
    with caplog.at_level("INFO"):
        trainer(callback).fit(model, loader(), loader())
    one, two = callback.report.points
    assert {layer.rank for layer in one.layers} == {1}
    assert two.search is not None
    assert two.search.trials == ()
    said = "nothing smaller was found: none is possible, for all layers are at their least rank"
    assert said in two.note
    shown = capsys.readouterr().out
    assert "0 trials" not in shown
    assert shown.count("trials to find keep") == 1
    assert said in caplog.text


def test_layers_that_may_not_be_smaller_are_told_from_those_that_cannot(
    loader: Make, trainer: Make
) -> None:
    callback = searching(keep_range=(0.999, 1.0), allocation="global", drop=0.1)
    with pytest.warns(UserWarning, match="no smaller model was found"):
        trainer(callback).fit(steered(lambda *_: 0.0), loader(), loader())
    (point,) = callback.report.points
    assert "none is possible, with the ranks=, keeps= and keep_range= that layers" in point.note


@pytest.mark.parametrize("drop", [0.1, 0.0])
@pytest.mark.parametrize("verbose", [True, False])
def test_what_a_run_ends_with_is_said_once(
    drop: float, verbose: bool, loader: Make, trainer: Make, capsys: Any, caplog: Any
) -> None:
    model = steered(lambda share, _: 0.001 * (1 - share) if drop else float(share < 1))
    given = {"monitor": "quality", "monitor_mode": "max", "verbose": verbose}
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(searching(drop=drop, **given)).fit(model, loader(), loader())
    told = [capsys.readouterr().out, caplog.text, *(str(one.message) for one in warned)]
    whole = f"the run ends within drop={drop:g} of quality: "
    assert sum(" ".join(text.split()).count(whole) for text in told) == 1
    endings = [text for text in told[2:] if "no smaller model was found" in text]
    assert [whole in text for text in endings] == ([] if drop else [not verbose])


def test_figures_that_are_not_finite_are_not_within(loader: Make, trainer: Make) -> None:
    model = steered(lambda share, _: float("nan") if share < 0.6 else 0.0)
    callback = searching(drop=0.1, monitor="quality", monitor_mode="max")
    trainer(callback).fit(model, loader(), loader())
    (point,) = callback.report.points
    assert point.search is not None
    assert 0.6 <= point.keep < 0.64
    assert {trial.value is None for trial in point.search.trials} == {True, False}
    model = steered(lambda share, _: float("nan"))
    with pytest.raises(NotFiniteError, match="monitor='quality' is nan for the dense model"):
        trainer(searching(monitor="quality", monitor_mode="max")).fit(model, loader(), loader())


def test_trials_end_at_max_trials_with_the_least_so_far(loader: Make, trainer: Make) -> None:
    model = steered(lambda share, _: 0.0 if share > 0.4 else 0.5)
    callback = searching(drop=0.1, monitor="quality", monitor_mode="max", max_trials=2)
    trainer(callback).fit(model, loader(), loader())
    (point,) = callback.report.points
    assert point.search is not None
    assert [trial.within for trial in point.search.trials] == [True, False]
    assert point.search.chosen == point.search.trials[0].keep
    assert point.keep == point.search.trials[0].kept


def test_first_trials_on_a_share_of_the_data_find_the_same(loader: Make, trainer: Make) -> None:
    """The share is of batches, of which the limit of the fit leaves 5 of 6."""
    batches: list[int] = []

    class Counted(L.Callback):
        def on_validation_epoch_start(self, *_: Any) -> None:
            batches.append(0)

        def on_validation_batch_end(self, *_: Any) -> None:
            batches[-1] += 1

    found = {}
    for share in (1.0, 0.25):
        model = steered(lambda share, _: 0.0 if share > 0.4 else 0.5)
        given = {"drop": 0.1, "monitor": "quality", "monitor_mode": "max", "trial_share": share}
        callback = searching(**given)
        batches.clear()
        trainer(Counted(), callback, limit_val_batches=5).fit(model, loader(), loader())
        (point,) = callback.report.points
        assert point.search is not None
        found[share] = point.keep, len([x for x in point.search.trials if x.share == 1])
        parts = [x.share for x in point.search.trials]
        assert set(parts) <= {1.0, share}
    assert set(batches) == {1, 2, 5}  # the check before training; a share; all
    assert found[0.25][0] == found[1.0][0]
    assert found[0.25][1] <= 2 < found[1.0][1]


def test_training_that_ends_early_is_judged_too(loader: Make, trainer: Make) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 13

    model = steered(lambda share, trained: 0.5 if share < 1 and trained else 0.0)
    callback = searching(drop=0.1, monitor="quality", monitor_mode="max")
    trainer(Stop(), callback).fit(model, loader(), loader())
    assert [point.step for point in callback.report.points] == [9, 13]
    assert "went back" in callback.report.points[1].note
    # what is told of the end is of the model that the run ends with
    assert callback.report.final["quality"] == 1
    assert callback.report.final == callback.report.points[1].metrics["after"]


OPTIONS: list[dict[str, Any]] = [
    {"drop": 0.005},
    {"drop": 0.01, "at": ["epoch:1", 0.7]},
    {"drop": 0.004, "at": ["epoch:1", 0.7], "method": "svd", "storage": "pivoted"},
    {"drop": "1%", "narrow_blocks": True},
]
IDS = ["one point", "two points", "pivoted", "narrow blocks"]


class Copies(L.Callback):
    """Copies what the run keeps on disk to a folder, as long as it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        for file in Path(trainer.default_root_dir).glob("lrcompress*.pt"):
            shutil.copy(file, self.folder)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_a_run_resumed_at_any_step_ends_bit_identical(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    held, whole, callback = tmp_path / "held", tagger(), searching(**options)
    trainer(callback, Copies(held), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18
    searches = [(x.step, x.keep, x.search) for x in callback.report.points]
    for path in saved[:-1]:
        for file in held.glob("*.pt"):
            shutil.copy(file, tmp_path)
        torch.manual_seed(123)
        model, again = tagger(width=16), searching(**options)
        trainer(again).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name
        assert [(x.step, x.keep, x.search) for x in again.report.points] == searches


def test_a_bold_run_resumed_at_any_step_goes_back_as_the_whole_one(
    loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def made() -> tuple[Steered, lrcompress.Factorize]:
        model = steered(lambda share, _: (1 - share) * 0.1)
        options = {"at": [0.3, 0.6], "monitor": "quality", "monitor_mode": "max"}
        return model, searching(drop=0.02, **options)

    held = tmp_path / "held"
    whole, callback = made()
    trainer(callback, Copies(held), every_step=True).fit(whole, loader(), loader())
    assert "went back" in callback.report.points[1].note
    for step in (3, 5, 7, 10, 12, 17):
        for file in held.glob("*.pt"):
            shutil.copy(file, tmp_path)
        model, again = made()
        path = tmp_path / f"step={step}.ckpt"
        trainer(again).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), step
        assert [x.note for x in again.report.points] == [x.note for x in callback.report.points]


def test_a_kept_state_that_is_gone_or_another_run_s_is_said(
    loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def made() -> tuple[Steered, lrcompress.Factorize]:
        model = steered(lambda share, _: (1 - share) * 0.1)
        options = {"at": [0.3, 0.6], "monitor": "quality", "monitor_mode": "max"}
        return model, searching(drop=0.02, **options)

    model, callback = made()
    trainer(callback, Copies(tmp_path / "held"), every_step=True).fit(model, loader(), loader())
    path = tmp_path / "step=7.ckpt"
    model, callback = made()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(callback).fit(model, loader(), loader(), ckpt_path=path)
    said = "\n".join(str(one.message) for one in told)
    assert re.search(r"before-point-1.pt is not there, the state of before point 1", said)
    assert "there is no state to go back to" in said
    assert re.search(r"the run does NOT end within drop=0.02 of quality: 0.96\d* against 1", said)
    assert callback.report.points[1].keep == callback.report.points[0].keep

    other = torch.load(tmp_path / "held" / "lrcompress-before-point-1.pt")
    torch.save(other | {"token": "another"}, tmp_path / "lrcompress-before-point-1.pt")
    model, callback = made()
    with pytest.warns(UserWarning, match="cannot go back: .* is not the state of before point 1"):
        trainer(callback).fit(model, loader(), loader(), ckpt_path=path)


def test_a_second_fit_goes_on_with_what_the_first_has_found(loader: Make, trainer: Make) -> None:
    model = steered(lambda share, _: (1 - share) * 0.1)
    callback = searching(drop=0.02, monitor="quality", monitor_mode="max", at="step:6")
    run = trainer(callback)
    run.fit(model, loader(), loader())
    (point,) = callback.report.points
    run.fit_loop.max_epochs = 5
    run.fit(model, loader(), loader())
    assert len(callback.report.points) == 1
    assert callback._search is not None
    assert callback._search.judged == 30
    assert callback._search.target is not None
    assert point.search is not None
    assert callback._search.target.reference == point.search.reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": None}, r"such as drop=0.01, monitor='val_accuracy'; drop missing"),
        ({"drop": None, "monitor": None}, r"drop and monitor missing"),
        ({"drop": -1}, r"drop is by how much monitor may get worse.*got -1"),
        ({"monitor": "val_x"}, r"monitor_mode is missing: 'val_x' does not say"),
        ({"monitor_mode": "up"}, r"monitor_mode must be 'max'.*got 'up'"),
        ({"max_trials": 0}, r"max_trials must be a whole number from 1, got 0"),
        ({"trial_share": 0}, r"first trials, above 0 and up to 1, got 0"),
        ({"trial_share": True}, r"first trials, above 0 and up to 1, got True"),
        (
            {"keep": 0.5, "drop": None, "monitor": None, "monitor_mode": None, "max_trials": 3},
            r"max_trials= is what keep='auto' is chosen by, got keep=0.5; .*leave max_trials out",
        ),
        (
            {"keep": 0.5, "drop": None, "monitor": None, "trial_share": 0.5},
            r"trial_share= is what keep='auto' is chosen by, got keep=0.5",
        ),
        ({"keep": 0.5}, r"drop= is what keep='auto' is chosen by, got keep=0.5"),
        ({"keep": [0.5, 0.3], "at": [0.2, 0.4], "drop": None}, r"monitor= is what keep='auto'"),
        (
            {"drop": "100%", "monitor": "val_accuracy"},
            "drop='100%' allows all of val_accuracy to be lost; give drop='1%'",
        ),
        ({"keep": "car"}, r"keep is a share such as 0.3, a list of them, or 'auto'; got 'car'"),
        ({"keep": "Auto"}, r"or 'auto'; got 'Auto'; nearest: 'auto'"),
        ({"keep": "30%"}, r"or 'auto'; got '30%'; did you mean 0.3\?"),
        ({"method": "kronecker"}, r"method='kronecker' would solve anew for each"),
        ({"keep_measured": True}, r"leave keep_measured out"),
        ({"measure_layers": True}, r"others where keep='auto' goes back; leave it out"),
        ({"refit": 0.5}, r"tries sizes as they are solved, and refit= would change them after; "),
        ({"shared": True}, r"shared=True has untied its weights by then; leave shared out"),
        ({"at": []}, r"at is a list without a point"),
    ],
)
def test_says_what_is_wrong_when_made(options: dict[str, Any], message: str) -> None:
    if options.get("keep") in ("car", "30%"):
        options = options | {"drop": None, "monitor": None}
    with pytest.raises(SettingError, match=message):
        searching(**options)


def test_a_direction_against_the_name_is_said() -> None:
    with pytest.warns(UserWarning, match="takes higher values of 'val_loss' for better; by its"):
        searching(monitor_mode="max")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"monitor": "val_los"}, NoMatchError, r"not logged in validation, which logs val_loss; n"),
        ({"ranks": {"*": 4}}, SettingError, r"nothing to choose: every targeted layer has a rank"),
        ({"ranks": {"*up": 99}}, SettingError, r"rank of layer 'blocks.0.up' must be from 1 to 16"),
    ],
)
def test_says_what_is_wrong_before_training(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tagger: Make,
    loader: Make,
    trainer: Make,
) -> None:
    model, callback = tagger(), searching(**({"monitor_mode": "min"} | options))
    run = trainer(callback)
    with pytest.raises(error, match=message):
        run.fit(model, loader(), loader())
    assert run.global_step == 0


@pytest.mark.parametrize("without", [{"limit_val_batches": 0}, {"barebones": True}, {}], ids=str)
def test_no_validation_data(
    without: dict[str, Any], tagger: Make, loader: Make, trainer: Make
) -> None:
    data = [loader()] if not without else [loader(), loader()]
    more = (
        {"default_root_dir": None, "num_sanity_val_steps": None} if "barebones" in without else {}
    )
    run = trainer(searching(), **without | more)
    with pytest.raises(ObservationError, match="on validation data, and there is none"):
        run.fit(tagger(), *data)
    assert run.global_step == 0


def test_sharded_parameters_are_refused(
    sharding: Any, tagger: Make, loader: Make, trainer: Make
) -> None:
    with pytest.raises(PlatformError, match="each process has only a part under FSDP2; give keep"):
        trainer(searching(), strategy=sharding, devices=1).fit(tagger(), loader(), loader())


def test_other_callbacks_that_change_the_model_are_refused(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    other = lrcompress.LoSparse(keep=0.5, report_path=None)
    with pytest.raises(PlatformError, match="would undo what LoSparse has done since; leave one"):
        trainer(searching(), other).fit(tagger(), loader(), loader())


def test_it_is_not_for_between_two_fits() -> None:
    with pytest.raises(SettingError, match="keep='auto' is chosen within a fit"):
        searching().between_fits(1, 4)


def test_a_drop_of_the_whole_figure_is_said_before_training(loader: Make, trainer: Make) -> None:
    model = steered(lambda share, trained: 0.0)
    callback = searching(drop=2, monitor="quality", monitor_mode="max")
    told = "drop=2 allows all of quality to be lost, which is 1 before training"
    with pytest.warns(UserWarning, match=told), pytest.raises(SettingError, match="for the dense"):
        trainer(callback).fit(model, loader(), loader())
    assert model.global_step == 0 or callback.report.points == []


class Rated(Tagger):
    """Logs an accuracy as an object, whose greatest value is known."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = BinaryAccuracy()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))
        self.log("val_accuracy", self.accuracy)


def test_a_drop_of_all_that_there_can_be_is_refused_before_training(
    loader: Make, trainer: Make
) -> None:
    model = Rated()
    callback = searching(drop=1, monitor="val_accuracy")
    told = r"drop=1 allows all of val_accuracy to be lost, which is at most 1; give drop='1%'"
    with pytest.raises(SettingError, match=told):
        trainer(callback).fit(model, loader(), loader())
    assert model.trainer.global_step == 0
    trainer(searching(drop=0.9, monitor="val_accuracy")).fit(Rated(), loader(), loader())


def test_it_is_said_why_more_may_be_lost_at_a_point_than_in_the_end(
    loader: Make, trainer: Make, caplog: Any
) -> None:
    model = steered(lambda share, trained: (0.16 if not trained else 0.04) * (share < 1))
    callback = searching(
        drop=0.1, at=[0.3, 0.6], monitor="quality", monitor_mode="max", verbose=True
    )
    with caplog.at_level("INFO"):
        trainer(callback).fit(model, loader(), loader())
    assert (
        "0.2 of quality may be lost here, 0.1 in the end: training brings back 50% of what is lost "
        "anew, as is assumed until the next point" in caplog.text
    )
    assert (
        "0.28 of quality may be lost here, 0.1 in the end: training brings back 75% of what is "
        "lost anew, as at points before" in caplog.text
    )


def test_trial_runs_keep_nothing_and_every_trial_is_logged(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path, caplog: Any, capsys: Any
) -> None:
    callback = searching(verbose=True, drop=0.5)
    with caplog.at_level("INFO"):
        trainer(callback, fast_dev_run=3).fit(tagger(), loader(), loader())
    (point,) = callback.report.points
    assert point.search is not None
    for trial in point.search.trials:
        assert f"keep={trial.keep:g}: val_loss " in caplog.text
    assert "of which lower values are better" in caplog.text
    assert ": 0.5 of val_loss may be lost here, 0.5 in the end\n" in caplog.text
    shown = capsys.readouterr().out
    assert f"{len(point.search.trials)} trials to find keep" in shown
    assert "no test of the result" in shown
    assert not list(tmp_path.glob("**/lrcompress*"))


def test_a_preview_says_that_keep_is_chosen(tagger: Make) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(searching().preview(tagger()))
    assert "keep auto, at 0.5" in capture.get()
    assert "keep is chosen at the point, by validation; ranks are shown for 0.5" in capture.get()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Lightning's own command line
@pytest.mark.parametrize("keep", ["auto", "0.4", "[0.5, 0.3]", "null"])
def test_the_command_line_reads_all_kinds_of_keep(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    given: dict[str, str] = {
        "auto": "drop: 1%, monitor: val_acc",
        "[0.5, 0.3]": "at: [0.2, 0.4]",
        "null": "ranks: {'*': 3}",
        "0.4": "at: 0.5",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lrcompress.Factorize\n"
        f"      init_args: {{keep: {keep}, {given[keep]}}}\n"
    )
    args = [f"--config={recipe}"]
    cli = LightningCLI(Tagger, args=args, run=False, save_config_callback=None)
    (callback,) = (x for x in cli.trainer.callbacks if isinstance(x, lrcompress.Factorize))
    expected: dict[str, Any] = {"auto": "auto", "0.4": 0.4, "[0.5, 0.3]": [0.5, 0.3], "null": None}
    assert callback.keep == expected[keep]
    assert isinstance(callback._search, KeepSearch) == (keep == "auto")


def test_early_stopping_and_best_checkpoints_start_anew_where_the_run_goes_back(
    loader: Make, trainer: Make
) -> None:
    model = steered(lambda share, trained: 0.5 if share < 1 and trained else 0.0)
    stopping = EarlyStopping("quality", mode="max", patience=99)
    callback = searching(drop=0.1, monitor="quality", monitor_mode="max")
    trainer(stopping, callback).fit(model, loader(), loader())
    assert len(callback.report.points) == 2
    assert stopping.best_score == 1.0  # of the model that the run went back to


def test_records_of_points_have_no_search_where_keep_is_given(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = searching(keep=0.5, drop=None, monitor=None)
    trainer(callback).fit(tagger(), loader(), loader())
    records: list[PointRecord] = callback.report.points
    assert [one.search for one in records] == [None]
    assert "search" not in callback.state_dict()
    assert sentences()
