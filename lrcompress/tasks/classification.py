"""Base LightningModule of text and token classification."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import lrcompress.export  # noqa: F401  so that folders of save_pretrained load too
from lrcompress.errors import SettingError
from lrcompress.statistics.batches import batch_terms
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.fine_tuning import FineTuning, Schedule
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.metrics import build_metrics
from lrcompress.tasks.pretrained import load_for_fine_tuning


class Classification(FineTuning):
    """Base class: fine-tunes a ``transformers`` classification model, with metrics by name.

    Args:
        kind: an automatic class of ``transformers``.
        path: of the model.
        num_labels: number of classes; 1 means regression.
        lr: of :class:`FineTuning`, as the four that follow.
        weight_decay: see there.
        fused: see there.
        warmup: see there.
        schedule: see there.
        metrics: names of :func:`~lrcompress.tasks.metrics.build_metrics`.
        pretrained: whether to load the weights.

    Raises:
        SettingError: if an argument is outside what it may be.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.
    """

    def __init__(
        self,
        kind: Any,
        path: str,
        num_labels: int,
        lr: float,
        weight_decay: float,
        fused: bool,
        warmup: float,
        schedule: Schedule,
        metrics: Sequence[str],
        pretrained: bool,
    ) -> None:
        super().__init__(lr, weight_decay, fused, warmup, schedule)
        self.num_labels = num_labels
        self.scores = nn.ModuleDict(
            {stage: nn.ModuleDict(build_metrics(metrics, num_labels)) for stage in ("val", "test")}
        )
        self.model = load_for_fine_tuning(kind, model_folder(path), pretrained, num_labels)

    def _check(self, data: Any) -> None:
        found = data.num_labels
        if found > self.num_labels:
            raise SettingError(f"num_labels={self.num_labels}, but the data has {found} classes")
        if (found == 1) != (self.num_labels == 1):
            raise SettingError(
                f"num_labels={self.num_labels}, but the data is for {found}, where 1 means "
                "regression; set num_labels in the model and regression in the data to agree"
            )

    def _evaluate(self, batch: Batch, stage: str) -> None:
        labels, output = batch["labels"], self(batch)
        predicted, size = self.answers(output.logits), batch_terms(batch)
        self.log(f"{stage}_loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        for name, metric in self.scores[stage].items():  # type: ignore[operator]
            metric.update(predicted, labels)
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=size)

    def answers(self, logits: Tensor) -> Tensor:
        """Return the classes ``(…)`` predicted by logits ``(…, num_labels)``, or the scores."""
        return logits.squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)
