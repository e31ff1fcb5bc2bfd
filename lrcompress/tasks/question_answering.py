"""Fine-tuning of any ``transformers`` model for extractive question answering, as on SQuAD."""

from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.text import SQuAD
from transformers import AutoModelForQuestionAnswering

import lrcompress.export  # noqa: F401  so that folders of save_pretrained load too
from lrcompress.errors import SettingError
from lrcompress.tasks.fine_tuning import FineTuning, Schedule
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.pretrained import load_for_fine_tuning
from lrcompress.tasks.question_data import QuestionData

READ = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")


class QuestionAnswering(FineTuning):
    """Fine-tunes a ``transformers`` model for extractive question answering (SQuAD).

    The model is ``self.model``, an ordinary ``transformers`` model in float32. Logs ``train_loss``,
    and of validation and test ``val_loss``, the mean over windows (in which ``transformers`` counts
    padding among the positions to choose from), and ``val_exact_match`` and
    ``val_f1`` as SQuAD's own script counts them, 0 to 100, over all questions and all processes.
    Of a question's windows ``w`` and their tokens ``s ≤ e < s + longest`` of the text the answer is

        argmax  start_w[s] + end_w[e].

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
        longest: the most tokens of an answer.
        may_be_silent: whether questions may have no answer, as in SQuAD 2: the model gives none
            where the lowest of ``start_w[0] + end_w[0]`` is above the best answer's score.
        pretrained: whether to load the weights; otherwise only ``config.json`` is read and
            the weights are random.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if texts are longer
            than the model takes, or questions without an answer are not expected.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.

    Shapes:
        batches as of :class:`QuestionData`; ``start_logits`` and ``end_logits`` of the output
        ``(windows, length)``.
    """

    reads = QuestionData
    figures = MappingProxyType({"exact_match": "exact_match", "f1": "f1"})

    def __init__(
        self,
        path: str,
        lr: float = 3e-5,
        weight_decay: float = 0.0,
        fused: bool = False,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        longest: int = 30,
        may_be_silent: bool = False,
        pretrained: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay, fused, warmup, schedule)
        if longest < 1:
            raise SettingError(f"longest must be at least 1, got {longest}")
        self.save_hyperparameters()
        self.longest, self.may_be_silent = longest, may_be_silent
        self.scores = nn.ModuleDict({stage: SQuAD() for stage in ("val", "test")})
        self.model = load_for_fine_tuning(
            AutoModelForQuestionAnswering, model_folder(path), pretrained, num_labels=2
        )

    def _check(self, data: QuestionData) -> None:
        self._check_positions(data, "max_length")
        if data.unanswered and not self.may_be_silent:
            raise SettingError(
                f"{data.unanswered} questions have no answer; set may_be_silent: true to learn that"
            )

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**{name: batch[name] for name in READ if name in batch})

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        output = self(batch)
        size = len(batch["input_ids"])
        self.log(f"{stage}_loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        said = self.answers(output.start_logits, output.end_logits, batch)
        self._squad(stage).update(
            [{"prediction_text": text, "id": str(i)} for i, text in enumerate(said)],
            [
                {"answers": {"text": right or [""]}, "id": str(i)}
                for i, right in enumerate(batch["answers"])
            ],
        )

    def answers(self, start: Tensor, end: Tensor, batch: dict[str, Any]) -> list[str]:
        """Return the predicted answer to each question of a batch.

        Args:
            start: ``(windows, length)``, logits of the answer's first token.
            end: ``(windows, length)``, logits of its last token.
            batch: of :class:`~lrcompress.tasks.QuestionData`, to validate on.

        Returns:
            One text a question, a piece of its ``context``; empty where the model gives none.

        Cost:
            ``O(windows·length²)`` memory, for the scores of all spans.
        """
        begins, ends, question = batch["begins"], batch["ends"], batch["question"]
        start, end = start.float(), end.float()
        silent = start[:, 0] + end[:, 0]
        start, end = (x.masked_fill(ends == begins, -torch.inf) for x in (start, end))
        length = start.shape[1]
        spans = torch.ones(length, length, dtype=torch.bool, device=start.device)
        spans = spans.triu().tril(self.longest - 1)
        scores = (start[:, :, None] + end[:, None, :]).masked_fill(~spans, -torch.inf)
        best, where = scores.flatten(1).max(1)
        found = []
        for i, text in enumerate(batch["context"]):
            windows = (question == i).nonzero().squeeze(1)
            window = windows[best[windows].argmax()]
            if self.may_be_silent and silent[windows].min() > best[window]:
                found.append("")
                continue
            first, last = divmod(int(where[window]), length)
            found.append(text[begins[window, first] : ends[window, last]].strip())
        return found

    def _squad(self, stage: str) -> SQuAD:
        return cast("SQuAD", self.scores[stage])
