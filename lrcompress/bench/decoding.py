"""Tokens a second of models that generate text with a cache, in turns."""

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.bench.models import Batch, TorchModel
from lrcompress.bench.timing import now, ratio
from lrcompress.errors import SettingError


@dataclass(frozen=True)
class Decoded:
    """How fast one model goes on after prompts of one batch × length.

    Attributes:
        first: seconds of every round until the first token is there.
        later: seconds of every round of a token after the first, of all rows together.
        batch: rows.
        read_bytes: of parameters that each step reads.
        peak_bytes: bytes of parameters and buffers, and the most that generating holds besides.
    """

    first: list[float]
    later: list[float]
    batch: int
    read_bytes: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, of all rows, at the median.

        Example:
            >>> Decoded([1.0], [0.5, 0.25, 0.5], 4, 8, 9).tokens_per_second
            8.0
        """
        return self.batch / statistics.median(self.later)


@dataclass(frozen=True)
class Decoding:
    """Decoding of two models, or of one alone, at one batch × length of the prompts.

    Attributes:
        device: they ran on.
        batch: rows.
        length: tokens of each prompt.
        tokens: generated after the first.
        models: model name to what was measured; the second is the reference.
        faster: time of the reference / of the first for a later token, a median over rounds; None
            of one alone.
    """

    device: str
    batch: int
    length: int
    tokens: int
    models: dict[str, Decoded]
    faster: float | None

    @property
    def promised(self) -> float | None:
        """Bytes of parameters that the reference reads in a step / that the first reads.

        With few rows a step takes as long as reading the parameters does.
        """
        if self.faster is None:
            return None
        small, large = self.models.values()
        return large.read_bytes / small.read_bytes

    @property
    def share_of_promised(self) -> float | None:
        """``faster / promised``."""
        return None if self.faster is None or not self.promised else self.faster / self.promised

    def to_dict(self) -> dict[str, object]:
        """Return the record in plain types, with medians."""
        models = {
            name: {
                "first_token_seconds": statistics.median(one.first),
                "tokens_per_second": one.tokens_per_second,
                "read_bytes": one.read_bytes,
                "peak_bytes": one.peak_bytes,
            }
            for name, one in self.models.items()
        }
        plain = {name: getattr(self, name) for name in ("device", "batch", "length", "tokens")}
        gained = ("faster", "promised", "share_of_promised")
        return plain | {"models": models} | {name: getattr(self, name) for name in gained}


class GeneratingModel(TorchModel):
    """A ``transformers`` model that generates text, in evaluation mode and without gradients.

    Args:
        name: of it in tables.
        model: with ``generate``.
        tokens: to generate after the first, from 1. The likeliest ones, and no end stops them.
        stored_bytes: as for :class:`TorchModel`.

    Raises:
        SettingError: if the model cannot generate.
    """

    def __init__(self, name: str, model: Any, tokens: int, stored_bytes: int | None = None) -> None:
        super().__init__(name, model, stored_bytes)
        if not getattr(model, "can_generate", bool)():
            raise SettingError(
                f"{name}: decoding is of models that generate text, and {type(model).__name__} "
                "does not"
            )
        self.tokens = tokens
        unset = dict.fromkeys(("eos_token_id", "forced_eos_token_id", "no_repeat_ngram_size"))
        count = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1}
        self.settings = _likeliest(model.generation_config, unset | count)

    def call(self, batch: Batch) -> tuple[float, float]:
        """Return the seconds until the first token, and those of each one after it."""
        stamps = [now()]

        def stamp(ids: Tensor, *_: object, **__: object) -> Tensor:
            stamps.append(now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model: Any = self.model
        prompt = {name: x for name, x in batch.items() if not name.startswith("decoder_")}
        with torch.no_grad():
            model.generate(**prompt, generation_config=self.settings, stopping_criteria=[stamp])
        start, first, *_ = stamps
        return first - start, (stamps[-1] - first) / self.tokens

    def answer(self, prompt: Batch) -> Tensor:
        """Return the likeliest tokens after one prompt, as many as are timed or up to an end."""
        return likeliest_tokens(self.model, prompt, self.tokens)


@torch.no_grad()
def likeliest_tokens(model: Any, prompt: Batch, tokens: int) -> Tensor:
    """Return the likeliest tokens after one prompt.

    Args:
        model: of ``transformers``, which generates, in evaluation mode.
        prompt: keyword to tensor, ``(1, length)``, on the model's device.
        tokens: how many there are at most; an end of text ends them sooner.

    Returns:
        Their ids, ``(tokens,)`` or fewer.
    """
    settings = _likeliest(model.generation_config, {"max_new_tokens": tokens})
    (found,) = model.generate(**prompt, generation_config=settings)
    length = 1 if model.config.is_encoder_decoder else next(iter(prompt.values())).shape[1]
    return torch.as_tensor(found[length:])


def _likeliest(settings: Any, given: Mapping[str, object]) -> Any:
    """Return settings of ``generate`` that take the likeliest tokens, and ``given`` ones."""
    found = copy.deepcopy(settings)
    greedy = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": 0}
    unset = ("max_length", "min_length", "temperature", "top_p", "top_k")
    for key, value in (dict.fromkeys(unset) | greedy | {**given}).items():
        setattr(found, key, value)
    return found


def compare_decoding(
    subject: GeneratingModel,
    reference: GeneratingModel | None,
    batch: Batch,
    *,
    device: str,
    rounds: int,
) -> Decoding:
    """Measure how fast one model, or two in turns, go on after prompts.

    Args:
        subject: the first model.
        reference: what it is compared with; None measures ``subject`` alone.
        batch: keyword to tensor, on their device; the first is the prompts, ``(batch, length)``.
        device: its name, for the record.
        rounds: how often each generates, from 1, after one time to warm up.

    Returns:
        Times, memory and speedups.

    Raises:
        SettingError: if both have one name, or ``rounds`` is less than 1.

    Cost:
        ``rounds + 3`` generations of each model.
    """
    models = [one for one in (subject, reference) if one is not None]
    if len({one.name for one in models}) < len(models):
        raise SettingError(f"two models are called {subject.name!r}; give them two names")
    if rounds < 1:
        raise SettingError(f"rounds must be a whole number from 1, got {rounds}")
    for one in models:
        one.call(batch)
    taken = [[one.call(batch) for one in models] for _ in range(rounds)]
    size, length = next(iter(batch.values())).shape[:2]
    found = {}
    for number, one in enumerate(models):
        first, later = ([row[number][part] for row in taken] for part in (0, 1))
        found[one.name] = Decoded(
            first, later, size, read_in_a_step(one.model), one.peak_bytes(batch)
        )
    times = [one.later for one in found.values()]
    faster = ratio(times[1], times[0]) if reference is not None else None
    return Decoding(device, size, length, subject.tokens, found, faster)


def read_in_a_step(model: nn.Module) -> int:
    """Return the bytes of the parameters that one step reads.

    These are all but tables of embeddings, of which a step reads a few rows, unless the head is
    tied to one. Experts count whole, and so do encoders.

    Example:
        >>> read_in_a_step(nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 2)))
        40
    """
    read = {
        id(p): p.nbytes
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    return sum(read.values())
