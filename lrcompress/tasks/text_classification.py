"""Fine-tuning of any ``transformers`` model with a sequence classification head."""

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import lrcompress.export  # noqa: F401  so that folders of save_pretrained load too
from lrcompress.errors import SettingError
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.classification_data import ClassificationData
from lrcompress.tasks.fine_tuning import FineTuning, Schedule
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.metrics import build_metrics
from lrcompress.tasks.pretrained import load_for_fine_tuning


class TextClassification(FineTuning):
    """Fine-tunes a ``transformers`` model to classify texts, or to score them.

    The model is ``self.model``, an ordinary ``transformers`` model in float32. Logs
    ``train_loss``, ``val_loss`` and ``val_<metric>``, ``test_loss`` and ``test_<metric>``,
    exact over the epoch and over all ranks.

    Args:
        path: hub name, local folder, or ``package:name/folder`` for a folder inside an
            installed Python package. A folder of ``lrcompress.save_pretrained`` goes on factored.
        num_labels: number of classes; 1 means regression on float labels.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; biases, norms and other vectors have none.
        fused: let AdamW update in one kernel: a tenth of the step's time on a CPU. Lightning
            refuses to clip gradients for it under mixed precision.
        warmup: share of all steps over which the learning rate rises to ``lr``, 0 to 1.
        schedule: what follows the warm-up: ``linear`` or ``cosine`` decay to zero, or
            ``constant``.
        metrics: of accuracy, f1, matthews; for regression of spearman, pearson. By
            default accuracy, for regression spearman.
        pretrained: whether to load the weights; otherwise only ``config.json`` is read and
            the weights are random.

    Raises:
        SettingError: if an argument is outside what it may be.
    """

    def __init__(
        self,
        path: str,
        num_labels: int = 2,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        fused: bool = False,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        metrics: list[str] | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay, fused, warmup, schedule)
        if num_labels < 1:
            raise SettingError(f"num_labels must be 1 (regression) or more, got {num_labels}")
        self.save_hyperparameters()
        self.num_labels = num_labels
        names = metrics or (["spearman"] if num_labels == 1 else ["accuracy"])
        self.scores = nn.ModuleDict(
            {stage: nn.ModuleDict(build_metrics(names, num_labels)) for stage in ("val", "test")}
        )
        self.model = load_for_fine_tuning(
            AutoModelForSequenceClassification, model_folder(path), pretrained, num_labels
        )

    def setup(self, stage: str) -> None:  # noqa: ARG002
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ClassificationData):
            _check_labels(data.num_labels, self.num_labels)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        labels, output = batch["labels"], self(batch)
        predicted, size = self.answers(output.logits), len(labels)
        self.log(f"{stage}_loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        for name, metric in self.scores[stage].items():  # type: ignore[operator]
            metric.update(predicted, labels)
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=size)

    def answers(self, logits: Tensor) -> Tensor:
        """Return the classes ``(batch,)`` that logits ``(batch, labels)`` mean, or the scores."""
        return logits.squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)


def _check_labels(found: int, num_labels: int) -> None:
    if found > num_labels:
        raise SettingError(f"num_labels={num_labels}, but the data has {found} classes")
    if (found == 1) != (num_labels == 1):
        raise SettingError(
            f"num_labels={num_labels}, but the data is for {found}, where 1 means regression; "
            "set num_labels in the model and regression in the data to agree"
        )
