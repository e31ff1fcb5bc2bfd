"""Batches of observed steps, kept on the host, and the training step run on them once more."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lrcompress.distributed import Processes
from lrcompress.engine.passes import Passes
from lrcompress.errors import SettingError
from lrcompress.statistics.masks import MaskSource, batch_decoder_mask, batch_mask


class KeptBatches:
    """The latest batches of observed steps, at least so many tokens if there were as many.

    Args:
        tokens: how many; 0 keeps nothing.

    Example:
        >>> import torch
        >>> kept = KeptBatches(20)
        >>> for number in range(5):
        ...     kept.hold({"input_ids": torch.full((2, 4), number)}, None, steps=number)
        ...     kept.settle(number + 1)
        >>> [int(batch["input_ids"][0, 0]) for batch in kept.batches]
        [2, 3, 4]
    """

    def __init__(self, tokens: int) -> None:
        self.limit = tokens
        self._held: deque[tuple[int, Any]] = deque()
        self._next: tuple[int, int, Any] | None = None  # steps before it, its tokens, and a batch

    @property
    def batches(self) -> list[Any]:
        """The batches, oldest first, their tensors on the CPU."""
        return [batch for _, batch in self._held]

    def hold(self, batch: Any, mask: Tensor | None, steps: int) -> None:
        """Copy the batch of a step that begins, before the step may change it.

        Args:
            batch: as the training step gets it.
            mask: nonzero at its tokens; without one, all that its largest tensor of whole numbers
                holds count, or its examples.
            steps: that were observed before it.
        """
        copied = apply_to_collection(batch, Tensor, lambda x: x.detach().to("cpu", copy=True))
        tokens = _tokens(batch) if mask is None else int((mask != 0).sum())
        self._next = steps, tokens, copied

    def settle(self, steps: int) -> None:
        """Keep the batch of the step that ends, if it was observed: there are more steps now."""
        before, self._next = self._next, None
        if before is not None and steps > before[0]:
            self._append(*before[1:])

    def _append(self, tokens: int, batch: Any) -> None:
        self._held.append((tokens, batch))
        held = sum(count for count, _ in self._held)
        while held - self._held[0][0] >= self.limit:
            held -= self._held.popleft()[0]

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()

    def state(self, processes: Processes) -> list[list[tuple[int, Any]]]:
        """Return what all processes keep, process by process; a collective call."""
        return processes.all_gather([*self._held])

    def load(self, state: Sequence[Sequence[tuple[int, Any]]], processes: Processes) -> None:
        """Load this process's share of a :meth:`state`, of any number of processes."""
        self.clear()
        for held in state[processes.index :: processes.size]:
            for tokens, batch in held:
                self._append(int(tokens), batch)


def _tokens(batch: Any) -> int:
    sizes = [1]

    def count(x: Tensor) -> Tensor:
        whole = x.ndim > 1 and not x.is_floating_point()
        sizes.append(x.numel() if whole else len(x) if x.ndim else 1)
        return x

    apply_to_collection(batch, Tensor, count)
    return max(sizes)


def training_passes(
    trainer: pl.Trainer, module: pl.LightningModule, kept: KeptBatches, mask: MaskSource
) -> Passes | None:
    """Return passes over batches as the training step makes them, or None if none are to be kept.

    Nothing is logged.

    Args:
        trainer: that fits the module.
        module: with a ``training_step``, which may be ended before it returns.
        kept: the batches.
        mask: where a batch has its padding mask.
    """
    if not kept.limit:
        return None
    student = getattr(module, "_student_class", None)  # of a distilled one, whose teacher rests
    step = module.training_step if student is None else partial(student.training_step, module)
    takes_number = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def run(_model: nn.Module, batch: Any) -> object:
        there = move_data_to_device(batch, module.device)
        with _without_logging(module):
            return step(there, 0) if takes_number else step(there)

    def masks(batch: Any) -> tuple[Tensor | None, Tensor | None, str | None]:
        found, missing = batch_mask(batch, mask, "refit")
        decoder = None if mask is None else batch_decoder_mask(batch, "refit")
        return found, decoder, missing

    return Passes(kept.batches, run, masks, trainer.precision_plugin.forward_context)


def check_training_step(module: pl.LightningModule) -> None:
    """Check that a training step can be run by itself.

    Raises:
        SettingError: if it also steps the optimizers.
    """
    if not module.automatic_optimization:
        raise SettingError(
            "refit and latency run the training step without gradients, and with manual "
            "optimization it steps the optimizers too; leave them out, or call "
            "lrcompress.compress() between two fits"
        )


@contextmanager
def _without_logging(module: pl.LightningModule) -> Iterator[None]:
    every = [x for x in module.modules() if isinstance(x, pl.LightningModule)]
    held: list[Mapping[str, Any]] = [dict(vars(x)) for x in every]
    try:
        for one in every:
            vars(one)["log"] = vars(one)["log_dict"] = _log_nothing
        yield
    finally:
        for one, before in zip(every, held, strict=True):
            for key in ("log", "log_dict"):
                vars(one).pop(key)
                if key in before:
                    vars(one)[key] = before[key]


def _log_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Log nothing."""
