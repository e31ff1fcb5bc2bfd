"""What takes long at a point is shown among the trainer's own progress bars."""

import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

import lrcompress
from lrcompress.errors import NotFiniteError

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*Consider increasing the value of the")


class Terminal:
    """Text that was written to a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


class Recorded(RichProgressBar):
    """Knows which bars there were, and how far each came."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        progress, seen = self.progress, self.shown
        assert progress is not None
        update = progress.update

        def watched(task: Any, **given: Any) -> None:
            update(task, **given)
            seen[progress._tasks[task].description] = progress._tasks[task].completed

        progress.update = watched  # type: ignore[method-assign]


def fit(tagger: Make, loader: Make, trainer: Make, *bars: Any, **given: Any) -> None:
    defaults: dict[str, Any] = {"keep": 0.5, "every_n_steps": 2, "refit": 0.5, "report_path": None}
    callback = lrcompress.Factorize(**(defaults | given))
    run = trainer(callback, *bars, enable_progress_bar=bool(bars))
    run.fit(tagger(), loader(), loader())
    assert len(callback.report.points) == 1


@pytest.mark.filterwarnings("ignore:lrcompress. latency=0.9 cannot be reached")  # so small a model
@pytest.mark.parametrize("verbose", [True, False])
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_shows_what_is_solved_timed_refitted_and_measured(
    bar: bool,
    verbose: bool,
    tagger: Make,
    loader: Make,
    trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = [TQDMProgressBar()] if bar else []
    fit(tagger, loader, trainer, *bars, measure_layers=True, verbose=verbose)
    fit(tagger, loader, trainer, *bars, keep=None, latency=0.9, verbose=verbose)
    for what in ("solving", "timing", "refitting", "measuring"):
        assert (f"lrcompress: {what}" in terminal.text) == (bar and verbose)


@pytest.mark.parametrize("verbose", [True, False])
@pytest.mark.parametrize(
    "callback",
    [
        lambda verbose: lrcompress.LoSparse(keep=0.5, report_path=None, verbose=verbose),
        lambda verbose: lrcompress.DSEE(
            keep=0.5, rank=1, entries=4, updates=["*.up"], report_path=None, verbose=verbose
        ),
    ],
)
def test_other_callbacks_show_what_they_solve(
    callback: Callable[[bool], Any],
    verbose: bool,
    tagger: Make,
    loader: Make,
    trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = trainer(callback(verbose), TQDMProgressBar(), enable_progress_bar=True)
    run.fit(tagger(), loader(), loader())
    assert ("lrcompress: solving" in terminal.text) == verbose


def test_a_bar_of_rich_has_them_as_tasks_that_end(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    bar = Recorded()
    fit(tagger, loader, trainer, bar)
    layers, blocks = bar.shown["lrcompress: solving"], bar.shown["lrcompress: refitting"]
    assert layers > blocks > 0
    assert bar.progress is not None
    assert not [x for x in bar.progress.tasks if x.description.startswith("lrcompress")]


def test_no_task_of_a_point_that_failed_is_left(tagger: Make, loader: Make, trainer: Make) -> None:
    class Spoilt(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                pl_module.blocks[1]["up"].weight.data.fill_(float("nan"))

    bar = Recorded()
    callback = lrcompress.Factorize(keep=0.5, at="step:9", method="svd", report_path=None)
    with pytest.raises(NotFiniteError):
        trainer(callback, bar, Spoilt(), enable_progress_bar=True).fit(tagger(), loader(), loader())
    assert bar.shown["lrcompress: solving"] >= 1
    assert bar.progress is not None
    assert not [x for x in bar.progress.tasks if x.description.startswith("lrcompress")]


def test_without_a_terminal_nothing_is_shown(
    tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tagger, loader, trainer, TQDMProgressBar())
    assert "lrcompress: solving" not in capsys.readouterr().err
