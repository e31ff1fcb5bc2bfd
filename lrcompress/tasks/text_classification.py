"""Fine-tuning of any ``transformers`` model with a sequence classification head."""

from transformers import AutoModelForSequenceClassification

from lrcompress.errors import SettingError
from lrcompress.tasks.classification import Classification
from lrcompress.tasks.classification_data import ClassificationData
from lrcompress.tasks.fine_tuning import Schedule


class TextClassification(Classification):
    """Fine-tunes a ``transformers`` model for text classification or regression.

    The model is ``self.model``, an ordinary ``transformers`` model in float32. Logs
    ``train_loss``, ``val_loss`` and ``val_<metric>``, ``test_loss`` and ``test_<metric>``,
    exact over the epoch and over all processes.

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
        SettingError: if an argument is outside what it may be; from ``setup``, if the data does
            not fit ``num_labels``.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.

    Shapes:
        batches as of :class:`TextData`; ``logits`` of the output ``(texts, num_labels)``.
    """

    reads = ClassificationData

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
        if num_labels < 1:
            raise SettingError(f"num_labels must be 1 (regression) or more, got {num_labels}")
        super().__init__(
            AutoModelForSequenceClassification,
            path,
            num_labels,
            lr,
            weight_decay,
            fused,
            warmup,
            schedule,
            metrics or (["spearman"] if num_labels == 1 else ["accuracy"]),
            pretrained,
        )
        self.save_hyperparameters()
