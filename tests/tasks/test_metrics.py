import pytest
import torch

from lrcompress.errors import SettingError
from lrcompress.tasks.metrics import build_metrics

PREDICTED = torch.tensor([1, 1, 0, 1, 0, 0])
LABELS = torch.tensor([1, 0, 0, 1, 1, 0])


def values(names: list[str], num_labels: int, predicted: torch.Tensor, labels: torch.Tensor):
    metrics = build_metrics(names, num_labels)
    return {name: float(metric(predicted, labels)) for name, metric in metrics.items()}


def test_two_classes_by_the_definitions() -> None:
    found = values(["accuracy", "f1", "matthews"], 2, PREDICTED, LABELS)

    # 2 true positives, 2 true negatives, 1 false of each kind
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5)


def test_f1_of_more_classes_is_the_mean_over_them() -> None:
    predicted, labels = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    found = values(["f1"], 3, predicted, labels)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_regression_metrics_know_order_and_line() -> None:
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = values(["spearman", "pearson"], 1, labels**3, labels)
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 0.99


def test_names_the_nearest_metric() -> None:
    with pytest.raises(SettingError, match="unknown metric 'acuracy'; nearest: accuracy"):
        build_metrics(["acuracy"], 2)


@pytest.mark.parametrize(("name", "num_labels"), [("accuracy", 1), ("pearson", 2)])
def test_refuses_a_metric_of_the_other_kind(name: str, num_labels: int) -> None:
    with pytest.raises(SettingError, match=f"'{name}' does not fit num_labels={num_labels}"):
        build_metrics([name], num_labels)
