"""Groups of layers that take turns to be observed: the sums of their own parts of the window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lrcompress
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.turns import in_turns
from lrcompress.distributed import Processes
from lrcompress.engine.settings import Settings
from lrcompress.errors import CheckpointError, ObservationError, SettingError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None, "align": 1}
ALL: dict[str, Any] = {"keep": 0.5, "at": "step:12", "window": "step:12", "every_n_steps": 1}


def made(**options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A callback, and what will have been observed at its point."""
    callback, seen = lrcompress.Factorize(**{**ALL, **QUIET, **options}), []
    change = callback._change_model

    def first(*args: Any) -> None:
        seen.append(callback._observation.statistics.state_dict())
        change(*args)

    callback._change_model = first
    return callback, seen


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys() != set()
    for name in one:
        for kind, value in one[name].items():
            assert torch.equal(value, other[name][kind]), (name, kind)


def test_each_group_has_the_sums_of_its_part_of_the_window(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback, (seen,) = fitted(tagger, loader, trainer, turns=2)
    parts = {"blocks.0.*": "step:6", "blocks.1.*": "step:12"}
    for pattern, end in parts.items():
        given = {"targets": [pattern], "at": end, "window": "step:6"}
        _, (part,) = fitted(tagger, loader, trainer, **given)
        for side in ("inputs", "outputs"):
            same({k: v for k, v in seen[side].items() if k in part[side]}, part[side])
        assert part["source"].items() <= seen["source"].items()
    record = callback.report.points[0]
    assert record.note == "each layer was observed in one of 2 parts of the window"
    assert record.observed["steps"] == 6
    _, (whole,) = fitted(tagger, loader, trainer)
    assert record.observed["tokens"] == whole["counts"][2] // 2


def fitted(tagger: Make, loader: Make, trainer: Make, *more: L.Callback, **options: Any) -> Any:
    callback, seen = made(**options)
    trainer(callback, *more, max_epochs=3).fit(tagger(), loader(), loader())
    return callback, seen


@pytest.mark.parametrize("method", ["kfac", "row_fisher"])
def test_a_run_is_resumed_from_any_step_of_the_window(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path, method: str
) -> None:
    def fit(name: str, **given: Any) -> Any:
        saving = ModelCheckpoint(
            tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1,
            save_on_train_epoch_end=False,
        )  # fmt: skip
        callback, seen = made(turns=2, method=method)
        model = tagger()
        trainer(callback, saving, max_epochs=3, enable_checkpointing=True).fit(
            model, loader(), loader(), **given
        )
        return model.state_dict(), seen[0], callback.report.points[0]

    state, seen, record = fit("whole")
    for step in (2, 6, 7, 11):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        again, found, told = fit(f"from {step}", ckpt_path=path)
        same({"": state}, {"": again})
        for side in ("inputs", "outputs"):
            same(seen[side], found[side])
        assert (told.note, told.observed) == (record.note, record.observed)

    path = tmp_path / "whole" / "step=7.ckpt"
    for turns, ckpt in ((1, path), (3, path)):
        other, _ = made(turns=turns, method=method)
        with pytest.raises(CheckpointError, match=rf"window of turns=2, got turns={turns}; resume"):
            trainer(other, max_epochs=3).fit(tagger(), loader(), loader(), ckpt_path=ckpt)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_groups_are_parts_of_the_model_of_about_as_many_bytes(count: int) -> None:
    sizes = {f"{i}.{name}": 10 + i for i in range(12) for name in ("q", "k", "up")}
    groups = in_turns(sizes, count)
    assert [name for group in groups for name in group] == [*sizes]
    assert len(groups) == count
    bytes_of = [sum(sizes[name] for name in group) for group in groups]
    assert max(bytes_of) <= sum(bytes_of) / count + 3 * 21
    for group in groups:  # layers of one module may read one tensor
        inside = {name.partition(".")[0] for name in group}
        assert len(group) == 3 * len(inside)


def test_there_are_no_more_groups_than_modules() -> None:
    assert in_turns({"a.x": 5, "a.y": 5, "b.x": 1}, 4) == [["a.x", "a.y"], ["b.x"]]
    assert in_turns({"a": 5, "b": 1}, 3) == [["a", "b"]]


def watched(turns: int, processes: Processes | None = None, deal: bool = False) -> Observation:
    kinds = ("input_moment", "output_moment")
    sampling = Sampling(kinds=kinds, owner="Factorize", deal=deal, turns=turns, mask=None)
    observation = Observation(sampling, processes or Processes())
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(4)))
    observation.watch(model, Settings(method="kfac", keep=0.5, targets=["*"]))
    return observation


