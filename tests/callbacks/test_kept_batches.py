"""Refitting in real fits: on batches that were kept, the same at every resume and in processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.callbacks.kept_batches import KeptBatches
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.errors import SettingError

from .test_factorize import factorize, hooks, same
from .test_narrow_blocks import SCRIPT

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
MADE = (
    "lrcompress.Factorize(keep=[0.7, 0.4], at=['epoch:1', 0.7], every_n_steps=1, align=1, "
    "refit=0.5, refit_tokens=100, report_path=None, verbose=False)"
)


def kept_of(sizes: list[int], limit: int) -> KeptBatches:
    kept = KeptBatches(limit)
    for number, size in enumerate(sizes):
        kept.hold({"x": torch.full((size, 1), number)}, None, number)
        kept.settle(number + 1)
    return kept


def numbers(kept: KeptBatches) -> list[int]:
    return [int(batch["x"].flatten()[0]) for batch in kept.batches]


@pytest.mark.parametrize(
    ("sizes", "limit", "left"),
    [([3, 3, 3], 5, [1, 2]), ([9, 1], 5, [0, 1]), ([1, 9], 5, [1]), ([2, 2], 50, [0, 1])],
)
def test_the_latest_batches_are_kept_as_far_as_they_are_needed(
    sizes: list[int], limit: int, left: list[int]
) -> None:
    assert numbers(kept_of(sizes, limit)) == left


def test_copies_are_kept_of_observed_steps_alone() -> None:
    kept, x = KeptBatches(10), torch.zeros(4, 2, dtype=torch.int64)
    kept.hold([x, {"mask": x}], None, 3)
    x += 1  # as a training step might
    kept.settle(4)
    kept.hold([x], None, 4)
    kept.settle(4)  # its loss was not finite
    (batch,) = kept.batches
    assert not batch[0].any()


def test_padding_does_not_count() -> None:
    kept = KeptBatches(4)
    for number in range(3):
        kept.hold({"x": torch.full((2, 3), number)}, torch.tensor([[1, 0, 0], [1, 0, 0]]), number)
        kept.settle(number + 1)
    assert numbers(kept) == [1, 2]


def test_another_number_of_processes_shares_what_was_kept() -> None:
    class Two(Processes):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, [(4, {"x": torch.full((4, 1), 9)})]]

    state = kept_of([2, 2], 10).state(Two(0, 2))
    one, second = KeptBatches(10), KeptBatches(10)
    one.load(state, ONE_PROCESS)
    second.load(state, Processes(1, 2))
    assert numbers(one) == [0, 1, 9]
    assert numbers(second) == [9]


@pytest.mark.parametrize("settings", [{}, {"narrow_blocks": True}, {"storage": "pivoted"}])
def test_a_fine_tune_is_refitted_at_its_points(
    settings: dict[str, Any], tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    callback = factorize(refit=0.5, refit_tokens=60, align=1, **settings)
    run = trainer(callback)
    run.fit(model, loader(), loader())
    (point,) = callback.report.points
    assert "refitted at 0.5 of the dense inputs on " in point.note
    tokens = int(point.note.partition(" tokens")[0].rpartition(" ")[2])
    assert 60 <= tokens < 60 + 8 * 7
    assert not any("not refitted" in layer.note for layer in point.layers)
    assert hooks(model) == 0
    assert set(vars(model)) & {"log", "log_dict"} == set()
    (optimizer,) = run.optimizers
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }


class Stops(L.Callback):
    """Keeps the model as it is just after the point."""

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not hasattr(self, "state") and any("left" in n for n, _ in pl_module.named_parameters()):
            self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}


def test_it_changes_left_factors_and_biases_and_nothing_else(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    found = []
    for refit in (None, 1.0):
        stops = Stops()
        callback = factorize(refit=refit, refit_bias=False, align=1, method="drone")
        # at a rate of zero, what the point has made stays
        trainer(callback, stops).fit(tagger(lr=0.0), loader(), loader())
        found.append(stops.state)
    changed = {key for key, value in found[0].items() if not torch.equal(value, found[1][key])}
    assert changed
    assert all(key.endswith("left.weight") for key in changed)


def test_a_run_resumed_at_any_step_ends_bit_identical(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(eval(MADE), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18
    for path in saved[:-1]:
        model = tagger(width=16)
        trainer(eval(MADE)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


def test_two_processes_end_alike_and_as_one_would(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    make = MADE.replace("refit_tokens=100", "refit_tokens=100000")  # all of them, in either case
    script, here = tmp_path / "script.py", str(Path(__file__).parent)
    script.write_text(SCRIPT.format(here=here, root=str(tmp_path), runs={"summed": make}))
    launch(script, 2)
    one, other = (torch.load(tmp_path / f"summed {number}.pt") for number in range(2))
    assert one["plan"] == other["plan"]
    for side in ("model", "optimizer"):
        torch.testing.assert_close(one[side], other[side], rtol=0, atol=0)
    torch.manual_seed(0)
    model = tagger(dropout=0.0)
    trainer(eval(make)).fit(model, loader(), loader())
    assert one["plan"] == lrcompress.Plan.of(model).to_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(one["model"][key], value, rtol=5e-3, atol=5e-4)


def test_without_it_nothing_is_kept(tagger: Make, loader: Make, trainer: Make) -> None:
    callback = factorize(at=0.9)
    assert callback.sampling.refit_tokens is None
    run = trainer(callback)
    run.fit(tagger(), loader(), loader())
    assert "kept" not in callback.state_dict()["observation"]


def test_a_distilled_module_is_refitted_by_its_own_step(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = lrcompress.Distilled(tagger())
    callback = factorize(refit=0.5, refit_tokens=60, align=1)
    trainer(callback).fit(model, loader(), loader())
    assert "refitted at 0.5" in callback.report.points[0].note


def test_sharded_parameters_are_refused_before_the_first_step(
    tagger: Make, loader: Make, trainer: Make, sharding: Any
) -> None:
    with pytest.raises(SettingError, match="refit runs blocks one by one on whole layers"):
        trainer(eval(MADE), strategy=sharding).fit(tagger(), loader())


def test_manual_optimization_is_refused_before_the_first_step(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    model.automatic_optimization = False
    with pytest.raises(SettingError, match="with manual optimization it steps the optimizers"):
        trainer(eval(MADE)).fit(model, loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd"}, "the method observes none; use 'drone', or give also_observe"),
        ({"refit_tokens": 0}, "refit_tokens must be a whole number from 1, got 0"),
        ({"refit": 1.5}, "refit must be a share from 0 to 1, such as 0.5, got 1.5"),
        ({"refit": True}, "refit must be a share from 0 to 1, such as 0.5, got True"),
        ({"method": "kronecker"}, "left factors anew, which method 'kronecker' does not make"),
    ],
)
def test_settings_that_exclude_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        lrcompress.Factorize(**{"keep": 0.5, "refit": 0.5, **settings})


def test_an_error_while_refitting_leaves_the_run_as_it_was(
    tagger: Make, loader: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise SettingError("late")

    monkeypatch.setattr("lrcompress.engine.refit.Normal.solve", fails)
    model = tagger()
    layers = dict(model.named_modules())
    run = trainer(eval(MADE))
    with pytest.raises(SettingError, match="late"):
        run.fit(model, loader())
    assert dict(model.named_modules()) == layers
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert isinstance(model.blocks[0]["up"], nn.Linear)
    assert "log" not in vars(model)
