"""Fine-tuning of any ``transformers`` language model, causal or masked."""

import math
from typing import Literal, cast, get_args

import torch
from torch import nn
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import lrcompress.export  # noqa: F401  so that folders of save_pretrained load too
from lrcompress.bench.decoding import likeliest_tokens
from lrcompress.errors import SettingError, nearest
from lrcompress.statistics.masks import IGNORED
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.fine_tuning import FineTuning, Schedule
from lrcompress.tasks.language_data import LanguageData
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.pretrained import DType, load_model

_SAMPLED = 32  # tokens that a model goes on with a text
Objective = Literal["causal", "masked"]


class LanguageModelling(FineTuning):
    """Fine-tunes a ``transformers`` model for causal or masked language modelling.

    The model is ``self.model``, an ordinary ``transformers`` model. Logs ``train_loss``,
    and of validation and test ``val_loss`` and ``val_perplexity``, exact over the epoch and over
    all processes: ``exp`` of the mean over all predicted tokens of ``−log p(token)``.

    Args:
        path: hub name, local folder, or ``package:name/folder``. A folder of
            ``lrcompress.save_pretrained`` goes on factored.
        objective: ``causal``, the next token from those before; ``masked``, masked tokens from
            all others.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; biases, norms and other vectors have none.
        fused: let AdamW update in one kernel. Lightning refuses to clip gradients for it under
            mixed precision.
        warmup: share of all steps over which the learning rate rises to ``lr``, 0 to 1.
        schedule: what follows the warm-up: ``linear`` or ``cosine`` decay to zero, or
            ``constant``.
        pretrained: whether to load the weights; otherwise only ``config.json`` is read and
            the weights are random.
        dtype: of the weights: ``float32``, ``bfloat16``, or ``auto`` for that of the files.
            Statistics are summed in float32 whatever it is.
        samples: of how many texts to validate on the report says how the model goes on with them,
            before layers are replaced and at the end; of causal models. 0 is none.

    Raises:
        SettingError: if an argument is outside what it may be, or if a model for ``causal`` reads
            tokens ahead; from ``setup``, if the data does not fit model and objective.
        NoMatchError: if there is no folder or package at ``path``.
        OSError: if ``transformers`` finds no model at ``path``.

    Shapes:
        batches as of :class:`LanguageData`, ``(blocks, length)``; ``logits`` of the output
        ``(blocks, length, vocabulary)``.
    """

    reads = LanguageData

    def __init__(
        self,
        path: str,
        objective: Objective = "causal",
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        fused: bool = False,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        pretrained: bool = True,
        dtype: DType = "float32",
        samples: int = 3,
    ) -> None:
        super().__init__(lr, weight_decay, fused, warmup, schedule)
        if samples < 0:
            raise SettingError(f"samples is a number of texts from 0, got {samples}")
        if objective not in get_args(Objective):
            near = nearest(objective, get_args(Objective))
            raise SettingError(f"unknown objective {objective!r}; nearest: {near}")
        self.save_hyperparameters()
        self.objective, self.samples = objective, samples
        self.perplexity = nn.ModuleDict(
            {stage: Perplexity(ignore_index=IGNORED) for stage in ("val", "test")}
        )
        kind = AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM
        self.model = load_model(kind, model_folder(path), pretrained, dtype)
        if objective == "causal" and _sees_ahead(self.model):
            raise SettingError(
                f"{path}: {type(self.model).__name__} reads the tokens that a causal model is to "
                "predict; set objective: masked, or is_decoder in its config"
            )

    def _check(self, data: LanguageData) -> None:
        if bool(data.masked) != (self.objective == "masked"):
            raise SettingError(
                f"objective={self.objective!r}, but the data has masked={data.masked}: causal "
                "models take 0, masked ones a share such as 0.15"
            )
        self._check_positions(data, "length")
        if data.isolated and _mixes_documents(self.model):
            raise SettingError(
                f"isolated=True, but a {type(self.model).__name__} does not keep documents in one "
                "block apart: its logits depend on the document before; set isolated to False"
            )

    def _evaluate(self, batch: Batch, stage: str) -> None:
        output = self(batch)
        logits, labels = output.logits, batch["labels"]
        if self.objective == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        metric = cast("Perplexity", self.perplexity[stage])
        metric.update(logits.float(), labels)
        size = self._predicted(batch)
        self.log(f"{stage}_loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{stage}_perplexity", metric, prog_bar=True, batch_size=size)

    def sample_texts(self) -> dict[str, str]:
        """Return how the model goes on with beginnings of texts to validate on.

        These are the likeliest tokens, at most 32 and as many as the model has positions for.
        Called for the report of a fit, in evaluation mode.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.objective != "causal" or not isinstance(data, LanguageData):
            return {}
        most = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        texts = {}
        for ids in data.prompts(self.samples):
            if (room := min(_SAMPLED, most - len(ids))) > 0:
                prompt = torch.tensor([ids], device=self.device)
                given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                tokens = likeliest_tokens(self.model, given, int(room))
                begun, gone_on = (
                    str(data.tokenizer.decode(x, skip_special_tokens=True)) for x in (ids, tokens)
                )
                texts[begun] = gone_on
        return texts

    def _predicted(self, batch: Batch) -> int:
        """Return how many tokens of a batch are predicted; the loss is their mean."""
        labels = batch["labels"][:, 1:] if self.objective == "causal" else batch["labels"]
        return int((labels != IGNORED).sum())


@torch.no_grad()
def _sees_ahead(model: nn.Module) -> bool:
    """Return whether a model's logits at a token depend on the next one."""
    pair = torch.tensor([[5, 5], [5, 6]], device=next(model.parameters()).device)
    training = model.training
    first = model.eval()(input_ids=pair).logits[:, 0]
    model.train(training)
    return not torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _mixes_documents(model: nn.Module) -> bool:
    """Return whether a model's logits at a document depend on the one before it in a block."""
    device = next(model.parameters()).device
    pair = torch.tensor([[5, 5, 5, 6], [6, 6, 5, 6]], device=device)
    places = torch.tensor([[0, 1, 0, 1]] * 2, device=device)
    training = model.training
    try:
        one, other = model.eval()(input_ids=pair, position_ids=places, use_cache=False).logits
    except TypeError:  # it takes no positions
        return True
    finally:
        model.train(training)
    # what is masked has weights of zero, so that they are equal to rounding however small
    return bool((one[2:] - other[2:]).abs().max() > 1e-5 * one[2:].abs().max())
