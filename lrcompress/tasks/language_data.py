"""Language modelling data: text in blocks of equal length, from local files or from the hub."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from lrcompress.errors import NoMatchError, SettingError, nearest
from lrcompress.tasks.batches import Batch
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.split_data import SplitData
from lrcompress.tasks.tables import TEXT


class LanguageData(SplitData):
    """Language modelling data: rows are tokenised, joined, and cut every ``length`` tokens.

    Give ``name``, or ``train``, a file ending in .txt (a row is a line), .csv, .tsv, .json, .jsonl
    or .parquet. Batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``. Nothing is
    padded; what is left at the end of a split, less than a block, is dropped.

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

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a file cannot
            be read, the column holds no text, or a split has less than a block.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        every tensor of a batch ``(blocks, length)``, int64.
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
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.text, self.length, self.masked, self.end = text, length, masked, end
        self.limit = limit
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
        self._frame = _frame(self.tokenizer) if masked else ([], [])
        least = 2 + sum(map(len, self._frame))
        if length < least:
            raise SettingError(f"length must be at least {least}, got {length}")
        for wanted, token in ((masked, "mask_token"), (end, "eos_token")):
            if wanted and getattr(self.tokenizer, token) is None:
                option = "masked" if token == "mask_token" else "end"
                raise SettingError(f"{option}={wanted!r}, but the tokenizer has no {token}")

    def setup(self, stage: str) -> None:
        for split in self.begin(stage):
            self.serve(split, self._pack(split), stage)

    def _pack(self, split: str) -> Dataset | None:
        """Return the blocks of a split, their numbers in ``row``.

        Raises:
            NoMatchError: if there is no such column.
            SettingError: if it holds no text, or less than a block.
        """
        found = self.sources.read(split)
        if found is None:
            return None
        table, where = found
        if self.text not in table.column_names:
            near = nearest(self.text, table.column_names)
            raise NoMatchError(f"{where}: no column {self.text!r}; nearest: {near}")
        if table.features[self.text] not in TEXT:
            raise SettingError(
                f"{where}: column {self.text!r} holds {table.features[self.text]}, expected text"
            )
        ending = [self.tokenizer.eos_token_id] if self.end else []
        tokens = [token for row in self._tokenized(table) for token in (*row, *ending)]
        before, after = self._frame
        size = self.length - len(before) - len(after)
        blocks = [
            [*before, *tokens[start : start + size], *after]
            for start in range(0, len(tokens) - size + 1, size)
        ][: self.limit]
        if not blocks:
            raise SettingError(
                f"{where}: {len(tokens)} tokens are less than a block of {size}; set length lower"
            )
        return Dataset.from_dict({"input_ids": blocks, "row": list(range(len(blocks)))})

    def _tokenized(self, table: Dataset) -> Any:
        return self.encoded(table, _encode, text=self.text)["input_ids"]

    def collate(self, epoch: int, rows: list[dict[str, Any]]) -> Batch:
        """Return blocks as a batch, with tokens masked if ``masked`` is above 0."""
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


def _encode(rows: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    # no truncation: a row longer than the model takes is cut into blocks
    ids = tokenizer(
        rows[text], add_special_tokens=False, padding=False, truncation=False, verbose=False
    )["input_ids"]
    return {"input_ids": ids}


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    framed = tokenizer("")["input_ids"]
    first = [t for t in framed if t in (tokenizer.cls_token_id, tokenizer.bos_token_id)][:1]
    return first, framed[len(first) :]
