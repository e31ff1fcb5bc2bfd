"""Metrics of classification and regression, by name."""

import warnings
from collections.abc import Callable, Sequence

import torchmetrics
from torchmetrics.classification import BinaryF1Score

from lrcompress.errors import SettingError, nearest
from lrcompress.statistics.masks import IGNORED


def _f1(classes: int) -> torchmetrics.Metric:
    if classes == 2:
        return BinaryF1Score(ignore_index=IGNORED)  # of class 1, as GLUE counts it
    return torchmetrics.F1Score(
        "multiclass", num_classes=classes, average="macro", ignore_index=IGNORED
    )


CLASSIFICATION: dict[str, Callable[[int], torchmetrics.Metric]] = {
    "accuracy": lambda n: torchmetrics.Accuracy(
        "multiclass", num_classes=n, average="micro", ignore_index=IGNORED
    ),
    "f1": _f1,
    "matthews": lambda n: torchmetrics.MatthewsCorrCoef(
        "multiclass", num_classes=n, ignore_index=IGNORED
    ),
}
REGRESSION: dict[str, Callable[[int], torchmetrics.Metric]] = {
    "spearman": lambda _: torchmetrics.SpearmanCorrCoef(),
    "pearson": lambda _: torchmetrics.PearsonCorrCoef(),
}


def build_metrics(names: Sequence[str], num_labels: int) -> dict[str, torchmetrics.Metric]:
    """Return a fresh metric object for every name; labels of -100 do not count.

    Args:
        names: of accuracy, f1 (of class 1 for two classes, else the macro average) and
            matthews, or for regression of spearman and pearson.
        num_labels: the number of classes; 1 means regression.

    Raises:
        SettingError: if a name is unknown, or not for this number of labels.
    """
    known = REGRESSION if num_labels == 1 else CLASSIFICATION
    for name in names:
        if name not in CLASSIFICATION | REGRESSION:
            near = nearest(name, CLASSIFICATION | REGRESSION)
            raise SettingError(f"unknown metric {name!r}; nearest: {near}")
        if name not in known:
            raise SettingError(
                f"metric {name!r} does not fit num_labels={num_labels}; "
                f"choose of {', '.join(known)}"
            )
    with warnings.catch_warnings():
        # Spearman announces that it stores every prediction: one number an example here.
        warnings.filterwarnings("ignore", message=".*will save all targets and predictions")
        return {name: known[name](num_labels) for name in names}
