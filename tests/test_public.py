"""What users may rely on: the public names, and that importing them stays light."""

import subprocess
import sys

import pytest

import lrcompress

NAMES = [
    "DSEE",
    "Distilled",
    "Factorize",
    "FactorizeEmbedding",
    "LoSparse",
    "LowRankLinear",
    "LowRankSparseLinear",
    "Plan",
    "Report",
    "StartFrom",
    "__version__",
    "compress",
    "decoding_layout_",
    "load_pretrained",
    "merge_dense",
    "observe",
    "restore_structure",
    "save_pretrained",
    "store_pivoted_",
]
HEAVY = ("lightning", "transformers", "datasets", "torchmetrics", "jsonargparse", "matplotlib")


def test_the_public_names_are_these() -> None:
    assert sorted(lrcompress.__all__) == NAMES
    assert dir(lrcompress) == NAMES
    for name in NAMES:
        assert getattr(lrcompress, name) is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lrcompress' has no attribute 'compres'"):
        _ = lrcompress.compres


def loaded_by(code: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after ``code``."""
    ask = f"import sys; {code}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import lrcompress",
        "from lrcompress import compress, observe, Plan, LowRankLinear, Report, restore_structure",
    ],
)
def test_the_engine_needs_neither_lightning_nor_transformers(code: str) -> None:
    assert loaded_by(code) == []
