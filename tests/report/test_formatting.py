"""Figures as people read them."""

import math

import pytest

from lrcompress.report.formatting import change, mebibytes, number, share


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-1234, "-1,234"),
        (0.0, "0.0000"),
        (0.001, "0.0010"),
        (-0.00099, "-9.90e-04"),
        (12345.67891, "12,345.6789"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (None, ""),
    ],
)
def test_a_number_is_written_so(value: float | None, text: str) -> None:
    assert number(value) == text


def test_differences_shares_and_sizes() -> None:
    assert [change(x) for x in (0.25, -0.25, 0, None)] == ["+0.2500", "-0.2500", "+0.0000", ""]
    assert share(1 / 3) == "0.333"
    assert (mebibytes(2**30), mebibytes(None)) == ("1,024.00", "")
