"""Token classification data: words with a tag each, from local files or from the hub."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lrcompress.errors import SettingError
from lrcompress.statistics.masks import IGNORED
from lrcompress.tasks.labels import class_labels, label_ids
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.split_data import SplitData
from lrcompress.tasks.tables import WORDS, pick_columns


class TokenData(SplitData):
    """Token classification data: texts as lists of words, with a tag for each word.

    Give ``name``, or ``train``, a file ending in .json, .jsonl or .parquet. Tags may be numbers or
    names: whole numbers that start at 0 are class ids as they are, all others are numbered in
    sorted order. The first token of a word has its tag as label, all others have -100. Words
    beyond ``max_length`` tokens are cut off, and their tags with them. Batches are dicts of
    ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer has them, and
    ``labels``.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        words: the column of lists of words, by name or by position from 0.
        tags: the column of lists of tags, likewise.
        name: data set on the hub, such as ``eriktks/conll2003``.
        config: its configuration.
        train_split: its split to train on.
        val_split: its split to validate on.
        test_split: its split to test on.
        train: local file to train on.
        val: local file to validate on; by default the file beside ``train`` that is called as
            it is but for ``val``, ``valid``, ``validation`` or ``dev`` in place of ``train``.
        test: local file to test on; by default the one with ``test`` in place of ``train``.
        batch_size: the most texts of a training batch, per process.
        eval_batch_size: the most texts of a validation or test batch, per process.
        max_length: tokens beyond it are cut off.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.
        limit: use only the first so many texts of each split.

    Attributes:
        num_labels: the number of tags; known after ``setup``.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a file cannot
            be read, a text has not one tag for each word, or a tag is not among those of
            training.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        ``input_ids``, ``attention_mask`` and ``labels`` of a batch ``(texts, length)``, int64.
    """

    tokenizer_options: ClassVar = {
        "add_prefix_space": True
    }  # byte-pair vocabularies want it for words
    num_labels: int

    def __init__(
        self,
        tokenizer: str,
        words: int | str = "tokens",
        tags: int | str = "tags",
        name: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.words, self.tags, self.max_length, self.limit = words, tags, max_length, limit
        self.sources = Sources.of(
            name,
            config,
            {"train": train_split, "val": val_split, "test": test_split},
            {"train": train, "val": val, "test": test},
        )
        self.check_counts("max_length", "limit")
        self.check_length("max_length")

    def setup(self, stage: str) -> None:
        wanted = self.begin(stage)
        if not wanted:
            return
        train = self._read("train")
        assert train is not None, "Sources.of wants one"
        ids = label_ids(chain.from_iterable(train["label"]))
        self.num_labels = max(ids.values()) + 1
        for split in wanted:
            table = train if split == "train" else self._read(split)
            self.serve(split, None if table is None else self._tokenized(table, ids, split), stage)

    def _read(self, split: str) -> Dataset | None:
        """Return the words and tags of a split.

        Raises:
            SettingError: if a text has more of one than of the other.
        """
        found = self.sources.read(split)
        if found is None:
            return None
        table = pick_columns(found[0], [self.words], self.tags, found[1], WORDS)
        for row, (words, tags) in enumerate(zip(table["text"], table["label"], strict=True)):
            if not isinstance(tags, list) or len(words) != len(tags):
                count = len(tags) if isinstance(tags, list) else f"{tags!r}"
                raise SettingError(
                    f"{found[1]}, row {row} (from 0): {len(words)} words and {count} tags; "
                    "expected a list of one for each"
                )
        return self.first(table)

    def _tokenized(self, table: Dataset, ids: dict[str, int], split: str) -> Dataset:
        where = f"{split} split"
        labels = [class_labels(tags, ids, where) for tags in table["label"]]
        table = table.remove_columns("label").add_column("label", labels)
        return self.encoded(table, _encode, max_length=self.max_length)


def _encode(rows: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    found = tokenizer(
        rows["text"],
        is_split_into_words=True,
        padding=False,
        truncation=True,
        max_length=max_length,
    )
    labels = [_of_first(found.word_ids(i), tags) for i, tags in enumerate(rows["label"])]
    return dict(found) | {"labels": labels}


def _of_first(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return the tag of its word for the first token of each, and -100 elsewhere."""
    before = [None, *words]
    return [
        IGNORED if word is None or word == last else tags[word]
        for last, word in zip(before, words, strict=False)
    ]
