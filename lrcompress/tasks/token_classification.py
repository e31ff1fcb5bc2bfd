"""Fine-tuning of any ``transformers`` model with a token classification head."""

from transformers import AutoModelForTokenClassification

from lrcompress.errors import SettingError
from lrcompress.tasks.classification import Classification
from lrcompress.tasks.fine_tuning import Schedule
from lrcompress.tasks.token_data import TokenData


class TokenClassification(Classification):
    """Fine-tunes a ``transformers`` model for token classification: one tag for every word.

    The model is ``self.model``, an ordinary ``transformers`` model in float32. Logs
    ``train_loss``, ``val_loss`` and ``val_<metric>``, ``test_loss`` and ``test_<metric>``, exact
    over all words of the epoch and over all processes. They count words; of named entities that
    span several, each word counts by itself.

    Args:
        path: hub name, local folder, or ``package:name/folder`` for a folder inside an
            installed Python package. A folder of ``lrcompress.save_pretrained`` goes on factored.
        num_labels: number of tags.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; biases, norms and other vectors have none.
        fused: let AdamW update in one kernel: a tenth of the step's time on a CPU. Lightning
            refuses to clip gradients for it under mixed precision.
        warmup: share of all steps over which the learning rate rises to ``lr``, 0 to 1.
        schedule: what follows the warm-up: ``linear`` or ``cosine`` decay to zero, or
            ``constant``.
        metrics: of accuracy, f1 (the mean over tags; of two tags, that of tag 1) and matthews;
            by default accuracy and f1.
        pretrained: whether to load the weights; otherwise only ``config.json`` is read and
            the weights are random.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if the data does
            not fit ``num_labels`` or the length of the model.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.

    Shapes:
        batches as of :class:`TokenData`; ``logits`` of the output
        ``(texts, length, num_labels)``.
    """

    reads = TokenData

    def __init__(
        self,
        path: str,
        num_labels: int,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        fused: bool = False,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        metrics: list[str] | None = None,
        pretrained: bool = True,
    ) -> None:
        if num_labels < 2:
            raise SettingError(f"num_labels must be 2 or more, got {num_labels}")
        super().__init__(
            AutoModelForTokenClassification,
            path,
            num_labels,
            lr,
            weight_decay,
            fused,
            warmup,
            schedule,
            metrics or ["accuracy", "f1"],
            pretrained,
        )
        self.save_hyperparameters()

    def _check(self, data: TokenData) -> None:
        super()._check(data)
        self._check_positions(data, "max_length")
