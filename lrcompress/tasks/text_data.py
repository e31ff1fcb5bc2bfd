"""Text classification data: labelled texts from local files or from the hub."""

from datasets import Dataset

from lrcompress.errors import SettingError
from lrcompress.tasks.classification_data import ClassificationData
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.tables import pick_columns


class TextData(ClassificationData):
    """Text classification data: labelled texts or pairs of texts, from local files or from the hub.

    Give ``name``, or ``train``, a file ending in .csv, .tsv, .json, .jsonl or .parquet. Where a
    recipe gives ``name`` and ``train`` comes on top, the file is what is read. Labels may be
    numbers or names: whole numbers that start at 0 are class ids as they are, all others are
    numbered in sorted order. Local files are read without any network access. Batches are dicts
    of ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer has them, and
    ``labels``.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        text: one or two columns of text, by name or by position from 0.
        label: the column of labels, by name or by position from 0.
        name: data set on the hub, such as ``nyu-mll/glue``.
        config: its configuration, such as ``mnli``.
        train_split: its split to train on.
        val_split: its split to validate on, such as ``validation_matched``.
        test_split: its split to test on.
        train: local file to train on.
        val: local file to validate on; by default the file beside ``train`` that is called as
            it is but for ``val``, ``valid``, ``validation`` or ``dev`` in place of ``train``.
        test: local file to test on; by default the one with ``test`` in place of ``train``.
        header: whether the first line of a CSV or TSV file names its columns.
        quoting: whether a CSV or TSV file puts fields in double quotes; by default a CSV does
            and a TSV does not.
        regression: whether labels are floats instead of classes.
        batch_size: the most texts of a training batch, per process.
        eval_batch_size: the most texts of a validation or test batch, per process.
        max_length: tokens beyond it are cut off.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches, and of the texts ``limit`` draws.
        limit: use only so many texts of each split.

    Attributes:
        num_labels: the number of classes, 1 for regression; known after ``setup``.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a file cannot
            be read, or a column or a label is not as expected.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        ``input_ids`` and ``attention_mask`` of a batch ``(texts, length)``, int64; ``labels``
        ``(texts,)``, int64, for regression float32.
    """

    def __init__(
        self,
        tokenizer: str,
        text: list[int | str],
        label: int | str,
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
        regression: bool = False,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            tokenizer, batch_size, eval_batch_size, max_length, num_workers, seed, regression, limit
        )
        self.save_hyperparameters()
        if not 1 <= len(text) <= 2:
            raise SettingError(f"text must be one or two columns, got {text}")
        self.text = text
        self.label = label
        self.header = header
        self.quoting = quoting
        self.sources = Sources.of(
            name,
            config,
            {"train": train_split, "val": val_split, "test": test_split},
            {"train": train, "val": val, "test": test},
        )

    def read(self, split: str) -> Dataset | None:
        found = self.sources.read(split, self.header, self.quoting)
        return None if found is None else pick_columns(found[0], self.text, self.label, found[1])
