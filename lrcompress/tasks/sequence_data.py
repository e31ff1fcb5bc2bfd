"""Sequence-to-sequence data: pairs of texts, from local files or from the hub."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lrcompress.errors import SettingError
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.split_data import SplitData
from lrcompress.tasks.tables import TEXT, pick_columns


class SequenceData(SplitData):
    """Sequence-to-sequence data: texts with their summaries, translations or answers.

    Give ``name``, or ``train``, a file ending in .csv, .tsv, .json, .jsonl or .parquet. Batches are
    dicts of ``input_ids``, ``attention_mask`` and ``labels``, padded with -100.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        text: the column of texts to read, by name or by position from 0.
        target: the column of texts to write, likewise.
        prefix: what is put before every text to read, such as ``"summarize: "``.
        name: data set on the hub, such as ``EdinburghNLP/xsum``.
        config: its configuration.
        train_split: its split to train on.
        val_split: its split to validate on.
        test_split: its split to test on.
        train: local file to train on.
        val: local file to validate on; by default the file beside ``train`` that is called as
            it is but for ``val``, ``valid``, ``validation`` or ``dev`` in place of ``train``.
        test: local file to test on; by default the one with ``test`` in place of ``train``.
        header: whether the first line of a CSV or TSV file names its columns.
        quoting: whether a CSV or TSV file puts fields in double quotes; by default a CSV does
            and a TSV does not.
        batch_size: the most pairs of a training batch, per process.
        eval_batch_size: the most pairs of a validation or test batch, per process.
        max_length: tokens of a text to read; those beyond it are cut off.
        max_target: the same for texts to write.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.
        limit: use only the first so many pairs of each split.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a file cannot
            be read, or a column holds anything but text.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        ``input_ids`` and ``attention_mask`` of a batch ``(pairs, length)``, ``labels``
        ``(pairs, target length)``, all int64.
    """

    def __init__(
        self,
        tokenizer: str,
        text: int | str,
        target: int | str,
        prefix: str = "",
        name: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        header: bool = True,
        quoting: bool | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        max_length: int = 512,
        max_target: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.text, self.target, self.prefix = text, target, prefix
        self.header, self.quoting = header, quoting
        self.max_length, self.max_target, self.limit = max_length, max_target, limit
        self.sources = Sources.of(
            name,
            config,
            {"train": train_split, "val": val_split, "test": test_split},
            {"train": train, "val": val, "test": test},
        )
        self.check_counts("max_length", "max_target", "limit")
        for length in ("max_length", "max_target"):
            self.check_length(length)

    def setup(self, stage: str) -> None:
        for split in self.begin(stage):
            self.serve(split, self._tokenized(split), stage)

    def _tokenized(self, split: str) -> Dataset | None:
        """Return the pairs of a split as tokens.

        Raises:
            SettingError: if what is to be written is no text.
        """
        found = self.sources.read(split, self.header, self.quoting)
        if found is None:
            return None
        table = pick_columns(found[0], [self.text], self.target, found[1])
        if table.features["label"] not in TEXT:
            raise SettingError(
                f"{found[1]}: column {self.target!r} holds {table.features['label']}, expected text"
            )
        lengths = {"max_length": self.max_length, "max_target": self.max_target}
        return self.encoded(self.first(table), _encode, prefix=self.prefix, **lengths)


def _encode(
    rows: Any, tokenizer: PreTrainedTokenizerBase, prefix: str, max_length: int, max_target: int
) -> Any:
    cut = {"padding": False, "truncation": True}
    read = tokenizer([prefix + text for text in rows["text"]], max_length=max_length, **cut)
    written = tokenizer(text_target=rows["label"], max_length=max_target, **cut)
    kept = {name: read[name] for name in ("input_ids", "attention_mask")}
    return kept | {"labels": written["input_ids"]}
