"""The callback in real fits: what it leaves behind, and that it ends as it should."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcompress
from lrcompress.engine.factored_layers import store_pivoted_
from lrcompress.errors import (
    CheckpointError,
    LayerError,
    NoMatchError,
    ObservationError,
    PlatformError,
    SettingError,
    ShapeError,
)
from lrcompress.nn import FactoredLinear, KroneckerLinear, LowRankLinear, PivotedLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero"),
    pytest.mark.filterwarnings("ignore:You are trying to .self.log.*barebones"),
]
METHODS = ["svd", "fwsvd", "asvd", "drone", "row_fisher", "kfac", "weighted_kfac"]
Make = Callable[..., Any]


def factorize(**kwargs: Any) -> lrcompress.Factorize:
    defaults: dict[str, Any] = {"keep": 0.5, "at": 0.5, "every_n_steps": 2, "verbose": False}
    defaults["report_path"] = None
    return lrcompress.Factorize(**(defaults | kwargs))


def hooks(module: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_backward_hooks",
    )
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_a_fine_tune_comes_out_smaller(
    method: str, tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), factorize(method=method)
    before = sum(p.numel() for p in model.parameters())
    trainer(callback).fit(model, loader(), loader())

    point = callback.report.points[0]
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    assert ranks == {layer.name: layer.rank for layer in point.layers if layer.rank}
    assert len(ranks) >= 3
    assert point.model_after == sum(p.numel() for p in model.parameters()) < before
    assert point.keep == pytest.approx(0.5, abs=0.05)
    assert point.metrics["before"].keys() == {"val_loss"} == callback.report.final.keys()
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac", "at": 0.5, "keep": 0.5},
        {"method": "kfac", "at": ["epoch:1", 0.7], "keep": [0.6, 0.3]},
        {"method": "drone", "at": "step:7", "restart_scale": 0.3, "restart_steps": 4},
        {"method": "row_fisher", "fisher": "model", "logits": "head", "window": "step:5"},
        {"method": "kronecker", "keep": 0.6, "shapes": {"*up": [16, 16]}, "window": "step:5"},
        {"at": ["epoch:1", 0.7], "keep": [0.8, 0.4], "storage": "pivoted"},
    ],
    ids=["one point", "two points", "restart", "drawn labels", "kronecker", "pivoted"],
)
def test_a_run_resumed_at_any_step_ends_bit_identical(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(factorize(**options), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18

    for path in saved[:-1]:
        torch.manual_seed(123)  # whatever happened before resuming
        model = tagger(width=16)
        torch.rand(int(path.stem[5:]))
        trainer(factorize(**options)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name
        assert hooks(model) == 0


class Seen(L.Callback):
    """The kinds of factored layers after each step."""

    def __init__(self) -> None:
        self.kinds: list[set[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.kinds.append({m.kind for m in pl_module.modules() if isinstance(m, FactoredLinear)})


def test_balanced_factors_are_trained_and_pivoted_rows_are_stored(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model, callback, seen = tagger(), factorize(keep=0.9, storage="pivoted"), Seen()
    run = trainer(seen, callback, every_step=True)
    run.fit(model, loader(), loader())

    assert seen.kinds == [set()] * 9 + [{"low_rank"}] * 9  # it sees a step before it is over
    rows = {n: m for n, m in model.named_modules() if isinstance(m, PivotedLinear)}
    (point,) = callback.report.points
    assert rows.keys() == {layer.name for layer in point.layers if layer.rank}
    assert point.model_after == sum(p.numel() for p in model.parameters())
    assert point.bytes_after == sum(p.nbytes for p in model.parameters())
    more = sum(m.rank**2 for m in rows.values())
    assert f"balanced factors; as such they take {more} parameters more" in point.note
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == set(map(id, model.parameters())) == set(map(id, run.optimizers[0].state))

    ended = {name: value.clone() for name, value in run.callback_metrics.items()}
    (same_figures,) = run.validate(model, loader(), verbose=False)
    torch.testing.assert_close(same_figures["val_loss"], float(ended["val_loss"]))
    before = tmp_path / "step=16.ckpt"  # with balanced factors, by a trainer that has fitted
    (figures,) = run.validate(model, loader(), ckpt_path=before, verbose=False)
    assert {layer.kind for layer in lrcompress.Plan.of(model)} == {"low_rank"}
    other = lrcompress.restore_structure(tagger(), before)
    other.load_state_dict(torch.load(before, weights_only=True)["state_dict"])
    assert store_pivoted_(other) == list(rows)
    torch.testing.assert_close(
        trainer().validate(other, loader(), verbose=False)[0]["val_loss"], figures["val_loss"]
    )


def test_rows_are_stored_where_training_ends_early(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 14

    model = tagger()
    run = trainer(factorize(keep=0.9, storage="pivoted"), Stop())
    run.fit(model, loader(), loader())
    assert run.global_step == 14
    assert {layer.kind for layer in lrcompress.Plan.of(model)} == {"pivoted"}


def test_kronecker_factors_are_given_or_found_and_only_of_dense_layers(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    """Every other block by its odd number; the shapes given; no second point; refusals first."""
    odd = {"targets": ["blocks.*[13579].*"], "method": "kronecker", "keep": 0.6}
    model, callback = tagger(), factorize(**odd, shapes={"*up": [16, 16]})
    trainer(callback).fit(model, loader(), loader())
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, KroneckerLinear)}
    assert kinds.keys() == {"blocks.1.up", "blocks.1.down"}
    assert kinds["blocks.1.up"].sizes["first_out"] == kinds["blocks.1.up"].sizes["first_in"] == 16
    (point,) = callback.report.points
    assert point.keep <= 0.6
    for record in point.layers:
        layer = kinds[record.name]
        assert record.first == tuple(layer.first.shape[1:])
        assert record.after == sum(p.numel() for p in layer.factors)
        assert record.predicted_loss is not None
    again = lrcompress.Report.from_dict(json.loads(json.dumps(callback.report.to_dict())))
    assert again.points[0].layers == point.layers

    with pytest.raises(LayerError, match=r"'blocks.1.up' is a sum of Kronecker products already"):
        trainer(factorize(keep=0.5)).fit(model, loader())
    low = tagger()
    low.blocks[1]["up"] = LowRankLinear.in_place_of(low.blocks[1]["up"], 2)
    with pytest.raises(LayerError, match=r"'blocks.1.up' is low rank already.*merge_dense"):
        trainer(factorize(**odd)).fit(low, loader())
    with pytest.raises(ShapeError, match=r"layer 'blocks.1.up': .*\[5, 7\].*does is \[4, 8\]"):
        trainer(factorize(**odd, shapes={"*up": [5, 7]})).fit(tagger(), loader())
    with pytest.raises(SettingError, match=r"method='kronecker' factors dense layers.*one point"):
        factorize(method="kronecker", keep=[0.5, 0.3], at=[0.3, 0.6])


def test_a_point_that_is_past_keeps_its_settings_and_says_so(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    trainer(factorize(keep=0.5), every_step=True).fit(tagger(), loader(), loader())
    before, after = tmp_path / "step=8.ckpt", tmp_path / "step=12.ckpt"
    other = {"keep": 0.3, "verbose": False, "report_path": None, "every_n_steps": 2}
    with pytest.warns(UserWarning, match=r"point with method='kfac', keep=0.5, which stays .*0.3"):
        trainer(lrcompress.Factorize(at=0.5, **other)).fit(tagger(), loader(), ckpt_path=after)
    model = tagger()
    trainer(lrcompress.Factorize(at=0.5, **other)).fit(model, loader(), ckpt_path=before)
    assert any(isinstance(m, LowRankLinear) for m in model.modules())


def test_layers_that_factors_do_not_make_faster_stay(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    path, model = tmp_path / "report.json", tagger()  # layers far too small to gain anything
    callback = factorize(keep_measured=True, report_path=str(path))
    console = Console(width=150, color_system=None)
    with console.capture() as capture:
        console.print(callback.preview(model))
    assert "layers that are not faster with factors stay; measured at the poi" in capture.get()
    before = sum(p.numel() for p in model.parameters())
    trainer(callback).fit(model, loader(), loader())
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    (point,) = callback.report.points
    assert point.model_after == before
    assert point.note.startswith("keep=0.5 is missed, 1.000 remains: ")
    assert sum("stays as it is: a rank of" in layer.note for layer in point.layers) >= 2
    assert lrcompress.Report.from_dict(json.loads(path.read_text())) == callback.report
    assert hooks(model) == 0


def test_layers_are_measured_in_the_precision_of_the_trainer(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.overloadpacket.__name__ == "addmm" and len(args[1]) == 13:
                dtypes.add(args[1].dtype)
            return func(*args, **kwargs or {})

    callback = factorize(keep_measured=True, measured_tokens=13)
    with Products():
        trainer(callback, precision="bf16-mixed").fit(tagger(), loader())
    assert dtypes == {torch.bfloat16}


def test_the_schedule_and_the_optimizer_object_stay(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            (optimizer,) = trainer.optimizers
            rates.append(optimizer.param_groups[0]["lr"])
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in trainer.lightning_module.parameters()}
            assert len(optimizer.param_groups) == 2
            assert set(map(id, optimizer.state)) <= held

    trainer(factorize(restart_scale=0.1), Watch()).fit(tagger(), loader())
    assert rates == pytest.approx([0.01 * 0.97 ** (step + 1) for step in range(18)])


def test_the_learning_rate_rises_again_after_a_point(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    run = trainer(factorize(at="step:6", restart_steps=4, restart_scale=0.5))
    seen = []

    class Adam(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model.configure_optimizers = lambda: Adam(model.parameters(), lr=1.0)
    run.fit(model, loader())
    assert seen[:6] == [1.0] * 6
    assert seen[6:12] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_state_that_is_dropped_is_named_in_report_and_log(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    told = "Adamax keeps exp_inf, which no rule carries over .* start without state"
    for name, known in (("AdamW", True), ("Adamax", False)):
        model, callback = tagger(), factorize()
        make = getattr(torch.optim, name)
        model.configure_optimizers = lambda m=model, make=make: make(m.parameters())
        with nullcontext() if known else pytest.warns(UserWarning, match=told):
            trainer(callback).fit(model, loader())
        (point,) = callback.report.points
        few = r"\d+ tokens were observed of layers with up to 32 inputs, .* observe 256 or more"
        assert re.fullmatch(few if known else f"{few}; {told}", point.note)


def test_two_points_factor_again_from_fresh_statistics(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), factorize(at=["epoch:1", "epoch:2"], keep=[0.6, 0.3])
    trainer(callback).fit(model, loader())
    first, second = callback.report.points
    assert (first.step, second.step) == (6, 12)
    assert first.keep == pytest.approx(0.6, abs=0.05)
    assert second.keep == pytest.approx(0.3, abs=0.05)
    assert second.model_before == first.model_after < first.model_before
    assert second.bytes_before == first.bytes_after < (first.bytes_before or 0)
    assert [x.stood for x in first.layers] == [None] * 4
    assert [x.stood for x in second.layers] == [x.after if x.rank else None for x in first.layers]
    assert [x.name for x in second.layers] == [x.name for x in first.layers]
    assert first.observed["steps"] == second.observed["steps"] == 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_accumulation_does_not_change_what_is_observed(
    accumulate: int, tagger: Make, batches: Make, loader: Make, trainer: Make
) -> None:
    # rate 0: the model stays, so any division of the data must give the same sums
    whole = batches()
    parts = [
        {key: value[i::accumulate] for key, value in batch.items()}
        for batch in whole
        for i in range(accumulate)
    ]
    sums = []
    for given, count in ((whole, 1), (parts, accumulate)):
        model = tagger(lr=0.0, dropout=0.0)
        callback = factorize(every_n_steps=1, at="epoch:1", window="epoch:1", keep=0.5)
        grabbed = _grab_statistics(callback)
        trainer(callback, accumulate_grad_batches=count).fit(model, loader(given))
        sums.append(grabbed[0])
    assert sums[0].tokens == sums[1].tokens
    for name in sums[0].outputs:
        for kind in ("output_moment",):
            whole_sum = sums[0].outputs[name].moment(kind)
            torch.testing.assert_close(sums[1].outputs[name].moment(kind), whole_sum)
        torch.testing.assert_close(
            sums[1].of(name, ["input_moment"]).moment("input_moment"),
            sums[0].of(name, ["input_moment"]).moment("input_moment"),
        )


def test_loss_scaling_does_not_change_what_is_observed(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    sums = []
    for scaled in (False, True):
        callback = factorize(every_n_steps=1, at="epoch:1", keep=0.5)
        grabbed = _grab_statistics(callback)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        precision = {"plugins": [half]} if scaled else {}
        model = tagger(lr=0.0, dropout=0.0)
        trainer(callback, accumulate_grad_batches=2, **precision).fit(model, loader())
        sums.append(grabbed[0])
    for name in sums[0].outputs:
        full, half = (one.outputs[name].moment("output_moment") for one in sums)
        assert (half - full).norm() < 0.02 * full.norm()
        assert sums[0].outputs[name].examples == sums[1].outputs[name].examples


def _grab_statistics(callback: lrcompress.Factorize) -> list[Any]:
    grabbed: list[Any] = []
    change = callback._change_model

    def first(*args: Any) -> None:
        grabbed.append(callback._observation.statistics)
        change(*args)

    callback._change_model = first  # type: ignore[method-assign]
    return grabbed


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_any_precision(precision: str, tagger: Make, loader: Make, trainer: Make) -> None:
    model, callback = tagger(), factorize()
    trainer(callback, precision=precision).fit(model, loader(), loader())
    assert callback.report.points[0].keep == pytest.approx(0.5, abs=0.05)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}


def test_a_compiled_module(tagger: Make, loader: Make, trainer: Make) -> None:
    model, callback = tagger(), factorize()
    model.blocks[0]["up"].compile(backend="eager")
    model.forward = torch.compile(model.forward, backend="eager")
    trainer(callback).fit(model, loader())
    assert callback.report.points[0].observed["steps"] == 3
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) >= 3


def test_manual_optimization(tagger: Make, loader: Make, trainer: Make) -> None:
    model, callback = tagger(), factorize(at="step:9", window="step:4", every_n_steps=1)
    model.automatic_optimization = False
    step = model.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(step(batch, batch_idx))
        optimizer.step()

    model.training_step = training_step
    trainer(callback).fit(model, loader())
    assert callback.report.points[0].observed["steps"] == 4
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) >= 3


def test_a_short_window_is_observed_more_often_by_default(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = factorize(every_n_steps=None, at="epoch:2", window="epoch:2")
    trainer(callback).fit(tagger(), loader())
    assert callback.report.points[0].observed["steps"] == 12


def test_validation_and_sanity_batches_are_not_observed(
    tagger: Make, loader: Make, trainer: Make, batches: Make
) -> None:
    callback = factorize(every_n_steps=1, at="epoch:1")
    run = trainer(callback, num_sanity_val_steps=2, val_check_interval=2)
    run.fit(tagger(), loader(), loader())
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches())
    assert callback.report.points[0].observed["tokens"] == tokens
    assert callback.report.points[0].observed["steps"] == 6


def test_validating_at_a_point_leaves_no_trace(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    models = []
    for validate in (False, True):
        model = tagger()
        logger = CSVLogger(tmp_path / str(validate))
        run = trainer(factorize(validate=validate), logger=logger, log_every_n_steps=1)
        run.fit(model, loader(), loader())
        models.append(model)
        logged = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert ("lrcompress/after/val_loss" in logged) == validate
        assert "lrcompress/keep" in logged
    assert same(*models)


def test_best_checkpoint_and_early_stopping_start_anew(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = tagger(lr=0.001)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=True)
    stop = EarlyStopping("val_loss", patience=1)
    run = trainer(factorize(at="epoch:2", keep=0.1, align=1), stop, best, enable_checkpointing=True)
    run.fit(model, loader(), loader())
    assert run.current_epoch == 3
    held = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert any(key.endswith("left.weight") for key in held)
    run.validate(model, loader(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("monitor", ["val_loss", None])
def test_a_checkpoint_that_stays_dense_beside_the_factored_one_is_named(
    monitor: str | None, tagger: Make, loader: Make, trainer: Make, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    best = ModelCheckpoint(tmp_path, "best", monitor=monitor, save_weights_only=True)
    run = trainer(factorize(at="epoch:2"), best, enable_checkpointing=True)
    run.fit(tagger(), loader(), loader())

    def dense(path: Path) -> bool:
        held = torch.load(path, weights_only=True)["state_dict"]
        return not any(key.endswith("left.weight") for key in held)

    files = {path.name: dense(path) for path in tmp_path.glob("*.ckpt")}
    told = [line for line in caplog.messages if "stays as it was before this point" in line]
    assert not dense(Path(best.best_model_path))
    if monitor is None:  # without a best, the latest is replaced as ever
        assert (files, told) == ({"best.ckpt": False}, [])
    else:
        assert files == {"best.ckpt": True, "best-v1.ckpt": False}
        (line,) = told
        assert str(tmp_path / "best.ckpt") in line


def test_weights_only_files_and_either_structure_load_again(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = tagger()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    run = trainer(factorize(at="epoch:1"), saving, enable_checkpointing=True)
    run.fit(model, loader(), loader())

    (factored,) = run.validate(model, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    (dense,) = run.validate(model, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    again = run.validate(tagger(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert again[0]["val_loss"] == factored["val_loss"] != dense["val_loss"]


def test_load_from_checkpoint_through_the_helper(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = tagger()

    class Restoring(type(model)):  # type: ignore[misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            lrcompress.restore_structure(self, checkpoint)

    run = trainer(factorize())
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    for name in ("a.ckpt", "b.ckpt"):
        assert same(Restoring.load_from_checkpoint(tmp_path / name, weights_only=True), model)


def test_a_finished_run_can_be_saved_and_trained_on(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = tagger()
    run = trainer(factorize(at="epoch:1"))
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    longer, callback = tagger(), factorize(at="epoch:1")
    trainer(callback, max_epochs=4).fit(longer, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert len(callback.report.points) == 1
    assert lrcompress.Plan.of(longer) == lrcompress.Plan.of(model)


def test_a_checkpoint_that_observed_more_can_go_on_with_another_method(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    observer = factorize(method="svd", at="epoch:1", also_observe=["weighted_moment"])
    trainer(observer, saving, enable_checkpointing=True).fit(tagger(), loader(), loader())
    resumed = factorize(
        method="weighted_kfac", keep=0.4, at="epoch:1", report_path=str(tmp_path / "a" / "r.json")
    )
    trainer(resumed).fit(tagger(), loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.report.points[0].keep == pytest.approx(0.4, abs=0.05)
    written = json.loads((tmp_path / "a" / "r.json").read_text())
    assert written == json.loads(json.dumps(resumed.report.to_dict()))
    assert written["final"].keys() == {"val_loss"}

    with pytest.raises(CheckpointError, match=r"Factorize now needs input_moment of them too"):
        trainer(factorize(method="drone", at="epoch:1")).fit(
            tagger(), loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt"
        )


def test_fitting_twice_factors_once_to_the_same_budget(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), factorize()
    trainer(callback).fit(model, loader())
    size = sum(p.numel() for p in model.parameters())
    trainer(callback).fit(model, loader())
    assert sum(p.numel() for p in model.parameters()) <= size
    assert len(callback.report.points) == 1


@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": 2}, {"barebones": True}, {"limit_train_batches": 4}, {"max_steps": 10}],
    ids=lambda options: next(iter(options)),
)
def test_the_trainer_s_other_ways_to_run(
    options: dict[str, Any], tagger: Make, loader: Make, tmp_path: Path
) -> None:
    if "barebones" not in options:
        options = options | {"logger": False, "enable_progress_bar": False}
    model, callback = tagger(), factorize(at="step:1", window="step:1")
    L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=2, callbacks=[callback], **options
    ).fit(model, loader(), loader())
    assert len(callback.report.points) == 1
    json.dumps(callback.report.to_dict())


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    step = model.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss

    model.training_step = training_step
    model.on_before_optimizer_step = lambda optimizer: [
        p.grad.nan_to_num_(0) for p in model.parameters() if p.grad is not None
    ]
    callback = factorize(every_n_steps=1, at="epoch:1")
    trainer(callback).fit(model, loader())
    assert callback.report.points[0].observed["skipped"] == 1
    assert callback.report.points[0].observed["steps"] == 5


@pytest.mark.parametrize("kind", [ModelPruning, StochasticWeightAveraging, WeightAveraging])
def test_refuses_callbacks_that_hold_dense_weights(
    kind: type[L.Callback], tagger: Make, loader: Make, trainer: Make
) -> None:
    other = {
        ModelPruning: lambda: ModelPruning("l1_unstructured"),
        StochasticWeightAveraging: lambda: StochasticWeightAveraging(1e-3),
        WeightAveraging: WeightAveraging,
    }[kind]()
    model = tagger()
    with pytest.raises(PlatformError, match=rf"remove {kind.__name__}, or call"):
        trainer(factorize(), other).fit(model, loader())
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "kfca"}, SettingError, r"got 'kfca', nearest: kfac"),
        ({"keep": 0}, SettingError, r"keep must be above 0 and at most 1 .* got 0"),
        ({"keep": 1.5}, SettingError, r"got 1.5$"),
        ({"keep": 15}, SettingError, r"got 15; did you mean 0.15\?"),
        ({"keep": float("nan")}, SettingError, r"got nan"),
        ({"keep": None}, SettingError, r"keep is missing"),
        (
            {"keep": [0.5, 0.3]},
            SettingError,
            r"one keep for every point, .* got keep=\[0.5, 0.3\] for at=0.5",
        ),
        ({"keep": [0.3, 0.5], "at": [0.2, 0.4]}, SettingError, r"keep must fall"),
        ({"at": "eopch:1"}, SettingError, r"'epoch:N' or 'step:N', got 'eopch:1'"),
        ({"at": 2.0}, SettingError, r"got 2.0; did you mean 'epoch:2'"),
        ({"fisher": "true"}, SettingError, r"'labels' or 'model', got 'true'"),
        ({"also_observe": ["moment"]}, SettingError, r"got 'moment', nearest: \w+_moment"),
        ({"every_n_steps": 0}, SettingError, r"every_n_steps must be a whole number from 1"),
        ({"window": 3}, SettingError, r"window is a fraction .*, got 3; did you mean 'epoch:3'\?"),
        ({"restart_steps": -1}, SettingError, r"restart_steps must not be negative, got -1"),
        ({"restart_scale": 0}, SettingError, r"restart_scale must be above 0 .* got 0"),
        ({"method": "drone", "allocation": "global"}, SettingError, r"'drone' does not know"),
    ],
)
def test_says_what_is_wrong_when_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        factorize(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["*.upp"]}, NoMatchError, r"'\*.upp' matches none .* nearest names: .*up"),
        ({"at": "epoch:3"}, SettingError, r"epoch:3 is step 18, at or beyond the end .*18 steps"),
        ({"at": 0.0}, SettingError, r"leaves no step to observe before it"),
        ({"at": [0.5, "step:9"], "keep": [0.5, 0.2]}, SettingError, r"points must rise"),
        ({"mask": "padding"}, ObservationError, r"'padding', which this batch does not have"),
        (
            {"fisher": "model", "at": "step:9", "window": "step:3"},
            ObservationError,
            r"found no logits",
        ),
        ({"fisher": "model", "logits": "haed"}, NoMatchError, r"nearest: head"),
        ({"targets": ["embed"]}, LayerError, r"layer 'embed' is a Embedding"),
        ({"keep": 0.0001}, SettingError, r"the least keep is"),
        ({"at": [0.2, 0.5], "keep": [0.5, 0.0001]}, SettingError, r"keep=0.0001 leaves .* least"),
    ],
)
def test_says_what_is_wrong_in_a_fit_and_leaves_the_model_whole(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tagger: Make,
    loader: Make,
    trainer: Make,
) -> None:
    model = tagger()
    names = list(model.state_dict())
    run = trainer(factorize(**options))
    with pytest.raises(error, match=message):
        run.fit(model, loader())
    assert run.global_step == 0
    assert list(model.state_dict()) == names
    assert hooks(model) == 0


def test_a_point_in_the_past(tagger: Make, loader: Make, trainer: Make, tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(tagger(), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(SettingError, match=r"step:4 is step 4, which lies in the past: .* step 6"):
        trainer(factorize(at="step:4")).fit(tagger(), loader(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_run_of_unknown_length(tagger: Make, loader: Make, trainer: Make) -> None:
    with pytest.raises(SettingError, match=r"point 0.5 cannot be placed"):
        trainer(factorize(), max_epochs=-1).fit(tagger(), loader())


def test_an_empty_loader(tagger: Make, trainer: Make) -> None:
    with pytest.raises(ObservationError, match=r"factored nothing: .* has no batches"):
        trainer(factorize()).fit(tagger(), torch.utils.data.DataLoader([]))


def test_a_point_that_is_not_reached(tagger: Make, loader: Make, trainer: Make) -> None:
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 4

    with pytest.warns(UserWarning, match=r"did not reach point 0.5: .* step 4, .* was step 9"):
        trainer(factorize(), Enough(), min_epochs=0).fit(tagger(), loader())


def test_a_frozen_layer(tagger: Make, loader: Make, trainer: Make) -> None:
    model = tagger()
    model.blocks[1]["up"].requires_grad_(False)
    with pytest.raises(LayerError, match=r"'blocks.1.up' is frozen: .* exclude="):
        trainer(factorize()).fit(model, loader())
    callback = factorize(exclude=["blocks.1.up"])
    trainer(callback).fit(model, loader())
    assert isinstance(model.blocks[1]["up"], nn.Linear)


def test_a_layer_called_twice(tagger: Make, loader: Make, trainer: Make) -> None:
    model = tagger()
    model.blocks.append(model.blocks[0])
    with pytest.raises(NoMatchError, match=r"also used as .*shared=True"):
        trainer(factorize(targets=["blocks.0.*"])).fit(model, loader())
    callback = factorize(shared=True, targets=["blocks.*"])
    twice = tagger()
    forward = twice.forward

    def again(batch: dict[str, Tensor]) -> Tensor:
        return forward(batch) + twice.blocks[0]["up"](twice.embed(batch["input_ids"])).mean()

    twice.forward = again
    with pytest.raises(ObservationError, match=r"'blocks.0.up' was called twice .* shared=True"):
        trainer(factorize()).fit(twice, loader())
    trainer(callback).fit(twice, loader())
    assert isinstance(twice.blocks[0]["up"], LowRankLinear)


def test_a_checkpoint_of_another_version_or_optimizer(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    run = trainer(factorize(at="epoch:1"))
    run.fit(tagger(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(CheckpointError, match=r"expected Factorize state of version 1, got .* 7"):
        factorize().load_state_dict({"version": 7})
    other = tagger()
    other.configure_optimizers = lambda: torch.optim.AdamW(
        [{"params": list(other.head.parameters())}, {"params": list(other.embed.parameters())}]
    )
    with pytest.raises(CheckpointError, match=r"is only in the checkpoint"):
        trainer(factorize(at="epoch:1"), max_epochs=4).fit(
            other, loader(), ckpt_path=tmp_path / "end.ckpt"
        )


def test_nothing_is_left_when_training_breaks_off(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    step = model.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if model.global_step == 4:
            raise RuntimeError("out of luck")
        return step(batch, batch_idx)

    model.training_step = training_step
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(factorize(every_n_steps=1)).fit(model, loader())
    assert hooks(model) == 0


def test_prints_a_table_at_the_point_and_at_the_end(
    tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(factorize(verbose=True)).fit(tagger(), loader(), loader())
    shown = capsys.readouterr().out
    assert "lrcompress: kfac at step 9" in shown
    assert "what was lost and gained" in shown
    assert "measured change of val_loss" in shown
    assert "val_loss" in shown


def test_preview_says_what_would_happen(tagger: Make, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=120).print(factorize().preview(tagger()))
    shown = capsys.readouterr().out
    assert "layers of blocks.*" in shown
    assert "targeted layers: 2,048 →" in shown
    assert "statistics: at most 0.0 MiB" in shown


def test_a_second_fit_of_the_trainer_goes_on_factored(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    options: dict[str, Any] = {"align": 1, "verbose": False, "report_path": None}
    first = lrcompress.Factorize(0.6, "step:6", **options)
    run, module = trainer(first, max_epochs=2), tagger()
    run.fit(module, loader(), loader())
    structure = lrcompress.Plan.of(module)
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(), loader())
    assert run.global_step == 18
    assert lrcompress.Plan.of(module) == structure
    assert [point.step for point in first.report.points] == [6]
    assert first.report.history["val_loss"][-1][0] == 18
    second = lrcompress.Factorize(0.3, "step:20", **options)  # and a further point of another
    run.callbacks.insert(1, second)
    run.fit_loop.max_epochs = 4
    run.fit(module, loader(), loader())
    assert [point.step for point in second.report.points] == [20]
    pairs = zip(lrcompress.Plan.of(module), structure, strict=True)
    assert all(now.sizes["rank"] < before.sizes["rank"] for now, before in pairs)


class Wrapped(L.LightningModule):
    """A tagger with a test step, as wrapped by users."""

    def __init__(self, model: L.LightningModule) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch), batch["labels"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def test_checkpoints_of_before_and_after_a_point_are_tested_by_the_trainer_that_has_fitted(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    factorize = lrcompress.Factorize(0.5, "epoch:2", align=1, verbose=False, report_path=None)
    run = trainer(factorize, saved, max_epochs=3, enable_checkpointing=True)
    module = Wrapped(tagger())
    run.fit(module, loader())
    done = factorize.report.to_dict()
    for epoch, kind in ((0, nn.Linear), (2, LowRankLinear)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        (found,) = run.test(module, loader(), ckpt_path=path, verbose=False)
        other = Wrapped(tagger())
        lrcompress.Plan.matching(other, torch.load(path)["state_dict"]).apply_(other)
        (expected,) = trainer().test(other, loader(), ckpt_path=path, verbose=False)
        assert found == expected
        assert type(module.model.blocks[0]["up"]) is kind
    assert factorize.report.to_dict() == done
