"""``lrcompress plan``: what a recipe would do, without training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import rich
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lrcompress.callbacks import Factorize
from lrcompress.callbacks.between_fits import load_weights_
from lrcompress.callbacks.dry_run import dry_run, measure_curve, observe_batches
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.engine.loss_curves import KEEPS, loss_curves
from lrcompress.engine.settings import Settings
from lrcompress.errors import RecipeError, nearest_hint
from lrcompress.objective import LOW_RANK, METHODS
from lrcompress.report.plots import loss_curves_figure, measured_curve_figure
from lrcompress.report.tables import loss_curves_table, measured_curve_table
from lrcompress.structure.checkpoint import read_lightning_checkpoint


def print_plan(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    curve: int | None = None,
    plot: str | None = None,
    measure: bool | Sequence[str] = False,
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
        measure: measure the method of the recipe, or those that are named, on the validation data
            at every ``keep``, in place of predicting for all methods.

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
    _check_curve(compressing, curve, measure)
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
        if measure:
            methods = () if measure is True else tuple(measure)
            _print_measured(trainer, model, datamodule, callback, curve, plot, methods)
        else:
            _print_curve(trainer, model, datamodule, callback, curve, plot)


def _check_curve(
    compressing: Sequence[CompressionCallback], curve: int | None, measure: bool | Sequence[str]
) -> None:
    if curve is not None and (curve < 1 or not compressing):
        raise RecipeError(
            "curve: expected a number of training batches from 1, and a callback such as "
            f"lrcompress.Factorize in the recipe; got {curve!r}"
        )
    if measure and (curve is None or not any(map(_is_measurable, compressing))):
        raise RecipeError(
            "measure: expected --curve beside it, the number of training batches to solve from, "
            "such as --curve=16, and an lrcompress.Factorize in the recipe of a method of "
            f"{', '.join(LOW_RANK)}"
        )
    for method in () if isinstance(measure, bool) else measure:
        if method not in LOW_RANK:
            raise RecipeError(
                f"measure: expected true, or methods of {', '.join(LOW_RANK)}; got {method!r}"
                f"{nearest_hint(method, LOW_RANK)}"
            )


def _print_curve(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    callback: CompressionCallback,
    curve: int,
    plot: str | None,
) -> None:
    kinds = tuple(dict.fromkeys(kind for one in METHODS.values() for kind in one.kinds))
    sampling = replace(callback.sampling, kinds=kinds, max_tokens=None, turns=1)
    settings = callback.settings_at(0)
    if not isinstance(settings, Settings):  # a table has one method, and no others beside it
        return
    statistics = observe_batches(trainer, model, settings, sampling, curve, datamodule=datamodule)
    found = loss_curves(model, statistics, settings, LOW_RANK)
    rich.print(loss_curves_table(found, f"from {statistics.tokens:,} tokens of {curve} batches"))
    if plot is not None:
        loss_curves_figure(found).savefig(plot)


def _is_measurable(callback: CompressionCallback) -> bool:
    return isinstance(callback, Factorize) and callback.settings[0].method in LOW_RANK


def _print_measured(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    callback: CompressionCallback,
    curve: int,
    plot: str | None,
    methods: Sequence[str],
) -> None:
    if not _is_measurable(callback):
        return
    settings = callback.settings_at(0)
    assert isinstance(settings, Settings)
    methods = tuple(dict.fromkeys(methods)) or (settings.method,)
    kinds = [*callback.sampling.kinds, *(x for name in methods for x in METHODS[name].kinds)]
    sampling = replace(
        callback.sampling, kinds=tuple(dict.fromkeys(kinds)), max_tokens=None, turns=1
    )
    given = (settings, sampling, curve, methods, KEEPS)
    found = measure_curve(trainer, model, *given, datamodule=datamodule)
    rich.print(measured_curve_table(found, f"{', '.join(methods)}, from {curve} batches"))
    if plot is not None:
        measured_curve_figure(found).savefig(plot)
