"""latency= in real fits: on the latest observed batch, alike in all processes, said before it."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lrcompress
from lrcompress.errors import SettingError
from lrcompress.report import Report

from .test_ddp import write
from .test_factorize import factorize, hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:lrcompress. latency=0.[7-9]"),  # on a busy machine
]
Make = Callable[..., Any]
RUN = """
fit = Tagger(width=128, dropout=0.0)
callback = lrcompress.Factorize(
    latency=0.7, latency_shape=(16, 64), at=0.5, every_n_steps=1, deal=True, **QUIET)
run = trainer(callback)
run.fit(fit, Loader(parts()), Loader(parts()))
found = callback.report.points[0].latency
torch.save(
    {{"model": fit.state_dict(), "ranks": [x.rank for x in callback.report.points[0].layers],
      "found": vars(found)}},
    f"{{root}}/{{number}}.pt")
"""


def test_a_fine_tune_is_made_as_fast_as_asked(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "report.json")
    callback = factorize(
        keep=None, latency=0.7, latency_shape=(16, 64), report_path=path, verbose=True
    )
    model = tagger(width=128)
    with caplog.at_level(logging.INFO):
        trainer(callback).fit(model, loader(), loader())
    (point,) = callback.report.points
    assert point.latency is not None
    assert point.latency.shape == (16, 64)
    missed = "is missed" in point.note or "cannot be reached" in point.note
    assert 0.4 < point.latency.measured <= 0.7 or missed
    assert point.note.startswith(point.latency.note)
    assert Report.load(path).points[0].latency == point.latency
    assert not hooks(model)
    assert "latency: 0." in caplog.text
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_time_that_cannot_be_reached_leaves_the_run_as_it_was_with_a_warning(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = factorize(keep=None, latency=0.001, restart_steps=4, restart_scale=0.1)
    model = tagger(width=64)
    with pytest.warns(UserWarning, match=r"lrcompress: latency=0.001 cannot be reached, .* stay"):
        trainer(callback).fit(model, loader(), loader())
    dense = tagger(width=64)
    trainer().fit(dense, loader(), loader())
    (point,) = callback.report.points
    assert point.keep == 1
    assert point.note.startswith("latency=0.001 cannot be reached")
    for key, value in dense.state_dict().items():  # nor did the learning rate rise anew
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_run_that_is_resumed_in_the_window_has_its_batch(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"keep": 0.9, "latency": 0.95, "at": "step:5", "every_n_steps": 1}
    first = trainer(factorize(**settings), every_step=tmp_path)
    first.fit(tagger(width=64), loader(), loader())
    callback, there = factorize(**settings), tmp_path / "step=4.ckpt"
    trainer(callback).fit(tagger(width=64), loader(), loader(), ckpt_path=there)
    assert callback.report.points[0].latency is not None


def test_a_distilled_module_is_measured_without_its_teacher(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = lrcompress.Distilled(tagger(width=64))
    callback = factorize(keep=None, latency=0.8)
    trainer(callback).fit(model, loader(), loader())
    assert callback.report.points[0].latency is not None


def test_two_processes_end_alike_and_the_first_decides(launch: Make, tmp_path: Path) -> None:
    launch(write(tmp_path, RUN), 2)
    one, other = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in (0, 1))
    assert one["found"] == other["found"]
    assert one["ranks"] == other["ranks"]
    for key, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][key], rtol=0, atol=0)


def test_the_preview_says_that_sizes_are_measured(tagger: Make) -> None:
    alone = lrcompress.Factorize(latency=0.5, at=0.5)
    both = lrcompress.Factorize(keep=0.4, latency=0.5, at=0.5)
    texts = [lines(one.preview(tagger())) for one in (alone, both)]
    assert "Factorize: kfac, latency 0.5, at 0.5" in texts[0]
    assert "ranks are shown for keep 0.5; measured at the point" in texts[0]
    assert "keep 0.4, at 0.5" in texts[1]
    assert "less where that takes more than 0.5 of the model's time" in texts[1]


def lines(table: Any) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(table)
    return str(console.file.getvalue())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency": 2.0}, "latency must be above 0 and below 1"),
        ({"latency": 0.5, "at": [0.3, 0.6], "keep": [0.5, 0.3]}, r"got at=\[0.3, 0.6\]: give one"),
        (
            {"latency": 0.5, "keep": "auto", "drop": 0.1, "monitor": "val_loss"},
            "got keep='auto': give one point, and keep as a number if at all",
        ),
        ({"latency": 0.5, "method": "svd"}, "refit and latency need batches of observed steps"),
    ],
)
def test_settings_that_exclude_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        lrcompress.Factorize(**settings)


def test_sharded_parameters_are_refused_before_the_first_step(
    tagger: Make, loader: Make, trainer: Make, sharding: Any
) -> None:
    with pytest.raises(SettingError, match="latency puts layers in and takes them out again"):
        trainer(factorize(keep=None, latency=0.5), strategy=sharding).fit(tagger(), loader())
