import pytest

from lrcompress.errors import SettingError
from lrcompress.tasks.labels import class_labels, float_labels, label_ids


def test_numbers_that_do_not_start_at_zero_are_numbered_by_value() -> None:
    assert label_ids([10, 9, 1]) == {"1": 0, "9": 1, "10": 2}


def test_the_order_of_rows_does_not_matter() -> None:
    assert label_ids(["b", "a", "c"]) == label_ids(["c", "b", "a", "a"])


def test_ids_are_kept_though_a_class_is_absent() -> None:
    assert class_labels(["2", "0"], label_ids([0, 2]), "val split") == [2, 0]


def test_refuses_a_label_that_was_not_trained_on() -> None:
    with pytest.raises(SettingError, match="test split: label '-1' is not among the 2 training"):
        class_labels([0, -1], label_ids([0, 1]), "test split")


def test_floats_may_be_written_as_text() -> None:
    assert float_labels(["1.5", 2], "train split") == [1.5, 2.0]


@pytest.mark.parametrize("label", ["high", "nan", None])
def test_refuses_what_is_no_number(label: object) -> None:
    with pytest.raises(SettingError, match=rf"needs numbers as labels, got {label!r} in row 1"):
        float_labels([0.5, label], "train split")
