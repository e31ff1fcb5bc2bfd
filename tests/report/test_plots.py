"""What is drawn is what was recorded."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from lrcompress.report import LayerRecord, Report
from lrcompress.report.keep_curves import PredictedLoss
from lrcompress.report.plots import Plot, loss_curves_figure, pixels, plots

from .conftest import factorized, pruned


def named(report: Report) -> dict[str, Plot]:
    found = plots(report)
    assert len({plot.name for plot in found}) == len(found)
    return {plot.name: plot for plot in found}


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in figure.axes[0].lines
    }


def test_sizes_are_drawn_over_the_blocks_by_kind(whole: Report) -> None:
    found = named(whole)
    assert lines(found["ranks"].figure)["up"] == ([0, 1], [4, 4])
    assert lines(found["ranks"].figure)["out"] == ([0, 1], [2, 2])
    assert lines(found["rows"].figure)["out"] == ([0, 1], [3, 3])
    assert lines(found["kept"].figure)["out"] == ([0, 1], [95 / 200, 96 / 200])
    assert lines(found["losses"].figure)["down"] == ([0, 1], [0.3, 0.3])


def test_a_layer_left_dense_is_hollow() -> None:
    point = factorized()
    point.layers[0] = LayerRecord("model.layer.0.up", 10, 20, None, 0.0, 0.0)
    found = named(Report([point]))
    assert lines(found["ranks"].figure)["up"] == ([1], [4])
    plot = found["kept"]
    assert "Hollow: left dense." in plot.caption
    full, hollow = (line for line in plot.figure.axes[0].lines if line.get_color() == "#0b6bb0")
    assert (list(full.get_xdata()), list(hollow.get_xdata())) == ([1], [0])  # type: ignore[arg-type]
    assert list(hollow.get_ydata()) == [1.0]  # type: ignore[arg-type]
    assert hollow.get_markerfacecolor() == "none"


def test_the_budget_falls_at_points_and_while_pruning(whole: Report) -> None:
    drawn = lines(named(whole)["budget"].figure)
    keep = whole.points[0].keep
    assert drawn["kfac"] == ([0, 40, 40, 90], [1, 1, keep, keep])
    steps, kept = drawn["LoSparse"]
    assert steps == [0, 50, 60, 80, 90]
    assert kept == [1, 0.9, 0.6, whole.points[1].keep, whole.points[1].keep]


def test_validation_is_drawn_with_the_points(whole: Report) -> None:
    axes = named(whole)["history0"].figure.axes[0]
    assert axes.get_ylabel() == "val_loss"
    curve, first, second, dense = axes.lines
    assert list(curve.get_xdata()) == [20, 40, 40, 90]  # type: ignore[arg-type]
    assert list(curve.get_ydata()) == [0.6, 0.5, 0.7, 0.45]  # type: ignore[arg-type]
    assert (first.get_xdata()[0], second.get_xdata()[0]) == (40, 80)  # type: ignore[index]
    assert list(dense.get_ydata()) == [0.5, 0.5]  # type: ignore[arg-type]


def test_a_figure_that_was_noted_at_the_step_of_a_point_was_taken_before_it() -> None:
    report = Report([factorized()], {}, {}, {"acc": ((40, 0.88), (60, 0.89))})
    curve = named(report)["history0"].figure.axes[0].lines[0]
    assert list(curve.get_ydata()) == [0.88, 0.9, 0.8, 0.89]  # type: ignore[arg-type]


def test_curves_have_the_chosen_cuts(whole: Report) -> None:
    found = named(Report([factorized()]))
    curve, dot, *_ = found["curves0"].figure.axes[0].lines
    assert list(curve.get_xdata()) == [30 / 200, 120 / 200, 240 / 200]  # type: ignore[arg-type]
    assert list(curve.get_ydata()) == [0.9, 0.5, 0.0]  # type: ignore[arg-type]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([120 / 200], [0.2])  # type: ignore[arg-type]
    assert found["curves1"].title == "Error curves: down"
    drawn = lines(found["measured"].figure)
    assert drawn["up"] == ([0.3, 0.3], [0.1, 0.1])


@pytest.mark.parametrize(
    ("layer", "kept", "score"),
    [({"rows": 6}, 6, 0.2 * 0.05**0.2), ({"rows": 0}, 2, 0.9 * (2 / 9) ** 0.25)],
)
def test_importance_has_as_many_as_were_kept(
    layer: dict[str, int | None], kept: int, score: float
) -> None:
    point = pruned()
    point.layers = [replace(one, **({"entries": None} | layer)) for one in point.layers]  # type: ignore[arg-type]
    curve, dot, *_ = named(Report([point]))["importance0"].figure.axes[0].lines
    assert list(curve.get_ydata()) == [0.9, 0.2, 0.01]  # type: ignore[arg-type]
    assert list(dot.get_xdata()) == [kept]  # type: ignore[arg-type]
    assert list(dot.get_ydata()) == pytest.approx([score])  # type: ignore[arg-type]


def test_what_is_not_known_is_not_drawn() -> None:
    bare = factorized(metrics={})
    bare.layers = [LayerRecord("head", 10, 20, 4, None, None)]
    assert list(named(Report([bare]))) == ["budget"]  # without blocks there is no depth
    for block in range(2):
        bare.layers.append(LayerRecord(f"layer.{block}.up", 10, 20, 0, None, None, rows=3))
    found = named(Report([bare]))
    assert list(found) == ["budget", "rows", "kept"]  # ranks of 0 say nothing
    assert lines(found["kept"].figure).keys() >= {"up"}
    assert "head" not in lines(found["kept"].figure)
    assert [plot.detail for plot in found.values()] == [False, True, True]


def test_pixels_are_an_image_on_white(whole: Report) -> None:
    image = pixels(named(whole)["ranks"].figure)
    assert image.dtype == np.uint8
    assert image.shape == (324, 500, 3)
    assert (image[0, 0] == 255).all()
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_a_loss_curve_is_drawn_where_the_loss_is_known() -> None:
    found = [PredictedLoss("kfac", k, 0.1, k / 2) for k in (0.5, 0.2)]
    found += [PredictedLoss("svd", 0.5, 0.3, None), PredictedLoss("kfac", 0.01, None, None)]
    assert lines(loss_curves_figure(found)) == {"kfac": ([0.5, 0.2], [0.25, 0.1])}


def test_axes_keep_their_height_however_many_names_there_are() -> None:
    heights = []
    for count in (2, 24):
        point = factorized()
        names = [f"{block}.kind{i}" for block in range(2) for i in range(count)]
        point.layers = [LayerRecord(name, 10, 20, 4, 0.1, None) for name in names]
        figure = named(Report([point]))["ranks"].figure
        pixels(figure)
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.1)


def test_labels_lie_within_the_figure_and_clear_of_the_legend(whole: Report) -> None:
    whole.history["perplexity of the test"] = ((20, 6_400_000.0), (40, 0.001))
    for plot in plots(whole):
        pixels(plot.figure)  # lays it out
        (axes,), legends = plot.figure.axes, plot.figure.legends
        width, height = plot.figure.canvas.get_width_height()
        box = axes.get_tightbbox()
        assert box is not None
        assert 0 <= box.x0 < box.x1 <= width, plot.name
        assert sum(one.get_window_extent().y1 for one in legends) <= box.y0, plot.name
        assert box.y1 <= height, plot.name
