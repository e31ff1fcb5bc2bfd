"""Every run leaves a report, and tells it once: files, one table, loggers."""

import copy
import csv
import io
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn

import lrcompress
from lrcompress.callbacks.sensitivity import DenseLayers
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.errors import SettingError
from lrcompress.report import Report
from lrcompress.statistics.moments import Statistics

Make = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:You are trying to .self.log.*barebones"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]


def factorize(**kwargs: Any) -> lrcompress.Factorize:
    return lrcompress.Factorize(**({"keep": 0.5, "at": 0.5, "every_n_steps": 2} | kwargs))


def test_a_run_leaves_json_and_a_page_beside_its_logs_and_says_where(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = factorize()
    logger = CSVLogger(tmp_path, name="logs", version=0)
    trainer(callback, logger=logger).fit(tagger(), loader(), loader())
    folder = tmp_path / "logs" / "version_0"
    assert Report.load(folder) == callback.report
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>Tagger</h1>" in page
    assert "<title>Tagger · version_0</title>" in page
    assert capsys.readouterr().out.count("what was lost and gained") == 1
    steps = [step for step, _ in callback.report.history["val_loss"]]
    assert steps == [6, 12, 18]
    assert callback.report.final == {"val_loss": callback.report.history["val_loss"][-1][1]}


def test_without_logs_it_is_in_the_root_folder_or_where_it_was_asked_for(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    trainer(factorize(verbose=False)).fit(tagger(), loader())
    assert {path.name for path in tmp_path.iterdir()} >= {"report.json", "report.html"}
    path = tmp_path / "there" / "mine.json"
    trainer(factorize(verbose=False, report_path=str(path))).fit(tagger(), loader())
    assert {path.name for path in path.parent.iterdir()} == {"mine.json", "mine.html"}


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({"report_path": None}, {}),
        ({}, {"fast_dev_run": 4}),
        ({"report_path": "mine.json"}, {"fast_dev_run": 4}),
        ({}, {"barebones": True, "enable_progress_bar": None, "enable_model_summary": None}),
    ],
    ids=["None", "fast_dev_run", "fast_dev_run with a path", "barebones"],
)
def test_nothing_is_written_where_nothing_should_be(
    options: dict[str, Any],
    run: dict[str, Any],
    tagger: Make,
    loader: Make,
    trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = factorize(verbose=False, at="step:2", window="step:2", every_n_steps=1, **options)
    if "barebones" in run:
        run = run | {"enable_checkpointing": None, "logger": None, "num_sanity_val_steps": None}
    trainer(callback, **run).fit(tagger(), loader(), loader())
    assert callback.report.points
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_json_file_is_refused() -> None:
    with pytest.raises(
        SettingError, match=r"report_path is a file that ends in \.json .*'x\.html'"
    ):
        factorize(report_path="x.html")


def test_two_callbacks_have_one_table_and_one_report(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = factorize(targets=["blocks.0.*"], at=0.3)
    sparse = {"keep": 0.5, "mask_every": 2, "at": 0.4}
    second = lrcompress.LoSparse(targets=["blocks.1.*"], **sparse)
    model = tagger()
    trainer(first, second).fit(model, loader(), loader())
    report = Report.load(tmp_path)
    assert [point.method for point in report.points] == ["kfac", "LoSparse"]
    assert len(report.layers_after(1)) == 4
    assert report.points[1].model_after == sum(p.numel() for p in model.parameters())
    assert set(report.seconds_per_step) == {"dense", "pruning", "factored"}
    assert capsys.readouterr().out.count("what was lost and gained") == 1


@pytest.mark.parametrize("order", [1, -1])
def test_sizes_before_are_those_of_the_model_before_that_change(
    order: int, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    sparse = {"keep": 0.5, "mask_every": 2, "at": "step:3", "window": "step:2", "init": "kfac"}
    held = {"keep": 0.5, "at": "step:3", "window": "step:2", "verbose": False}
    callbacks = [
        lrcompress.LoSparse(targets=["blocks.0.*"], **sparse),
        lrcompress.FactorizeEmbedding(targets=["embed"], rank=4, **(held | {"keep": None})),
        factorize(targets=["blocks.1.*"], at="step:17", verbose=False),
    ][::order]
    model = tagger()
    sizes = [sum(p.numel() for p in model.parameters())]
    logger = CSVLogger(tmp_path / "logs")
    trainer(*callbacks, logger=logger, log_every_n_steps=1).fit(model, loader(), loader())

    embedding, losparse, last = report = Report.load(logger.log_dir).points
    assert [point.step for point in report][::2] == [3, 17]
    assert embedding.model_before == sizes[0]  # not that of the layers being pruned
    sizes.append(sizes[0] - 20 * 16 + sum(x.after for x in embedding.layers))
    assert losparse.model_before == sizes[1]
    assert last.model_before == losparse.model_after
    assert last.model_after == sum(p.numel() for p in model.parameters())
    assert all(x.bytes_before == 4 * x.model_before for x in report)
    logged = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    shares = [float(x) for row in logged if (x := row.get("lrcompress/keep_model"))]
    assert shares[-1] == pytest.approx(last.model_after / sizes[0])


def test_a_second_fit_counts_from_the_model_it_begins_with(
    tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model, first = tagger(), factorize(verbose=False, report_path=None)
    trainer(first).fit(model, loader(), loader())
    before = sum(p.numel() for p in model.parameters())
    callback = factorize(keep=0.3, report_path=None)
    rich.print(callback.preview(model))
    planned = capsys.readouterr().out
    trainer(callback).fit(model, loader(), loader())
    (point,), after = callback.report.points, sum(p.numel() for p in model.parameters())
    assert (point.model_before, point.model_after) == (before, after)
    assert (point.bytes_before, point.bytes_after) == (4 * before, 4 * after)
    stood = [x.after for x in first.report.points[0].layers]
    assert [x.start for x in point.layers] == stood
    assert sum(stood) - sum(x.after for x in point.layers) == before - after
    assert f"whole model: {before:,} → " in planned
    shown = capsys.readouterr().out
    assert re.search(rf"targeted parameters +{sum(stood):,} ", shown)
    assert f"the whole model {after / before:.3f} of its parameters" in shown


def test_losparse_tells_its_budget_and_the_scores_it_chose_by(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    callback = lrcompress.LoSparse(keep=0.4, mask_every=2, verbose=False)
    trainer(callback).fit(tagger(), loader(), loader())
    (point,) = Report.load(tmp_path).points
    steps, kept = zip(*point.budget, strict=True)
    assert list(steps) == sorted(steps)
    assert steps[-1] < point.step
    assert all(later <= before for before, later in itertools.pairwise(kept))
    assert kept[0] > kept[-1] >= point.keep
    for layer in point.layers:
        count, scores = zip(*layer.importance, strict=True)
        assert (count[0], count[-1]) == (1, layer.out_features)
        assert list(scores) == sorted(scores, reverse=True)
        assert scores[0] > 0
    assert point.bytes_after == 4 * point.model_after


def test_a_resumed_run_tells_the_same_story(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def sparse() -> lrcompress.LoSparse:
        return lrcompress.LoSparse(keep=0.4, mask_every=2, verbose=False)

    whole = sparse()
    trainer(whole, every_step=True).fit(tagger(), loader(), loader())
    resumed = sparse()
    run = trainer(resumed, default_root_dir=tmp_path / "again")
    run.fit(tagger(), loader(), loader(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)
    one, other = whole.report.to_dict(), resumed.report.to_dict()
    assert ", the last 10 in " in other["about"]["training"]  # type: ignore[index, operator]
    for told in (one, other):  # all but the times, and what they are of
        told.pop("seconds_per_step")
        told["points"][0].pop("seconds")  # type: ignore[index]
        del told["about"]["date"]  # type: ignore[attr-defined]
        told["about"]["training"] = re.sub(
            r"(, the last 10)? in \d+ s,", ",", told["about"]["training"]
        )  # type: ignore[index, call-overload]
    assert one == other
    assert json.dumps(one)


def test_training_that_stops_early_leaves_no_stale_figures(
    tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = factorize(at="step:8", report_path=None)
    trainer(callback, max_steps=10, max_epochs=-1).fit(tagger(), loader(), loader())
    assert callback.report.final == {}
    assert [step for step, _ in callback.report.history["val_loss"]] == [6]
    assert "not validated after the last point" in capsys.readouterr().out


def test_every_one_of_several_validation_loaders_is_in_the_report(
    tagger: Make, loader: Make, batches: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tagger()
    loss, validated = nn.functional.cross_entropy, []

    def validation_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        model.log("val_loss", loss(model(batch), batch["labels"]))
        model.log(f"own{dataloader_idx}", float(batch_idx), add_dataloader_idx=False)

    def on_validation_epoch_end() -> None:
        model.log("rounds", float(len(validated)))
        validated.append(model.training)

    model.validation_step = validation_step
    model.on_validation_epoch_end = on_validation_epoch_end
    both = [loader(), loader(batches(3, seed=1))]
    callback = factorize(report_path=None, measure_layers=True)
    run = trainer(callback)
    run.fit(model, loader(), both)

    losses = ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    names = {*losses, "own0", "own1", "rounds"}
    report = callback.report
    (point,) = report.points
    assert {*point.metrics["before"]} == {*point.metrics["after"]} == {*report.final} == names
    assert {*report.history} == names
    assert all([step for step, _ in curve] == [6, 12, 18] for curve in report.history.values())
    for name in losses:
        assert (
            report.final[name] == report.history[name][-1][1] == float(run.callback_metrics[name])
        )
    assert report.final[losses[0]] != report.final[losses[1]]
    assert (report.final["own0"], report.final["own1"]) == (2.5, 1.0)
    alone = [L.Trainer.validate(trainer(), model, one, verbose=False)[0] for one in both]
    assert [report.final[name] for name in losses] == pytest.approx([x["val_loss"] for x in alone])
    shown = capsys.readouterr().out
    assert "not validated" not in shown
    for name in losses:
        assert f"measured change of {name}" in shown


def test_measured_layers_are_each_alone_and_the_model_ends_the_same(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    models = {}
    for measure in (False, True):
        callback = factorize(verbose=False, report_path=None, measure_layers=measure)
        models[measure] = tagger(dropout=0.0)
        trainer(callback).fit(models[measure], loader(), loader())
    one, other = (model.state_dict() for model in models.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
    (point,) = callback.report.points
    measured = [layer.measured_loss for layer in point.layers if layer.rank]
    assert len(measured) >= 3
    assert all(isinstance(value, float) for value in measured)


def test_what_a_layer_loses_alone_is_the_loss_of_the_dense_model_with_that_layer(
    tagger: Make, loader: Make, trainer: Make, batches: Make
) -> None:
    def loss(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(model(x), x["labels"]) for x in batches()]
        return float(torch.stack(losses).mean())

    found: dict[str, float] = {}
    expected: dict[str, float] = {}

    class Measure(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            settings = Settings(method="svd", keep=0.4)
            start = copy.deepcopy(pl_module)
            dense = DenseLayers(pl_module, settings.select(pl_module).names)
            record = factor_(pl_module, Statistics(), settings)
            for name in dense.layers:  # biases are refitted by the methods that know the inputs
                pl_module.get_submodule(name).bias.data.add_(0.1)
            end = copy.deepcopy(pl_module)
            found.update(dense.loss_increases(trainer, pl_module, record.layers))
            for name in dense.layers:
                alone = copy.deepcopy(start)
                alone.get_submodule(name).load_state_dict(
                    {x: getattr(end.get_submodule(name), x) for x in ("weight", "bias")}
                )
                expected[name] = loss(alone) - loss(start)
            now, then = pl_module.state_dict(), end.state_dict()
            assert all(torch.equal(now[key], then[key]) for key in then)
            assert now.keys() == then.keys()

    trainer(Measure(), max_steps=1).fit(tagger(), loader(), loader())
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(found) == 4
    assert min(map(abs, found.values())) > 1e-4


class Album(Logger):
    """A logger with a writer that takes images as TensorBoard's does."""

    name, version = "album", 0

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, tuple[Any, int, str]] = {}

    @property
    def experiment(self) -> "Album":
        return self

    def add_image(self, name: str, image: Any, step: int, dataformats: str) -> None:
        self.images[name] = (image, step, dataformats)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    log_hyperparams = log_metrics


def test_a_logger_that_takes_images_gets_the_figures(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    album = Album()
    callback = factorize(verbose=False, report_path=None)
    trainer(callback, logger=album).fit(tagger(), loader(), loader())
    assert {"lrcompress/ranks", "lrcompress/budget", "lrcompress/curves0"} <= album.images.keys()
    for image, step, order in album.images.values():
        assert (image.shape[1:], str(image.dtype)) == ((500, 3), "uint8")
        assert (step, order) == (18, "HWC")


def test_tensorboard_has_the_figures(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX", reason="an optional logger, not among the test tools")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = factorize(verbose=False)
    trainer(callback, logger=logger).fit(tagger(), loader(), loader())
    assert (tmp_path / "report.html").exists()
    (events,) = tmp_path.glob("events.*")
    data = events.read_bytes()
    assert b"lrcompress/ranks" in data
    assert data.count(b"\x89PNG") >= 5


def test_a_folder_that_cannot_be_written_ends_no_run(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("a file, and no folder")
    callback = factorize(verbose=False)
    run = trainer(callback, default_root_dir=plain / "below")
    with pytest.warns(UserWarning, match="could not write the report .*NotADirectory") as told:
        run.fit(tagger(), loader(), loader())
    (said,) = {str(one.message) for one in told if "lrcompress" in str(one.message)}
    assert said.startswith(f"lrcompress could not write the report {plain / 'below'}")
    assert "Not a directory" in said
    assert run.global_step == 18
    assert len(callback.report.points) == 1
    assert callback.report.final


def test_the_same_failure_is_shown_once(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    run = trainer(factorize(verbose=False), default_root_dir=tmp_path / "plain" / "below")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # as python begins
        run.fit(tagger(), loader(), loader())
    assert sum("could not write" in str(one.message) for one in told) == 1


@pytest.mark.parametrize("bar", [False, True], ids=["alone", "above a bar"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_that_lacks_characters_shows_others(
    encoding: str,
    bar: bool,
    tagger: Make,
    loader: Make,
    trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    callback = factorize(report_path=None)
    above = [TQDMProgressBar()] if bar else []  # Lightning's other one needs "•" for itself
    trainer(callback, *above, enable_progress_bar=bar).fit(tagger(), loader(), loader())
    sys.stdout.flush()
    text = shown.getvalue().decode(encoding)
    assert ("32x16" if encoding == "ascii" else "32×16") in text
    assert "what was lost and gained" in text
    assert len(callback.report.points) == 1


class Broken(Logger):
    """A logger whose service is down."""

    name, version = "broken", 0

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("lrcompress/") for name in metrics):
            raise self.error

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_image(self, name: str, images: Any, step: int) -> None:
        raise self.error


class Closed(io.StringIO):
    """A console that is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def done_at_a_point(callback: lrcompress.Factorize) -> tuple[int, int, int, int]:
    state = callback.state_dict()
    statistics = state["observation"]["statistics"]
    seen = len(statistics["inputs"]) + len(statistics["outputs"])
    return state["stage"], len(callback.report.points), len(state["report"]["points"]), seen


def test_loggers_and_consoles_that_fail_end_no_run_and_are_named(
    tagger: Make, loader: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    album, callback = Album(), factorize(report_path=None)
    run = trainer(callback, logger=[Broken(ConnectionError("service is down")), album])
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.warns(UserWarning, match="lrcompress could not") as told:
        run.fit(tagger(), loader(), loader())
    said = [str(one.message) for one in told if "lrcompress could not" in str(one.message)]
    starts = ["print the table of a point", "log lrcompress/", "print the table of the run"]
    starts += ["log figures of the report to Broken"]
    for start, text in zip(starts, said, strict=True):
        assert text.startswith(f"lrcompress could not {start}")
    assert said[1].endswith("to Broken, and goes on without: ConnectionError: service is down")
    assert album.images  # another logger gets its figures
    assert run.global_step == 18
    assert done_at_a_point(callback) == (1, 1, 1, 0)


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_an_interrupt_while_a_point_is_told_passes_and_finds_it_recorded(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = factorize(verbose=False, report_path=None)
    run = trainer(callback, logger=Broken(KeyboardInterrupt()))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(tagger(), loader(), loader())
    assert run.global_step == 9
    assert done_at_a_point(callback) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    "make",
    [
        factorize,
        lambda **options: lrcompress.FactorizeEmbedding(keep=0.5, every_n_steps=2, **options),
        lambda **options: lrcompress.LoSparse(keep=0.4, mask_every=2, **options),
        lambda **options: lrcompress.DSEE(keep=0.4, rank=2, entries=5, updates=["*.up"], **options),
    ],
    ids=["Factorize", "FactorizeEmbedding", "LoSparse", "DSEE"],
)
def test_a_validation_that_fails_after_a_point_raises_and_finds_it_recorded(
    make: Make, tagger: Make, loader: Make, trainer: Make
) -> None:
    callback, model = make(verbose=False, report_path=None), tagger()
    validate = model.validation_step

    def fails(batch: Any, batch_idx: int) -> None:
        validate(batch, batch_idx)
        if callback.report.points:
            raise RuntimeError("no memory is left")

    model.validation_step = fails
    with pytest.raises(RuntimeError, match="no memory is left"):
        trainer(callback, check_val_every_n_epoch=9).fit(model, loader(), loader())
    stage, points, saved, seen = done_at_a_point(callback)
    assert (stage, points, saved, seen) == (len(callback.points), 1, 1, 0)
