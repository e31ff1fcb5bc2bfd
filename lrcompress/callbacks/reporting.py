"""Tell what a run does: tables on the console, JSON and HTML files, figures for the loggers.

What is told is recorded already, in the callback's ``report``: where telling fails, as in a
read-only folder, there is a warning and training goes on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console, RenderableType
from torch import nn
from tqdm import tqdm

from lrcompress.callbacks import trainer_state
from lrcompress.engine.progress import Track, untracked
from lrcompress.errors import SettingError
from lrcompress.report import PointRecord, Report
from lrcompress.report.formatting import printable
from lrcompress.report.page import write_page
from lrcompress.report.plots import Plot, pixels, plots
from lrcompress.report.tables import WIDTH, point_table, summary_table
from lrcompress.schedules import Point
from lrcompress.structure.surgery import unknown_state

AUTO = "auto"


def check_report_path(report_path: str | None) -> None:
    """Check the path of a report.

    Raises:
        SettingError: if it is not None, ``"auto"`` or a ``.json`` file.
    """
    if report_path not in (None, AUTO) and Path(str(report_path)).suffix != ".json":
        raise SettingError(
            f"report_path is a file that ends in .json (the page goes beside it), 'auto' or None; "
            f"got {report_path!r}"
        )


def report_file(trainer: pl.Trainer, report_path: str | None) -> Path | None:
    """Return the file for the report of a run, or None if none is to be written.

    ``"auto"`` is ``report.json`` in the folder of the first logger, without one in the trainer's
    ``default_root_dir``; where that is no local folder, nothing is written, and neither in trial
    runs. A collective call.
    """
    folder = trainer.log_dir or trainer.default_root_dir  # in every process, for it is a broadcast
    if report_path is None or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
        return None
    if report_path != AUTO:
        return Path(report_path)
    return None if "://" in str(folder) else Path(folder) / "report.json"


def tell(message: str) -> None:
    """Say in one line what is being done, in the first process."""
    rank_zero_info(f"lrcompress: {message}")


@contextmanager
def warning_if_fails(what: str) -> Iterator[None]:
    """Turn an exception of the block into a warning of what failed and why.

    For what shows, writes or logs a result, never for what makes it.
    """
    try:
        yield
    except Exception as error:
        # attributed to this line, so that the same warning is shown once a process
        rank_zero_warn(
            f"lrcompress could not {what}, and goes on without: {type(error).__name__}: {error}"
        )


def dropped_state(trainer: pl.Trainer, module: nn.Module, names: Iterable[str]) -> str:
    """Return, and warn, which optimizers' state is lost where layers are replaced; or ``""``."""
    weights = [p for name in names for p in module.get_submodule(name).parameters() if p.ndim > 1]
    kept = [(type(one).__name__, unknown_state(one, weights)) for one in trainer.optimizers]
    told = [
        f"{name} keeps {', '.join(keys)}, which no rule carries over to new parameters: these "
        "start without state"
        for name, keys in kept
        if keys
    ]
    for one in told:
        rank_zero_warn(f"lrcompress: {one}")
    return "; ".join(told)


def warn_of_missed(
    trainer: pl.Trainer, owner: object, points: Sequence[Point], steps: Sequence[int], done: int
) -> None:
    """Warn of the first point that a run has not reached, if there is one.

    Where a finished run was loaded and did not start, there are no steps, and nothing is missed.
    """
    if done < len(steps):
        rank_zero_warn(
            f"{type(owner).__name__} did not reach point {points[done]}: training ended at step "
            f"{trainer_state.steps_done(trainer)}, the point was step {steps[done]}"
        )


def tell_point(trainer: pl.Trainer, record: PointRecord, whole: int, *, verbose: bool) -> None:
    """Show and log what a point did to a model of ``whole`` parameters before the first of all."""
    if verbose and trainer.is_global_zero:
        with warning_if_fails("print the table of a point"):
            print_table(point_table(record, whole), trainer.progress_bar_callback)
    with warning_if_fails("log the figures of a point"):
        log_figures(trainer, record.figures(whole))


def log_figures(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log metrics to every logger, under ``lrcompress/``; where one fails, with a warning."""
    named = {f"lrcompress/{name}": value for name, value in values.items()}
    for logger in trainer.loggers:
        with warning_if_fails(f"log {', '.join(named)} to {type(logger).__name__}"):
            logger.log_metrics(dict(named), step=trainer_state.logged_step(trainer))


def print_table(table: RenderableType, bar: Any = None) -> None:
    """Print a table in characters that the console has, above a progress bar that is running."""
    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = max(console.width, WIDTH)
    with console.capture() as capture:
        console.print(table)
    text = printable(capture.get(), console.encoding)
    if bar is not None:
        bar.print(text.rstrip())
    elif text == capture.get():
        console.print(table)
    else:
        console.out(text, end="", highlight=False)


def save_report(trainer: pl.Trainer, report: Report, path: Path | None) -> None:
    """Write the report so far, if there is a file for it and a point was reached."""
    if path is not None and trainer.is_global_zero and report.points:
        with warning_if_fails(f"write the report {path}"):
            report.save(path)


def publish_report(
    trainer: pl.Trainer, report: Report, paths: Iterable[Path | None], *, verbose: bool
) -> None:
    """Show, write and log the report at the end of a run in which a point was reached."""
    if not trainer.is_global_zero or not report.points:
        return
    if verbose:
        with warning_if_fails("print the table of the run"):
            print_table(summary_table(report))  # a bar that has ended would swallow it
    for path in dict.fromkeys(path for path in paths if path is not None):
        with warning_if_fails(f"write the report {path}"):
            report.save(path)
            page = path.with_suffix(".html")
            write_page(report, page)
            if verbose:
                rank_zero_info(f"lrcompress: the report is in {page}")
    drawn: list[Plot] = []
    for logger in trainer.loggers:
        with warning_if_fails(f"log figures of the report to {type(logger).__name__}"):
            if _accepts_images(logger):
                drawn = drawn or plots(report)
                for plot in drawn:
                    _log_image(logger, plot, trainer_state.logged_step(trainer))


def _accepts_images(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")


def _log_image(logger: Any, plot: Plot, step: int) -> None:
    """Log a figure through ``log_image``, as W&B has it, or through TensorBoard's writer."""
    name, image = f"lrcompress/{plot.name}", pixels(plot.figure)
    if hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)
    else:
        logger.experiment.add_image(name, image, step, dataformats="HWC")


def progress_bar(trainer: pl.Trainer, *, verbose: bool) -> Track:
    """Return what shows how far a point is, among the trainer's own progress bars.

    It shows nothing unless ``verbose``, where the trainer shows none, and without a terminal.
    """
    if not verbose:
        return untracked
    bar = trainer.progress_bar_callback

    def shown(names: Sequence[str], what: str) -> Iterator[str]:
        said = f"lrcompress: {what}"
        rich = getattr(bar, "progress", None) if isinstance(bar, RichProgressBar) else None
        if bar is None or getattr(bar, "is_disabled", False):
            yield from names
        elif rich is None:
            yield from tqdm(names, desc=said, unit="layer", leave=False, disable=None)
        else:  # two kinds of bars would write over each other
            task = rich.add_task(said, total=len(names))
            try:
                for name in names:
                    yield name
                    rich.update(task, advance=1, refresh=True)
            finally:
                rich.remove_task(task)

    return shown
