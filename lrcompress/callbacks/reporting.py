"""Write the report of a run: a table, JSON and HTML files, and figures for the loggers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lrcompress.callbacks import trainer_state
from lrcompress.errors import SettingError
from lrcompress.report import Report
from lrcompress.report.page import write_page
from lrcompress.report.plots import Plot, pixels, plots
from lrcompress.report.tables import summary_table

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


def save_report(trainer: pl.Trainer, report: Report, path: Path | None) -> None:
    """Write the report so far, if there is a file for it and a point was reached."""
    if path is not None and trainer.is_global_zero and report.points:
        report.save(path)


def publish_report(
    trainer: pl.Trainer, report: Report, paths: Iterable[Path | None], *, verbose: bool
) -> None:
    """Show, write and log the report at the end of a run in which a point was reached."""
    if not trainer.is_global_zero or not report.points:
        return
    if verbose:
        trainer_state.print_above_progress(trainer, summary_table(report))
    for path in dict.fromkeys(path for path in paths if path is not None):
        report.save(path)
        page = path.with_suffix(".html")
        write_page(report, page)
        if verbose:
            rank_zero_info(f"lrcompress: the report is in {page}")
    takers = [logger for logger in trainer.loggers if _accepts_images(logger)]
    if takers:
        step = trainer_state.logged_step(trainer)
        for plot in plots(report):
            for logger in takers:
                _log_image(logger, plot, step)


def _accepts_images(logger: Any) -> bool:
    return hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")


def _log_image(logger: Any, plot: Plot, step: int) -> None:
    """Log a figure through ``log_image``, as W&B has it, or through TensorBoard's writer."""
    name, image = f"lrcompress/{plot.name}", pixels(plot.figure)
    if hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)
    else:
        logger.experiment.add_image(name, image, step, dataformats="HWC")
