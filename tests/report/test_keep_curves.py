"""Curves over keep: what is written of them is what was found."""

from rich.console import Console

from lrcompress.report.keep_curves import MeasuredKeep, PredictedLoss
from lrcompress.report.plots import measured_curve_figure
from lrcompress.report.tables import loss_curves_table, measured_curve_table

FOUND = [
    MeasuredKeep("kfac", 1.0, 1.0, 22_715_526, 0.0, {"val_loss": 0.5, "acc": 0.9}, 2.0),
    MeasuredKeep("kfac", 0.5, 0.496, 17_400_000, 0.02, {"val_loss": 0.55, "acc": 0.88}, 1.0),
    MeasuredKeep("kfac", 0.1, 0.098, 13_200_000, None, {"val_loss": 0.9}, 0.5),
]


def shown(table: object) -> list[str]:
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_every_keep_has_a_row_with_size_figures_and_time() -> None:
    lines = shown(measured_curve_table(FOUND, "kfac"))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith((" 1 ", " 0."))}
    assert rows["1"] == ["22.7", "M", "1.000", "0.5000", "0.9000", "+0.0000", "1.00", "×"]
    assert rows["0.5"] == ["17.4", "M", "0.496", "0.5500", "0.8800", "+0.0200", "0.50", "×"]
    assert rows["0.1"] == ["13.2", "M", "0.098", "0.9000", "0.25", "×"]  # the rest is not known
    assert any("keep 1 is the model as it is" in line for line in lines)


def test_each_figure_is_drawn_over_keep_beside_the_model_as_it_is() -> None:
    loss, accuracy = measured_curve_figure(FOUND).axes
    curve, dense = loss.lines
    assert list(curve.get_xdata()) == [1.0, 0.5, 0.1]  # type: ignore[arg-type]
    assert list(curve.get_ydata()) == [0.5, 0.55, 0.9]  # type: ignore[arg-type]
    assert list(dense.get_ydata()) == [0.5, 0.5]  # type: ignore[arg-type]
    assert list(accuracy.lines[0].get_xdata()) == [1.0, 0.5]  # type: ignore[arg-type]


def test_several_methods_stand_below_each_other_and_in_one_picture() -> None:
    other = [MeasuredKeep("svd", 0.5, 0.5, 17_400_000, None, {"val_loss": 0.7, "acc": 0.6}, 1.0)]
    lines = shown(measured_curve_table([*FOUND, *other], "kfac, svd"))
    rows = [line.split()[:2] for line in lines if line.startswith((" 1 ", " 0."))]
    assert rows == [["1", "22.7"], ["0.5", "kfac"], ["0.5", "svd"], ["0.1", "kfac"]]
    figure = measured_curve_figure([*FOUND, *other])
    (legend,) = figure.legends
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
    loss, _ = figure.axes
    kfac, svd, _ = loss.lines
    assert list(kfac.get_ydata()) == [0.5, 0.55, 0.9]  # type: ignore[arg-type]
    assert list(svd.get_ydata()) == [0.5, 0.7]  # type: ignore[arg-type]
    assert {kfac.get_label(), svd.get_label()} == {"kfac", "svd"}


def test_what_is_not_predicted_shows_its_error() -> None:
    found = [PredictedLoss("svd", 0.5, 0.25, None), PredictedLoss("kfac", 0.5, 0.1, 0.02)]
    assert any(
        "0.250" in line and "+0.0200" in line for line in shown(loss_curves_table(found, ""))
    )
