"""What a language model writes before layers are replaced and at the end, for the report.

A module that has a method ``sample_texts()``, which returns prompts and what the model writes after
each of them, is asked at both times. :class:`~lrcompress.tasks.LanguageModelling` has it.
"""

from collections.abc import Mapping

import lightning.pytorch as pl

from lrcompress.callbacks.reporting import warning_if_fails
from lrcompress.distributed import Processes
from lrcompress.engine.block_runs import evaluating
from lrcompress.engine.passes import random_state_kept
from lrcompress.report import Report, SampleText


def sample_before(
    report: Report, trainer: pl.Trainer, module: pl.LightningModule, processes: Processes
) -> None:
    """Add what the model writes now to the report of a run, before its first point."""
    texts = _texts(trainer, module, processes)
    report.samples = [SampleText(prompt, text) for prompt, text in texts.items()]


def sample_after(
    report: Report, trainer: pl.Trainer, module: pl.LightningModule, processes: Processes
) -> None:
    """Add what the model writes now to samples that were taken before its first point."""
    if report.samples:
        texts = _texts(trainer, module, processes)
        for sample in report.samples:
            sample.after = texts.get(sample.prompt, "")


def _texts(
    trainer: pl.Trainer, module: pl.LightningModule, processes: Processes
) -> Mapping[str, str]:
    """Return prompts and what the model writes, in the first process; nothing elsewhere.

    Nothing is asked in trial runs, nor where each process has a part of the model alone.
    """
    texts: dict[str, str] = {}
    ask = getattr(module, "sample_texts", None)
    alone = processes.sharded or not trainer.is_global_zero
    if ask is None or alone or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return texts
    with (
        warning_if_fails("sample what the model writes"),
        evaluating(module),
        random_state_kept(module),
        trainer.precision_plugin.forward_context(),
    ):
        texts |= {str(prompt): str(text) for prompt, text in ask().items()}
    return texts
