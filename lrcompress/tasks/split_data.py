"""Base data module: tokenised splits in batches, in an order that can be resumed at any step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrcompress.errors import SettingError
from lrcompress.tasks.batches import Batch, BatchLoader, Rows, collate, grouped_batches
from lrcompress.tasks.locations import model_folder, named_source, source_arguments
from lrcompress.tasks.tables import quiet

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class SplitData(L.LightningDataModule, ABC):
    """Base class: serves tokenised splits in batches of rows of similar length.

    A subclass makes the rows in ``setup``. The order of training batches depends on ``seed``
    and the epoch only. A checkpoint holds the position in it, and a resumed run goes on with
    the next batch.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``.
        batch_size: the most rows of a training batch, per process.
        eval_batch_size: the same for validation and test.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.

    Raises:
        SettingError: if a number is outside what it may be.
        NoMatchError: if there is no folder or package of the tokenizer.
    """

    limit: int | None = None
    tokenizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, tokenizer: str, batch_size: int, eval_batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        with named_source(tokenizer):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **source_arguments(model_folder(tokenizer)), **self.tokenizer_options
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.check_counts("batch_size", "eval_batch_size")
        self._splits: dict[str, Dataset] = {}
        self._training: BatchLoader | None = None
        self._position: dict[str, int] | None = None

    def check_counts(self, *names: str) -> None:
        """Check that attributes are numbers from 1, or None.

        Raises:
            SettingError: if one is not.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")

    def check_length(self, name: str) -> None:
        """Check that an attribute is no longer than what the tokenizer's model takes.

        Raises:
            SettingError: if it is.
        """
        longest = self.tokenizer.model_max_length
        if getattr(self, name) > longest:
            raise SettingError(
                f"{name}={getattr(self, name)} is more than the {longest} tokens this model can "
                "take"
            )

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Give :meth:`serve` the rows of every split that :meth:`begin` names."""

    def begin(self, stage: str) -> list[str]:
        """Reset the position in training; return the splits that the stage still needs."""
        self._training = self._position = None
        return [split for split in SPLITS.get(stage, ()) if split not in self._splits]

    def serve(self, split: str, rows: Dataset | None, stage: str) -> None:
        """Keep the rows of a split, with the columns that ``collate`` takes.

        Raises:
            SettingError: if there are none where the stage needs them.
        """
        if rows is not None:
            self._splits[split] = rows
        elif stage != "fit":
            raise SettingError(f"there is no {split} split to {stage} on; give `{split}`")

    def collate(self, epoch: int, rows: list[dict[str, Any]]) -> Batch:  # noqa: ARG002
        """Return rows as a batch, padded to the longest."""
        pad = self.tokenizer.pad_token_id
        return collate(rows, self.tokenizer.eos_token_id if pad is None else pad)

    def first(self, table: Dataset) -> Dataset:
        """Return the first ``limit`` rows of a table; all where there is no limit."""
        return table if self.limit is None else table.select(range(min(self.limit, len(table))))

    def encoded(self, table: Dataset, encode: Callable[..., Any], **given: Any) -> Dataset:
        """Return the columns that ``encode`` makes of a table, in batches of rows.

        Args:
            table: the rows; its own columns are removed.
            encode: called with a batch of rows, ``tokenizer`` and ``given``.
            given: further arguments of ``encode``.
        """
        with quiet():
            return table.map(
                encode,
                batched=True,
                fn_kwargs={"tokenizer": self.tokenizer, **given},
                remove_columns=table.column_names,
            )

    def lengths(self, rows: Dataset) -> list[int]:
        """Return the number of tokens of each row; rows of similar length share a batch."""
        return [len(ids) for ids in rows["input_ids"]]

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
        lengths = self.lengths(rows)
        shard = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        ranks, rank = (shard["num_replicas"], shard["rank"]) if shard else (1, 0)

        def batches(epoch: int) -> list[Rows]:
            shuffle = (self.seed, epoch) if shuffled else None
            rounds = grouped_batches(lengths, batch_size, ranks, shuffle)
            return [of_ranks[rank] for of_ranks in rounds]

        return BatchLoader(rows, batches, self.collate, self.num_workers, shuffled)

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
