"""The report in a terminal: every figure is there, under the layers it belongs to."""

import pytest
from rich.console import Console, RenderableType

from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.report.tables import plan_table, point_table, ranks_table, summary_table

from .conftest import searched

LAYERS = [
    LayerRecord("model.layer.0.query", 100, 100, 10, 0.2, 0.001),
    LayerRecord("model.layer.0.up", 400, 100, 20, 0.1, 0.002),
    LayerRecord("model.layer.1.query", 100, 100, 20, 0.4, 0.002),
    LayerRecord("model.layer.1.up", 400, 100, None, 0.0, 0.0, "the input metric was all zero"),
]


def lines(table: RenderableType, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.strip() for line in capture.get().splitlines() if line.strip()]


def row(table: RenderableType, first: str) -> list[str]:
    (found,) = (line for line in lines(table) if line.startswith(first))
    return found.removeprefix(first).split()


def point(**others: object) -> PointRecord:
    observed = {"steps": 12, "tokens": 34567, "skipped": 0, "bytes": 3 * 2**20}
    figures = {"before": {"val_loss": 0.5, "acc": 0.91}, "after": {"val_loss": 0.75, "acc": 0.85}}
    settings = {"observed": observed, "metrics": figures, "seconds": 2.0} | others
    return PointRecord("kfac", 40, list(LAYERS), 200_000, 150_000, **settings)  # type: ignore[arg-type]


def test_the_same_layer_of_every_block_is_one_row() -> None:
    table = ranks_table(LAYERS, "Title")
    text = "\n".join(lines(table))
    assert "Title" in text
    assert "model.layer.*" in text
    assert row(table, "query") == ["2", "100×100", "10–20", "0.300", "0.300", "0.600"]
    rank, kept = 20 * 500, 400 * 100
    share = f"{(rank + kept) / (2 * kept):.3f}"
    assert row(table, "up") == ["2", "1", "400×100", "20", share, "0.050", "0.400"]


def test_layers_of_one_rank_and_layers_left_dense_say_so() -> None:
    alike = [LAYERS[0], LayerRecord("model.layer.1.query", 100, 100, 10, 0.2, None)]
    assert row(ranks_table(alike, ""), "query") == ["2", "100×100", "10", "0.200", "0.200"]
    assert row(ranks_table([LAYERS[3]], ""), "up")[:3] == ["1", "1", "400×100"]


@pytest.mark.parametrize("names", [["head"], ["0", "2"], ["0.up", "1.up"]])
def test_layers_without_a_common_path_keep_their_names(names: list[str]) -> None:
    layers = [LayerRecord(name, 10, 10, 2, 0.1, None) for name in names]
    text = "\n".join(lines(ranks_table(layers, "Title")))
    for name in {"up" if "." in name else name for name in names}:
        assert name in text


def test_a_point_says_what_was_observed_what_remains_and_what_was_noted() -> None:
    text = "\n".join(lines(point_table(point())))
    assert "kfac at step 40, 2.0 s" in text
    assert "34,567 tokens in 12 steps, 3 MiB" in text
    assert "the whole model 0.750 of its parameters" in text
    assert "model.layer.1.up: the input metric was all zero" in text
    skipped = point(observed={"steps": 12, "tokens": 1, "skipped": 2, "bytes": 0})
    assert "12 steps, 2 skipped" in "\n".join(lines(point_table(skipped)))
    assert "tokens" not in "\n".join(lines(point_table(point(observed={"steps": 0}))))


def test_what_is_alike_in_several_blocks_is_noted_once() -> None:
    noted = [
        LayerRecord(f"h.{i}.down", 8, 8, 2, 0.1, None, f"not narrowed: 'h.{i}.up' is factored")
        for i in range(3)
    ]
    alone = LayerRecord("h.1.up", 8, 8, 2, 0.1, None, "its rank is 2")
    text = lines(point_table(PointRecord("kfac", 4, [*noted, alone], 900, 800)))
    assert "h.*.down: not narrowed: 'h.*.up' is factored (3 layers)" in text
    assert "h.1.up: its rank is 2" in text
    assert not any("h.2" in line for line in text)


def test_a_summary_puts_dense_each_point_and_the_end_side_by_side() -> None:
    speed = {"dense": 0.2, "factored": 0.1}
    report = Report([point(), point()], {"val_loss": 0.45, "acc": 0.9}, speed)
    table = summary_table(report)
    assert row(table, "val_loss") == ["0.5000", "0.7500", "0.7500", "0.4500"]
    assert row(table, "acc") == ["0.9100", "0.8500", "0.8500", "0.9000"]
    assert row(table, "all parameters") == ["200,000", "150,000", "150,000", "150,000"]
    assert "0.750" in "\n".join(lines(table))
    assert row(table, "measured change of val_loss") == ["+0.2500", "+0.2500", "-0.0500"]
    assert row(table, "seconds per step") == ["0.2000", "0.1000"]


def test_a_summary_leaves_blank_what_was_not_measured() -> None:
    unknown = point(metrics={})
    unknown.layers = [LayerRecord("a", 10, 10, 2, 0.1, None)]
    text = "\n".join(lines(summary_table(Report([unknown]))))
    for absent in ("val_loss", "predicted", "seconds"):
        assert absent not in text
    table = summary_table(Report([point(), point(metrics={})]))
    assert row(table, "predicted change of loss") == ["+0.0050"]
    assert row(table, "measured change of val_loss") == ["+0.2500"]


def test_a_summary_of_a_run_without_points_in_it_is_not_asked_for() -> None:
    assert row(summary_table(Report([point()])), "all parameters") == ["200,000", *["150,000"] * 2]


def test_a_share_of_the_model_is_of_the_one_before_the_first_change() -> None:
    text = "\n".join(lines(point_table(point(), whole=300_000)))
    assert "the whole model 0.500 of its parameters" in text


def test_a_plan_for_layers_that_are_replaced_already_counts_from_what_stands_there() -> None:
    factored = LayerRecord("model.layer.0.up", 100, 100, 10, None, None, stood=6000)
    dense = LayerRecord("model.layer.1.up", 100, 100, 20, None, None)
    text = "\n".join(lines(plan_table([factored, dense], "Title", 17_000, 0, [])))
    assert "targeted layers: 16,000 → 6,000 parameters (0.300 of 20,000 in dense ones)" in text
    assert "whole model: 17,000 → 7,000 (0.412)" in text


def test_a_point_shows_every_trial_and_says_that_they_are_no_test() -> None:
    table = point_table(searched())
    assert row(table, "keep 0.5") == ["0.496", "0.9150", "-0.0051", "within"]
    assert row(table, "keep 0.25") == ["0.248", "not", "finite", "too", "much"]
    assert row(table, "keep 0.37") == ["0.361", "0.8931", "+0.0168", "within,", "taken"]
    assert "no test of the result" in "\n".join(lines(table))
