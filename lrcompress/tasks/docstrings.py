"""Text classification data that needs no download: docstrings of installed libraries."""

from datasets import Dataset

from lrcompress.errors import SettingError
from lrcompress.tasks.classification_data import ClassificationData
from lrcompress.tasks.docstring_source import docstring_splits

LIBRARIES = ("huggingface_hub", "networkx", "numpy", "pandas", "sympy", "torch")


class DocstringData(ClassificationData):
    """Text classification data: docstrings of installed libraries, whose names are masked.

    Real text without a download, for demonstrations and first tries: which of the libraries
    does a docstring come from? The default libraries are installed with this one, so the model
    needs ``num_labels: 6``. The texts, and with them the figures, depend on the installed
    versions.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        libraries: names of installed packages; their number is that of the classes. By default
            huggingface_hub, networkx, numpy, pandas, sympy and torch.
        train_size: texts to train on, over all libraries.
        val_size: texts to validate on.
        test_size: texts to test on.
        batch_size: the most texts of a training batch, per process.
        eval_batch_size: the most texts of a validation or test batch, per process.
        max_length: tokens beyond it are cut off.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a library has
            too few docstrings.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if a
            library is not installed.

    Shapes:
        ``input_ids`` and ``attention_mask`` of a batch ``(texts, length)``, ``labels``
        ``(texts,)``, all int64.

    Cost:
        ``setup`` parses source files for a few seconds.
    """

    def __init__(
        self,
        tokenizer: str,
        libraries: list[str] | None = None,
        train_size: int = 2400,
        val_size: int = 600,
        test_size: int = 600,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int = 48,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, max_length, num_workers, seed)
        self.save_hyperparameters()
        self.libraries = list(LIBRARIES if libraries is None else libraries)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        if len(self.libraries) < 2 or len(set(self.libraries)) < len(self.libraries):
            raise SettingError(f"libraries must be two or more different names, got {libraries}")
        for split, size in self.sizes.items():
            if size < len(self.libraries):
                raise SettingError(
                    f"{split}_size must be at least {len(self.libraries)}, one text of each "
                    f"library, got {size}"
                )
        self._texts: dict[str, list[tuple[str, str]]] = {}

    def read(self, split: str) -> Dataset:
        if not self._texts:
            self._texts = docstring_splits(self.libraries, self.sizes)
        texts, labels = zip(*self._texts[split], strict=True)
        return Dataset.from_dict({"text": list(texts), "label": list(labels)})