def test_more_steps_are_observed_so_that_a_layer_sees_as_many_tokens() -> None:
    def steps(observation: Observation) -> list[int]:
        due = [ahead for ahead in range(100, 0, -1) if observation.due(ahead, 100)]
        turns = [observation.turn(ahead, 100) for ahead in due]
        assert turns == sorted(turns)
        return [turns.count(turn) for turn in range(max(turns) + 1)]

    assert steps(watched(1)) == [16]  # every 6th
    assert steps(watched(2)) == [17, 16]  # every 3rd
    assert steps(watched(4)) == [25, 25, 25, 25]
    assert steps(watched(2, Processes(0, 2), deal=True)) == [50, 50]


def test_every_group_has_a_step_of_the_least_window() -> None:
    observation = watched(4)
    for window in (4, 5, 9, 31):
        due = [ahead for ahead in range(1, window + 1) if observation.due(ahead, window)]
        assert {observation.turn(ahead, window) for ahead in due} == {0, 1, 2, 3}


def test_where_layers_are_dealt_each_process_takes_turns_with_its_own() -> None:
    every = [watched(2, Processes(index, 2), deal=True) for index in range(2)]
    own = [[{*one.layers} for one in observation._recorders] for observation in every]
    assert own[0][0] | own[1][0] == {"0.0", "1.0"}
    assert own[0][1] | own[1][1] == {"2.0", "3.0"}
    assert not own[0][0] & own[1][0]
    assert every[0].dealt == (
        "each layer was observed by one of 2 processes, on its own batches, in one of 2 parts of "
        "the window"
    )
    whole = watched(1)
    assert [one.nbytes for one in every] == [whole.nbytes // 4] * 2
    assert [one.nbytes_on_host for one in every] == [whole.nbytes // 2] * 2


def test_of_tokens_each_group_sees_as_many_as_are_asked_for(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    _, (seen,) = fitted(tagger, loader, trainer, turns=2, max_tokens=1)
    examples = {int(sums["examples"]) for sums in seen["outputs"].values()}
    assert examples == {8}  # of one batch


def test_a_part_without_a_finite_step_is_an_error_before_anything_is_factored(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    step = model.training_step

    def overflows(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        return loss * (torch.inf if model.trainer.global_step >= 6 else 1)

    model.training_step = overflows
    callback, seen = made(turns=2)
    with pytest.raises(ObservationError, match=r"nothing was observed of 'blocks.1.up' before"):
        trainer(callback, max_epochs=3).fit(model, loader(), loader())
    assert not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "turns must be a whole number from 1, got 0"),
        ({"turns": 1.5}, "turns must be a whole number from 1, got 1.5"),
        ({"turns": 2, "offload": "cpu"}, "leave out offload='cpu'"),
    ],
)
def test_what_turns_may_be(options: dict[str, Any], message: str) -> None:
    for kind in (lrcompress.Factorize, lrcompress.LoSparse):
        with pytest.raises(SettingError, match=message):
            kind(keep=0.5, **options)


def test_losparse_takes_turns_and_says_so(tagger: Make, loader: Make, trainer: Make) -> None:
    seen = {"at": "step:6", "window": "step:6", "every_n_steps": 1, "init": "kfac"}
    callback = lrcompress.LoSparse(
        0.5, mask_every=2, verbose=False, validate=False, report_path=None, turns=2, **seen
    )
    trainer(callback, max_epochs=3).fit(tagger(), loader(), loader())
    note = callback.report.points[0].note
    assert note.startswith("each layer was observed in one of 2 parts of the window")


SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from conftest import Loader, Tagger, sentences
from test_turns import made

root, number = {root!r}, int(os.environ["RANK"])


def fit(name, deal, ckpt_path=None):
    callback, seen = made(turns=2, deal=deal, allocation="uniform")
    torch.manual_seed(0)
    model = Tagger(dropout=0.0)
    saving = ModelCheckpoint(f"{{root}}/{{name}}", "{{step}}", every_n_train_steps=1, save_top_k=-1,
                             save_on_train_epoch_end=False)
    run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=root, strategy="ddp",
        callbacks=[callback, saving])
    given = [{{k: v[number::2] for k, v in b.items()}} for b in sentences()]
    run.fit(model, Loader(given), Loader(given), ckpt_path=ckpt_path)
    found = seen[0], callback.report.points[0].note, callback.report.points[0].observed
    return found, model.state_dict()

for deal in (False, True):
    (seen, note, observed), state = fit(f"deal {{deal}}", deal)
    torch.save((seen, note, observed, state), f"{{root}}/deal {{deal}} {{number}}.pt")
    for step in (4, 9):
        (_, again, _), other = fit("again", deal, f"{{root}}/deal {{deal}}/step={{step}}.ckpt")
        assert again == note
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)
    found, _ = fit("again", deal, root + "/alone/step=4.ckpt")  # that one process has written
    torch.save(found, f"{{root}}/grown {{deal}} {{number}}.pt")
