"""Callbacks that unfreeze layers while a fit runs, such as Lightning's BackboneFinetuning."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lrcompress.callbacks.trainer_state import class_names


def finetuning_callbacks(trainer: pl.Trainer) -> list[Any]:
    """Return the callbacks of the trainer that are of Lightning's ``BaseFinetuning``."""
    every = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in every if "BaseFinetuning" in class_names(type(one))]


def frozen_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are frozen."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def resume_unfrozen_(
    trainer: pl.Trainer, module: nn.Module, frozen: Collection[str] | None
) -> None:
    """Train again what was trained when the checkpoint was written.

    ``BaseFinetuning`` freezes its modules at the start of every fit and unfreezes them at the
    start of an epoch: a run resumed after that would train them no more. Its groups of parameters
    are restored now, so that they can be compared with those of the checkpoint.

    Args:
        trainer: whose callbacks are asked; without such a callback nothing is done.
        module: as it is in the checkpoint.
        frozen: names of the parameters that are frozen in the checkpoint; None where it does not
            say, and they are left as they are.
    """
    callbacks = finetuning_callbacks(trainer)
    for callback in callbacks:
        callback.on_fit_start(trainer, module)  # what it does once, and not again after us
    if callbacks and frozen is not None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)


def rename_unfrozen_(trainer: pl.Trainer, module: nn.Module) -> None:
    """Let these callbacks know the parameters of a new structure, which they keep by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for callback in finetuning_callbacks(trainer):
        held = callback._internal_optimizer_metadata
        for number in held:
            groups = trainer.optimizers[number].param_groups
            held[number] = callback._apply_mapping_to_param_groups(groups, names)
