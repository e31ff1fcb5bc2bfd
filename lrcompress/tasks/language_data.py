"""Language modelling data: running text or conversations, from local files or from the hub."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from lrcompress.errors import NoMatchError, SettingError, nearest
from lrcompress.statistics.masks import IGNORED, LABELS, MASK
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.chat import check_template, encode_conversation, packed
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.split_data import SplitData
from lrcompress.tasks.tables import TEXT

_PROMPT = 32  # tokens of text that a model is asked to go on with


class LanguageData(SplitData):
    """Language modelling data: text in blocks of ``length`` tokens, or conversations.

    Give ``name``, or ``train``, a file ending in .txt (a row is a line), .csv, .tsv, .json, .jsonl
    or .parquet. Batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``. Rows of text
    are tokenised, joined, and cut every ``length`` tokens. Nothing is padded; what is left at the
    end of a split, less than a block, is dropped.

    With ``messages`` a row is a conversation, a list of messages, each with a ``role`` and a
    ``content``. The tokenizer's chat template writes it; it is cut off after ``length`` tokens and
    padded. Labels are -100 but at the assistant's answers, where the loss is of them alone, and so
    are the statistics of ``Factorize``. Conversations whose answers are all cut off are left out.

    With ``isolated`` no token attends to those of another row: batches have ``position_ids`` that
    begin anew at each, no ``attention_mask``, and ``use_cache`` False, by which ``transformers``
    tells documents in a block apart. The first token of a row is not predicted.

    For causal models the labels are the tokens themselves, which the model shifts. With
    ``masked`` they are the tokens that were masked, and -100 elsewhere: of the positions drawn, 8
    of 10 become the mask, 1 another token, 1 stays. Which positions depends on ``seed``,
    epoch and block alone; in validation they are always the same.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        text: the column of text.
        name: data set on the hub, such as ``Salesforce/wikitext``.
        config: its configuration, such as ``wikitext-2-raw-v1``.
        train_split: its split to train on.
        val_split: its split to validate on.
        test_split: its split to test on.
        train: local file to train on.
        val: local file to validate on; by default the file beside ``train`` that is called as
            it is but for ``val``, ``valid``, ``validation`` or ``dev`` in place of ``train``.
        test: local file to test on; by default the one with ``test`` in place of ``train``.
        length: tokens of a block, special ones included.
        masked: share of tokens to predict from the others, above 0; 0 is for causal models.
        end: put the tokenizer's end-of-text token after each row, where rows are documents.
        batch_size: the most blocks of a training batch, per process.
        eval_batch_size: the most blocks of a validation or test batch, per process.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches, and of masked positions.
        limit: use only the first so many blocks of each split.
        messages: the column of conversations, in place of ``text``; for causal models.
        isolated: let tokens attend to those of their own row alone; as many conversations as fit
            whole then share a block.

    Attributes:
        statistics_mask: where its batches say of which tokens statistics are.

    Raises:
        SettingError: if an argument is outside what it may be, or the tokenizer has no chat
            template for ``messages``; from ``setup``, if a file cannot be read, the column holds no
            text, a conversation is not as it should be, or a split has less than a block.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        every tensor of a batch ``(blocks, length)``, int64; of conversations ``(blocks, longest)``.
    """

    def __init__(
        self,
        tokenizer: str,
        text: str = "text",
        name: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        length: int = 128,
        masked: float = 0.0,
        end: bool = False,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        messages: str | None = None,
        isolated: bool = False,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.text, self.length, self.masked, self.end = text, length, masked, end
        self.messages, self.isolated, self.limit = messages, isolated, limit
        self.sources = Sources.of(
            name,
            config,
            {"train": train_split, "val": val_split, "test": test_split},
            {"train": train, "val": val, "test": test},
        )
        self.check_counts("limit")
        self.check_length("length")
        if not 0 <= masked < 1:
            raise SettingError(f"masked is a share of tokens from 0, below 1, got {masked}")
        self._check_together()
        self._frame = _frame(self.tokenizer) if masked else ([], [])
        least = 2 + sum(map(len, self._frame))
        if length < least:
            raise SettingError(f"length must be at least {least}, got {length}")
        for wanted, token in ((masked, "mask_token"), (end, "eos_token")):
            if wanted and getattr(self.tokenizer, token) is None:
                option = "masked" if token == "mask_token" else "end"
                raise SettingError(f"{option}={wanted!r}, but the tokenizer has no {token}")

    def _check_together(self) -> None:
        """Check that what is asked for goes together.

        Raises:
            SettingError: if it does not.
        """
        for name in ("messages", "isolated"):
            if self.masked and getattr(self, name):
                raise SettingError(
                    f"{name}={getattr(self, name)!r} is for causal models, got masked={self.masked}"
                )
        if self.messages and self.end:
            raise SettingError(
                "end=True is for rows of text; how a message ends, its template says"
            )
        if self.messages:
            check_template(self.tokenizer)

    @property
    def statistics_mask(self) -> str | None:
        if self.messages:
            return LABELS
        return None if self.isolated else MASK

    def setup(self, stage: str) -> None:
        for split in self.begin(stage):
            found = self.sources.read(split)
            make = self._conversations if self.messages else self._pack
            self.serve(split, None if found is None else make(*found), stage)

    def _check_column(self, table: Dataset, where: str) -> None:
        """Check that there is the column that is read, of text or of lists.

        Raises:
            NoMatchError: if there is no such column.
            SettingError: if it holds something else.
        """
        name = self.messages or self.text
        if name not in table.column_names:
            near = nearest(name, table.column_names)
            raise NoMatchError(f"{where}: no column {name!r}; nearest: {near}")
        held = table.features[name]
        if self.messages and not _holds_messages(held):
            raise SettingError(
                f"{where}: column {name!r} holds {held}, expected lists of messages, each with a "
                "'role' and a 'content'"
            )
        if not self.messages and held not in TEXT:
            hint = f"; for conversations set messages: {name}" if _holds_messages(held) else ""
            raise SettingError(f"{where}: column {name!r} holds {held}, expected text{hint}")

    def _pack(self, table: Dataset, where: str) -> Dataset:
        """Return the blocks of a split of text, their numbers in ``row``.

        Raises:
            NoMatchError: if there is no such column.
            SettingError: if it holds no text, or less than a block.
        """
        self._check_column(table, where)
        ending = [self.tokenizer.eos_token_id] if self.end else []
        rows = [[*row, *ending] for row in self._tokenized(table)]
        tokens = [token for row in rows for token in row]
        before, after = self._frame
        size = self.length - len(before) - len(after)
        starts = range(0, len(tokens) - size + 1, size)[: self.limit]
        if not starts:
            raise SettingError(
                f"{where}: {len(tokens)} tokens are less than a block of {size}; set length lower"
            )
        columns = {"input_ids": [[*before, *tokens[i : i + size], *after] for i in starts]}
        if self.isolated:
            places = [place for row in rows for place in range(len(row))]
            cut = [places[i : i + size] for i in starts]
            columns["position_ids"] = [_from_zero(block) for block in cut]
            pairs = zip(columns["input_ids"], cut, strict=True)
            columns["labels"] = [_without_first(ids, block) for ids, block in pairs]
        return Dataset.from_dict({**columns, "row": list(range(len(starts)))})

    def _tokenized(self, table: Dataset) -> Any:
        return self.encoded(table, _encode, text=self.text)["input_ids"]

    def _conversations(self, table: Dataset, where: str) -> Dataset:
        """Return the conversations of a split, one a row or, isolated, as many as fit whole.

        Raises:
            NoMatchError: if there is no such column.
            SettingError: if it holds no conversations, or no answer is within ``length``.
        """
        self._check_column(table, where)
        rows = [
            row for row in self._encoded_messages(table, where) if set(row["labels"]) > {IGNORED}
        ]
        if len(rows) < len(table):
            left_out = f"{where}: {len(table) - len(rows)} of {len(table)} conversations have no "
            left_out += f"answer within length={self.length} tokens"
            if not rows:
                raise SettingError(f"{left_out}; set length higher")
            rank_zero_warn(f"{left_out} and are left out")
        if self.isolated:
            rows = list(packed(rows, self.length))
        else:
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return Dataset.from_list(rows[: self.limit])

    def _encoded_messages(self, table: Dataset, where: str) -> Iterator[dict[str, list[int]]]:
        for i, messages in enumerate(table[self.messages]):
            row = encode_conversation(self.tokenizer, messages, f"{where}, row {i} (from 0)")
            yield {name: tokens[: self.length] for name, tokens in row.items()}

    def prompts(self, count: int) -> list[list[int]]:
        """Return the beginnings of the first rows to validate on, to be gone on with.

        Of a conversation it is what stands before its first answer, of text some tokens.
        """
        rows = self._splits.get("val")
        if rows is None:
            return []
        return [_beginning(rows[i]) for i in range(min(count, len(rows)))]

    def collate(self, epoch: int, rows: list[dict[str, Any]]) -> Batch:
        """Return blocks as a batch, with tokens masked if ``masked`` is above 0."""
        if self.messages or self.isolated:
            own = [{name: x for name, x in row.items() if name != "row"} for row in rows]
            batch = super().collate(epoch, own)
            return {**batch, "use_cache": False} if self.isolated else batch  # type: ignore[dict-item]
        if self.masked:
            pairs = [self._mask(epoch, row["row"], row["input_ids"]) for row in rows]
            ids, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        else:
            ids = torch.tensor([row["input_ids"] for row in rows])
            labels = ids.clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _mask(self, epoch: int, row: int, block: list[int]) -> tuple[Tensor, Tensor]:
        """Return a block with some tokens masked, and the labels of those, ``(1, length)`` each."""
        seed = int(np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)[0])
        collator = DataCollatorForLanguageModeling(
            self.tokenizer, mlm_probability=self.masked, seed=seed
        )
        masked = collator([{"input_ids": block}])
        return masked["input_ids"], masked["labels"]


def _beginning(row: Mapping[str, list[int]]) -> list[int]:
    """Return the tokens of a row before the first that is an answer's, of text its first.

    Example:
        >>> _beginning({"input_ids": [5, 6, 7, 8]})
        [5, 6]
        >>> _beginning({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]})
        [5, 6, 7]
    """
    ids, labels = row["input_ids"], row.get("labels", ())
    answers = [i for i, label in enumerate(labels) if label != IGNORED]
    if answers and answers[0] > 1:  # else a token that alone is not predicted
        return ids[: answers[0]]
    return ids[: min(_PROMPT, max(1, len(ids) // 2))]


def _encode(rows: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    # no truncation: a row longer than the model takes is cut into blocks
    ids = tokenizer(
        rows[text], add_special_tokens=False, padding=False, truncation=False, verbose=False
    )["input_ids"]
    return {"input_ids": ids}


def _holds_messages(held: Any) -> bool:
    """Return whether a column may hold messages: structs, or JSON where their entries differ."""
    return not isinstance(getattr(held, "feature", held), Value)


def _from_zero(places: list[int]) -> list[int]:
    """Return the positions in a block of tokens with these places in their rows.

    What a row has in earlier blocks is not there to be attended to.

    Example:
        >>> _from_zero([7, 8, 0, 1])
        [0, 1, 0, 1]
    """
    first = places[0]
    again = places.index(0) if 0 in places else len(places)
    return [place - first for place in places[:again]] + places[again:]


def _without_first(ids: list[int], places: list[int]) -> list[int]:
    return [IGNORED if place == 0 else token for token, place in zip(ids, places, strict=True)]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    framed = tokenizer("")["input_ids"]
    first = [t for t in framed if t in (tokenizer.cls_token_id, tokenizer.bos_token_id)][:1]
    return first, framed[len(first) :]
