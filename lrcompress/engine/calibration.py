"""Calibration: observe a model on batches, without a Trainer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError
from lrcompress.statistics.batches import batch_terms
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.masks import MASK, MaskSource, batch_decoder_mask, batch_mask
from lrcompress.statistics.views import view

Loss = Callable[[nn.Module, Any], Tensor]


def observe_batches(
    recorder: Recorder,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    mask: MaskSource = MASK,
    examples: Callable[[Any], int] | None = None,
) -> None:
    """Observe one pass over batches, in evaluation mode; no ``.grad`` is touched.

    Args:
        recorder: of layers of the model; its statistics grow.
        model: as it was, afterwards.
        batches: whatever ``loss`` understands.
        loss: ``loss(model, batch)`` gives the mean loss over the batch, a scalar.
        mask: where a batch has its padding mask, as
            :func:`~lrcompress.statistics.masks.batch_mask` says; None if nothing is padded.
        examples: of how many terms a batch's loss is the mean; by default as
            :func:`~lrcompress.statistics.batches.batch_terms` counts them.

    Raises:
        ShapeError: if a mask is not two-dimensional.
        ObservationError: if there are no batches, or none with a finite loss; as of
            :meth:`~lrcompress.statistics.capture.Recorder.step`.
    """
    with _observable(model, recorder):
        for batch in batches:
            _observe_batch(recorder, model, batch, loss, mask, (examples or batch_terms)(batch))
    if not recorder.statistics.steps:
        raise ObservationError(
            f"nothing to learn from: {recorder.statistics.skipped} batches, none with a finite loss"
        )


def _observe_batch(
    recorder: Recorder,
    model: nn.Module,
    batch: Any,
    loss: Loss,
    mask: MaskSource,
    count: int,
) -> None:
    found, missing = batch_mask(batch, mask, "compress")
    decoder = None if mask is None else batch_decoder_mask(batch)
    with recorder.step(found, decoder_mask=decoder, missing=missing, keep_outputs=True):
        value = loss(model, batch)
        finite = bool(value.isfinite())
        recorder.commit(float(count), terms=count, finite=finite)
        if finite and recorder.outputs and value.requires_grad:
            torch.autograd.grad(value, recorder.outputs, allow_unused=True)


@contextmanager
def _observable(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Set evaluation mode and let gradients reach the weights; restore both at the end."""
    gradients = not recorder.forward_only
    modes = {module: module.training for module in model.modules()}
    weights = [p for x in recorder.layers.values() for p in view(x).parameters]
    frozen = [p for p in weights if gradients and not p.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
