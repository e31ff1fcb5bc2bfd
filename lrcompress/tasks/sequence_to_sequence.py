"""Fine-tuning of any ``transformers`` encoder-decoder for sequence-to-sequence tasks."""

from typing import cast

from torch import Tensor, nn
from torchmetrics.text import ROUGEScore
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

import lrcompress.export  # noqa: F401  so that folders of save_pretrained load too
from lrcompress.errors import SettingError
from lrcompress.statistics.masks import IGNORED
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.fine_tuning import FineTuning, Schedule
from lrcompress.tasks.locations import model_folder, named_source, source_arguments
from lrcompress.tasks.pretrained import DType, load_model
from lrcompress.tasks.sequence_data import SequenceData

# rougeLsum would download a model that splits sentences
ROUGE = {key: f"{key}_fmeasure" for key in ("rouge1", "rouge2", "rougeL")}


class SequenceToSequence(FineTuning):
    """Fine-tunes a ``transformers`` encoder-decoder to generate a text from another.

    The model is ``self.model``, an ordinary ``transformers`` model. Logs ``train_loss``,
    and of validation and test ``val_loss``, the mean over all predicted tokens, and ``val_rouge1``,
    ``val_rouge2`` and ``val_rougeL``, F-measures of what it writes, without stemming, over all
    texts and all processes.

    Args:
        path: hub name, local folder, or ``package:name/folder``. A folder of
            ``lrcompress.save_pretrained`` goes on factored.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; biases, norms and other vectors have none.
        fused: let AdamW update in one kernel. Lightning refuses to clip gradients for it under
            mixed precision.
        warmup: share of all steps over which the learning rate rises to ``lr``, 0 to 1.
        schedule: what follows the warm-up: ``linear`` or ``cosine`` decay to zero, or
            ``constant``.
        max_written: the most tokens it writes in validation and test.
        beams: of the search for what to write; 1 takes the likeliest token each time.
        pretrained: whether to load the weights; otherwise only ``config.json`` is read and
            the weights are random.
        dtype: of the weights: ``float32``, ``bfloat16``, or ``auto`` for that of the files.
            Statistics are summed in float32 whatever it is.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if texts are longer
            than the model takes.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.

    Shapes:
        batches as of :class:`SequenceData`; ``logits`` of the output
        ``(pairs, target length, vocabulary)``.
    """

    reads = SequenceData
    figures = ROUGE

    def __init__(
        self,
        path: str,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        fused: bool = False,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        max_written: int = 64,
        beams: int = 1,
        pretrained: bool = True,
        dtype: DType = "float32",
    ) -> None:
        super().__init__(lr, weight_decay, fused, warmup, schedule)
        for name, value in (("max_written", max_written), ("beams", beams)):
            if value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        self.save_hyperparameters()
        self.max_written, self.beams = max_written, beams
        folder = model_folder(path)
        with named_source(path):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **source_arguments(folder)
            )
        self.scores = nn.ModuleDict(
            {stage: ROUGEScore(rouge_keys=tuple(ROUGE)) for stage in ("val", "test")}
        )
        self.model = load_model(AutoModelForSeq2SeqLM, folder, pretrained, dtype)

    def _check(self, data: SequenceData) -> None:
        self._check_positions(data, "max_length", "max_target")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        labels = batch["labels"]
        loss, size = self(batch).loss, int((labels != IGNORED).sum())
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        pad = self.tokenizer.pad_token_id
        wanted = labels.masked_fill(labels == IGNORED, 0 if pad is None else pad)
        self._rouge(stage).update(self._texts(self.write(batch)), self._texts(wanted))

    def write(self, batch: Batch) -> Tensor:
        """Return the tokens that the model generates for a batch, without sampling.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``(texts, length)``.

        Returns:
            ``(texts, written)``, int64, padded on the right: the decoder's first token and at
            most ``max_written`` others.
        """
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = self.model.generate(  # type: ignore[operator]
            **read, max_new_tokens=self.max_written, num_beams=self.beams, do_sample=False
        )
        return found

    def _texts(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _rouge(self, stage: str) -> ROUGEScore:
        return cast("ROUGEScore", self.scores[stage])
