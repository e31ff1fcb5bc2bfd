"""Mean loss of the batches that are observed, before and after layers are replaced."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lrcompress.engine.block_runs import evaluating
from lrcompress.engine.observation import Loss
from lrcompress.engine.passes import random_state_kept
from lrcompress.errors import ObservationError
from lrcompress.report.record import OBSERVED_LOSS, PointRecord
from lrcompress.statistics.batches import batch_terms


class MeasuredLoss:
    """A loss that keeps the mean of its values, over labelled tokens or else examples.

    What layers are predicted to lose adds up errors of each alone, and is several times too low
    where they err in the same direction. To measure it takes a pass without gradients.

    Args:
        loss: ``loss(model, batch)`` gives the mean loss over the batch, a scalar.
        examples: of how many terms a batch's loss is the mean; by default as
            :func:`~lrcompress.statistics.batches.batch_terms` counts them without the loss, which
            has no graph the second time; where it finds none, batches count alike.
    """

    def __init__(self, loss: Loss, examples: Callable[[Any], int] | None) -> None:
        self._loss, self._examples = loss, examples
        self._sum, self._terms = 0.0, 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        value = self._loss(model, batch)
        terms = self._terms_of(batch)
        self._sum, self._terms = self._sum + terms * float(value.detach()), self._terms + terms
        return value

    def _terms_of(self, batch: Any) -> int:
        if self._examples is not None:
            return self._examples(batch)
        try:
            return batch_terms(batch)
        except ObservationError:
            return 1

    def take(self) -> float | None:
        """Return the mean since the last call; None without any batch."""
        mean = self._sum / self._terms if self._terms else None
        self._sum, self._terms = 0.0, 0
        return mean

    def put_in(self, record: PointRecord, model: nn.Module, batches: Iterable[Any]) -> None:
        """Take the mean as that of before, measure that of now, and put both into the record.

        There is none of batches that can be gone through once, or where nothing was observed, or
        where the loss of a batch was not finite before, which observing skips. An error of the
        compressed model is a note in the record.
        """
        before = self.take()
        if before is None or not math.isfinite(before) or isinstance(batches, Iterator):
            return
        try:
            with evaluating(model), random_state_kept(model):
                for batch in batches:
                    self(model, batch)
        except Exception as error:  # the layers are replaced: what compress was asked to do
            told = f"its loss could not be measured: {type(error).__name__}: {error}"
            record.note = "; ".join(filter(None, [record.note, told]))
            return
        after = self.take()
        if after is not None:
            record.metrics = {"before": {OBSERVED_LOSS: before}, "after": {OBSERVED_LOSS: after}}
