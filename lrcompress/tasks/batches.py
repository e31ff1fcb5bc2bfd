"""Batches of rows of similar length, in an order that can be resumed at any step."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lrcompress.errors import SettingError
from lrcompress.statistics.masks import IGNORED

ROUNDS_SORTED_TOGETHER = 50
Batch = dict[str, Tensor]
Rows = NDArray[np.int64]


def grouped_batches(
    lengths: ArrayLike, batch_size: int, ranks: int = 1, shuffle: tuple[int, int] | None = None
) -> list[list[Rows]]:
    """Return which rows are batched together: rounds of one batch for every process.

    Every row is in exactly one batch, every process has equally many batches, and their sizes
    differ by at most one row: nothing is dropped or repeated, so sums over an epoch are exact
    on any number of processes. Rows are shuffled, sorted by length within stretches of 50 rounds
    and cut into batches; then the rounds are shuffled. So there is little padding, and processes
    that wait for each other have batches of similar length.

    Args:
        lengths: ``(rows,)``, the number of tokens of each row.
        batch_size: the most rows of a batch.
        ranks: how many processes share a round.
        shuffle: ``(seed, epoch)``, which fix the order whatever the global random state;
            without it the rows are sorted from long to short.

    Raises:
        SettingError: if there are fewer rows than processes.

    Example:
        >>> [rows.tolist() for (rows,) in grouped_batches([5, 9, 7, 3, 6], batch_size=2)]
        [[1, 2], [4, 0], [3]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) < ranks:
        raise SettingError(f"{len(lengths)} rows are too few to give one to each of {ranks} ranks")
    rounds = math.ceil(len(lengths) / (batch_size * ranks))
    if shuffle is None:
        return _cut(np.argsort(-lengths, kind="stable"), rounds, ranks)
    random = np.random.default_rng(shuffle)
    stretches = np.array_split(
        random.permutation(len(lengths)), math.ceil(rounds / ROUNDS_SORTED_TOGETHER)
    )
    # every other stretch rises, so that a batch which straddles two of them is no mix of lengths
    signs = [1 if i % 2 else -1 for i in range(len(stretches))]
    rows = [
        stretch[np.argsort(sign * lengths[stretch], kind="stable")]
        for sign, stretch in zip(signs, stretches, strict=True)
    ]
    batches = _cut(np.concatenate(rows), rounds, ranks)
    return [batches[i] for i in random.permutation(rounds)]


def _cut(rows: Rows, rounds: int, ranks: int) -> list[list[Rows]]:
    pieces = np.array_split(rows, rounds * ranks)
    return [pieces[i : i + ranks] for i in range(0, len(pieces), ranks)]


def collate(rows: list[dict[str, Any]], pad_id: int) -> Batch:
    """Return the rows as one batch, lists padded on the right to the longest of them.

    Args:
        rows: numbers and lists by name (``input_ids``, ``attention_mask``, ``labels``, …).
        pad_id: what fills ``input_ids``; ``labels`` are filled with -100, others with zeros.

    Example:
        >>> rows = [{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}]
        >>> collate(rows, pad_id=9)["input_ids"].tolist()
        [[5, 6], [7, 9]]
    """
    fill = {"input_ids": pad_id, "labels": IGNORED}
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    return {
        name: pad_sequence(values, True, fill.get(name, 0))
        if values[0].ndim
        else torch.stack(values)
        for name, values in columns.items()
    }


class BatchLoader:
    """Resumable data loader: yields the batches of one epoch after another, and its position.

    Not a ``DataLoader``, so Lightning leaves its order alone: the sharding by process is already
    in ``batches``. Its state is the epoch and how many batches of it were handed out, whatever
    the workers have prefetched; a loader given that state goes on with the next batch. It
    reads that state when the first batch is requested, not at ``iter``: Lightning creates the
    iterator before it restores the loader or sets the epoch. The number of processes and the batch
    size must be those the state was saved with.

    Args:
        dataset: gives the list of rows for a list of row numbers.
        batches: epoch -> the rows of each batch of this process; equally many every epoch.
        collate: epoch, rows -> batch.
        num_workers: processes that load and collate; 0 is none.
        shuffled: whether the order depends on the epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Callable[[int], list[Rows]],
        collate: Callable[[int, list[dict[str, Any]]], Batch],
        num_workers: int = 0,
        shuffled: bool = True,
    ) -> None:
        self._dataset = dataset
        self._batches = batches
        self._collate = collate
        self._num_workers = num_workers
        self._length = len(batches(0))
        self._epoch = self._served = self._resume_from = 0
        if shuffled:
            self.sampler = self  # where Lightning sets the epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        self._served, self._resume_from = self._resume_from, 0
        loader = DataLoader(
            self._dataset,
            batch_sampler=[rows.tolist() for rows in self._batches(self._epoch)[self._served :]],
            collate_fn=partial(self._collate, self._epoch),
            num_workers=self._num_workers,
            generator=torch.Generator(),  # its own, so that an epoch draws nothing from the global
        )
        for batch in loader:
            self._served += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of ``epoch``; the current one keeps its position."""
        if epoch != self._epoch:
            self._epoch, self._served, self._resume_from = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch = state["epoch"]
        self._served = self._resume_from = state["served"]
