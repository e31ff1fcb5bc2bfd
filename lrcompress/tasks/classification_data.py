"""What all data for text classification share: tokens, labels and batches."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import lightning as L
import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrcompress.errors import SettingError
from lrcompress.tasks.batches import BatchLoader, Rows, collate, grouped_batches
from lrcompress.tasks.labels import class_labels, float_labels, label_ids
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.tables import quiet

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ClassificationData(L.LightningDataModule, ABC):
    """Tokenises splits of text and serves them in batches of similar length.

    A subclass says what the splits hold. Batches are dicts of ``input_ids``,
    ``attention_mask``, ``token_type_ids`` where the tokenizer has them, and ``labels``.
    The order of training batches depends on ``seed`` and the epoch only. A checkpoint holds
    the position in it, and a resumed run goes on with the next batch.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``.
        batch_size: the most texts of a training batch, per rank.
        eval_batch_size: the same for validation and test.
        max_length: tokens beyond it are cut off.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.
        regression: whether labels are floats instead of classes.
        limit: use only so many texts of each split, drawn by ``seed``.

    Attributes:
        num_labels: the number of classes, 1 for regression; known after ``setup``.
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
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_folder(tokenizer)
        )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.regression = regression
        self.limit = limit
        self._check()
        self._splits: dict[str, Dataset] = {}
        self._training: BatchLoader | None = None
        self._position: dict[str, int] | None = None

    def _check(self) -> None:
        for name in ("batch_size", "eval_batch_size", "max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.max_length > self.tokenizer.model_max_length:
            raise SettingError(
                f"max_length={self.max_length} is more than the {self.tokenizer.model_max_length} "
                "tokens this model can take"
            )

    @abstractmethod
    def read(self, split: str) -> Dataset | None:
        """Return the rows of "train", "val" or "test", or None if there is no such split.

        The columns are ``text``, for pairs of texts also ``pair``, and ``label``.
        """

    def setup(self, stage: str) -> None:
        self._training = self._position = None
        wanted = [split for split in SPLITS.get(stage, ()) if split not in self._splits]
        if not wanted:
            return
        train = self.read("train")
        assert train is not None, "every subclass has a training split"
        ids = None if self.regression else label_ids(train["label"])
        self.num_labels = 1 if ids is None else max(ids.values()) + 1
        for split in wanted:
            table = train if split == "train" else self.read(split)
            if table is not None:
                self._splits[split] = self._tokenize(table, ids, split)
            elif stage != "fit":
                raise SettingError(f"there is no {split} split to {stage} on; give `{split}`")

    def _tokenize(self, table: Dataset, ids: dict[str, int] | None, split: str) -> Dataset:
        if self.limit is not None:
            drawn = np.random.default_rng(self.seed).permutation(len(table))[: self.limit]
            table = table.select(sorted(drawn.tolist()))
        if ids is None:
            labels: list[Any] = float_labels(table["label"], f"{split} split")
        else:
            labels = class_labels(table["label"], ids, f"{split} split")
        with quiet():
            tokens = table.map(
                _encode,
                batched=True,
                fn_kwargs={"tokenizer": self.tokenizer, "max_length": self.max_length},
                remove_columns=table.column_names,
            )
        return tokens.add_column("labels", labels)

    def train_dataloader(self) -> BatchLoader:
        overfit = self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        self._training = self._loader("train", self.batch_size, shuffled=not overfit)
        if self._position is not None:
            self._training.load_state_dict(self._position)
        return self._training

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        if "val" not in self._splits:
            return []  # for Lightning: train without validation
        return self._loader("val", self.eval_batch_size, shuffled=False)

    def test_dataloader(self) -> BatchLoader:
        return self._loader("test", self.eval_batch_size, shuffled=False)

    def _loader(self, split: str, batch_size: int, shuffled: bool) -> BatchLoader:
        rows = self._splits[split]
        lengths = [len(ids) for ids in rows["input_ids"]]
        shard = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        ranks, rank = (shard["num_replicas"], shard["rank"]) if shard else (1, 0)

        def batches(epoch: int) -> list[Rows]:
            shuffle = (self.seed, epoch) if shuffled else None
            rounds = grouped_batches(lengths, batch_size, ranks, shuffle)
            return [of_ranks[rank] for of_ranks in rounds]

        pad = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad is None else pad
        return BatchLoader(
            rows, batches, partial(collate, pad_id=pad_id), self.num_workers, shuffled
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training batches.

        Lightning keeps the loader's own state too, but does not restore it where
        ``configure_optimizers`` asks for ``estimated_stepping_batches``: that sets the loader
        up before the checkpoint's loops are read.
        """
        return {} if self._training is None else dict(self._training.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict
        if self._training is not None:  # sharded strategies restore after the loader was made
            self._training.load_state_dict(state_dict)


def _encode(rows: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    # padding=False also switches off padding that a tokenizer.json switches on
    return tokenizer(
        rows["text"], rows.get("pair"), padding=False, truncation=True, max_length=max_length
    )
