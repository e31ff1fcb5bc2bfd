"""Base data module of text classification: tokens, labels and batches."""

from abc import abstractmethod
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lrcompress.tasks.labels import class_labels, float_labels, label_ids
from lrcompress.tasks.split_data import SplitData


class ClassificationData(SplitData):
    """Base class: tokenises labelled texts and serves them in batches.

    A subclass reads the splits (:meth:`read`). Batches are dicts of ``input_ids``,
    ``attention_mask``, ``token_type_ids`` where the tokenizer has them, and ``labels``.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``.
        batch_size: the most texts of a training batch, per process.
        eval_batch_size: the same for validation and test.
        max_length: tokens beyond it are cut off.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.
        regression: whether labels are floats instead of classes.
        limit: use only so many texts of each split, drawn by ``seed``.

    Attributes:
        num_labels: the number of classes, 1 for regression; known after ``setup``.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a label
            cannot be used.
        NoMatchError: if there is no folder or package of the tokenizer.
    """

    num_labels: int

    def __init__(
        self,
        tokenizer: str,
        batch_size: int,
        eval_batch_size: int,
        max_length: int,
        num_workers: int,
        seed: int,
        regression: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.max_length = max_length
        self.regression = regression
        self.limit = limit
        self.check_counts("max_length", "limit")
        self.check_length("max_length")

    @abstractmethod
    def read(self, split: str) -> Dataset | None:
        """Return the rows of "train", "val" or "test", or None if there is no such split.

        The columns are ``text``, for pairs of texts also ``pair``, and ``label``.
        """

    def setup(self, stage: str) -> None:
        wanted = self.begin(stage)
        if not wanted:
            return
        train = self.read("train")
        assert train is not None, "every subclass has a training split"
        ids = None if self.regression else label_ids(train["label"])
        self.num_labels = 1 if ids is None else max(ids.values()) + 1
        for split in wanted:
            table = train if split == "train" else self.read(split)
            self.serve(split, None if table is None else self._tokenize(table, ids, split), stage)

    def _tokenize(self, table: Dataset, ids: dict[str, int] | None, split: str) -> Dataset:
        if self.limit is not None:
            drawn = np.random.default_rng(self.seed).permutation(len(table))[: self.limit]
            table = table.select(sorted(drawn.tolist()))
        if ids is None:
            labels: list[Any] = float_labels(table["label"], f"{split} split")
        else:
            labels = class_labels(table["label"], ids, f"{split} split")
        tokens = self.encoded(table, _encode, max_length=self.max_length)
        return tokens.add_column("labels", labels)


def _encode(rows: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    # padding=False also switches off padding that a tokenizer.json switches on
    return tokenizer(
        rows["text"], rows.get("pair"), padding=False, truncation=True, max_length=max_length
    )
