"""``lrcompress plan``: what a recipe would do, without training."""

from dataclasses import replace
from pathlib import Path

import rich
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lrcompress.callbacks.between_fits import load_weights_
from lrcompress.callbacks.dry_run import dry_run, observe_batches
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.engine.loss_curves import loss_curves
from lrcompress.engine.settings import Settings
from lrcompress.errors import RecipeError
from lrcompress.objective import LOW_RANK, METHODS
from lrcompress.report.plots import loss_curves_figure
from lrcompress.report.tables import loss_curves_table
from lrcompress.structure.checkpoint import read_lightning_checkpoint


def print_plan(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    curve: int | None = None,
    plot: str | None = None,
) -> None:
    """Print which layers each callback of the recipe would replace.

    The checks of a fit are made too. With ``curve``, also print the predicted loss of every
    method at several ``keep``.

    Args:
        trainer: with the recipe's callbacks.
        model: of the recipe.
        datamodule: of the recipe.
        ckpt_path: checkpoint whose weights the model gets.
        curve: training batches to observe.
        plot: file for a figure of the curve, of any type that matplotlib writes.

    Raises:
        RecipeError: if no callback has a ``preview``, or none that could be given a curve.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    planners = [callback for callback in callbacks if hasattr(callback, "preview")]
    compressing = [callback for callback in planners if isinstance(callback, CompressionCallback)]
    if not planners:
        found = ", ".join(type(callback).__name__ for callback in callbacks)
        raise RecipeError(
            f"trainer.callbacks: expected one that replaces layers, such as lrcompress.Factorize, "
            f"found {found or 'none'}"
        )
    if curve is not None and (curve < 1 or not compressing):
        raise RecipeError(
            "curve: expected a number of training batches from 1, and a callback such as "
            f"lrcompress.Factorize in the recipe; got {curve!r}"
        )
    if ckpt_path is not None:
        load_weights_(model, read_lightning_checkpoint(Path(ckpt_path)), str(ckpt_path))
    for callback in compressing:  # before any data is read
        callback.preview(model)
    if compressing:
        dry_run(trainer, model, datamodule=datamodule)
    for callback in planners:
        rich.print(callback.preview(model))
    for callback in compressing if curve is not None else ():
        assert curve is not None
        _print_curve(trainer, model, datamodule, callback, curve, plot)


def _print_curve(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    callback: CompressionCallback,
    curve: int,
    plot: str | None,
) -> None:
    kinds = tuple(dict.fromkeys(kind for one in METHODS.values() for kind in one.kinds))
    sampling = replace(callback.sampling, kinds=kinds, max_tokens=None)
    settings = callback.settings_at(0)
    if not isinstance(settings, Settings):  # a table has one method, and no others beside it
        return
    statistics = observe_batches(trainer, model, settings, sampling, curve, datamodule=datamodule)
    found = loss_curves(model, statistics, settings, LOW_RANK)
    rich.print(loss_curves_table(found, f"from {statistics.tokens:,} tokens of {curve} batches"))
    if plot is not None:
        loss_curves_figure(found).savefig(plot)
