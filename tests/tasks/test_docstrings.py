from collections import Counter
from pathlib import Path

import pytest

from lrcompress.errors import SettingError
from lrcompress.tasks import DocstringData
from lrcompress.tasks.docstrings import LIBRARIES


def test_serves_texts_of_every_library(tiny_bert: Path) -> None:
    data = DocstringData(
        str(tiny_bert), ["networkx", "numpy"], train_size=20, val_size=8, test_size=8, batch_size=10
    )
    data.setup("fit")
    data.setup("test")

    labels = [label for batch in data.train_dataloader() for label in batch["labels"].tolist()]
    assert Counter(labels) == {0: 10, 1: 10}
    assert len(next(iter(data.val_dataloader()))["labels"]) == 8
    assert len(next(iter(data.test_dataloader()))["labels"]) == 8


def test_the_default_libraries_have_enough(tiny_bert: Path) -> None:
    data = DocstringData(str(tiny_bert))
    texts = {split: data.read(split) for split in data.sizes}
    assert {split: len(rows) for split, rows in texts.items()} == data.sizes
    assert set(texts["test"]["label"]) == set(LIBRARIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"libraries": ["numpy"]}, r"two or more different names, got \['numpy'\]"),
        ({"libraries": ["numpy", "numpy"]}, "two or more different names"),
        ({"val_size": 5}, "val_size must be at least 6, one text of each library, got 5"),
    ],
)
def test_refuses_settings_it_cannot_mean(
    tiny_bert: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        DocstringData(str(tiny_bert), **settings)