"""


def test_several_processes_take_turns_together(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent), root=str(tmp_path)))
    saving = ModelCheckpoint(
        tmp_path / "alone", "{step}", every_n_train_steps=4, save_top_k=-1,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    alone, held = made(turns=2, allocation="uniform")
    torch.manual_seed(0)
    run = trainer(alone, saving, max_epochs=3, enable_checkpointing=True)
    run.fit(tagger(dropout=0.0), loader(), loader())
    (whole,) = held
    launch(script, 2)
    for deal in (False, True):
        grown = [torch.load(tmp_path / f"grown {deal} {i}.pt")[0] for i in range(2)]
        known = {name: sums for one in grown for name, sums in one["outputs"].items()}
        assert known.keys() == whole["outputs"].keys()
        for name, sums in known.items():  # dealt, each saw half of the rows from there on
            few = sums["tokens"] < whole["outputs"][name]["tokens"]
            assert few if deal else not few
        if not deal:
            torch.testing.assert_close(known, dict(whole["outputs"]), rtol=1e-3, atol=1e-5)
    summed = [torch.load(tmp_path / f"deal False {i}.pt") for i in range(2)]
    for seen, note, _, _ in summed:
        assert note == "each layer was observed in one of 2 parts of the window"
        for side in ("inputs", "outputs"):
            torch.testing.assert_close(seen[side], dict(whole[side]), rtol=1e-3, atol=1e-5)
    dealt = [torch.load(tmp_path / f"deal True {i}.pt") for i in range(2)]
    layers = [{*one[0]["outputs"]} for one in dealt]
    assert layers[0] | layers[1] == {*whole["outputs"]}
    assert not layers[0] & layers[1]
    assert "by one of 2 processes, on its own batches, in one of 2 parts" in dealt[0][1]
    for key, value in dealt[0][3].items():
        assert torch.equal(value, dealt[1][3][key])
    # each saw half of the rows, in its part of the window
    assert dealt[0][2]["tokens"] == pytest.approx(whole["counts"][2] / 2, rel=0.2)

    other, found = made(turns=2, allocation="uniform")  # one process goes on alone
    path = tmp_path / "deal True" / "step=9.ckpt"
    trainer(other, max_epochs=3).fit(tagger(dropout=0.0), loader(), loader(), ckpt_path=path)
    assert {*found[0]["outputs"]} == {*whole["outputs"]}


def test_between_two_fits_batches_are_shared_out_to_the_groups(
    tagger: Make, loader: Make, tmp_path: Path
) -> None:
    model = tagger()
    state = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6"}
    torch.save(state, tmp_path / "dense.ckpt")
    callback = lrcompress.Factorize(0.5, turns=2, **QUIET)
    given = (tmp_path / "dense.ckpt", tmp_path / "out.ckpt", tagger(), loader(), callback)
    report = lrcompress.callbacks.factor_checkpoint(*given, batches=4)
    note = report.points[0].note
    assert note.endswith("each layer was observed in one of 2 parts of the window")
    assert report.points[0].observed["steps"] == 2
