"""What a run was of, in words: for the reader of its report."""

import os
import sys
import time
from datetime import datetime
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lrcompress import __version__
from lrcompress.callbacks.reporting import warning_if_fails
from lrcompress.report.formatting import duration

_SOURCES = ("name", "config", "train")  # arguments of a data module that say where it is from


def describe_run(
    trainer: pl.Trainer, module: nn.Module, started: float, first: int = 0
) -> dict[str, str]:
    """Return what was run, where, by which versions, and how long it took.

    What cannot be told is left out, with a warning: it is only shown.

    Args:
        trainer: at the end of its fit.
        module: that was trained.
        started: when the fit began, in seconds of ``time.time``.
        first: optimizer steps before it, where it was resumed.
    """
    found: dict[str, str] = {}
    with warning_if_fails("describe the run in its report"):
        found |= _described(trainer, module, started, first)
    return found


def _described(
    trainer: pl.Trainer, module: nn.Module, started: float, first: int
) -> dict[str, str]:
    spent = duration(time.time() - started)
    steps = f"{trainer.global_step:,} steps in {spent}"
    if first:  # of a run that was resumed
        steps = (
            f"{trainer.global_step:,} steps, the last {trainer.global_step - first:,} in {spent}"
        )
    where = f"{trainer.world_size} × {trainer.accelerator.__class__.__name__}"
    found = {
        "model": _model(module),
        "data": _data(trainer),
        "training": f"{steps}, {where}, {trainer.precision}",
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
        "date": datetime.fromtimestamp(started).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "versions": ", ".join(
            [f"lrcompress {__version__}"]
            + [
                f"{x} {version(x)}"
                for x in ("torch", "lightning", "transformers")
                if x in sys.modules
            ]
        ),
    }
    return {what: text for what, text in found.items() if text}


def _model(module: nn.Module) -> str:
    """Return the class of a module, with that of the transformers model in it and its source."""
    inner: Any = next((m for m in module.modules() if hasattr(m, "name_or_path")), None)
    if inner is None:
        return type(module).__name__
    parts = [type(inner).__name__, str(inner.name_or_path or "")]
    return f"{type(module).__name__}: " + ", ".join(filter(None, parts))


def _data(trainer: pl.Trainer) -> str:
    """Return the class of the data module and where it is from, else that of the data set."""
    module: Any = trainer.datamodule  # type: ignore[attr-defined]
    if module is None:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        return "" if dataset is None else type(dataset).__name__
    given = getattr(module, "hparams", {})
    sources = [str(given[key]) for key in _SOURCES if given.get(key)]
    return ": ".join(filter(None, (type(module).__name__, ", ".join(sources))))
