"""The model card has the figures of the report and says how to load."""

from lrcompress.export.model_card import model_card
from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.structure.plan import Plan

from .conftest import made


def report() -> Report:
    layer = LayerRecord("bert.encoder.layer.0.output.dense", 16, 24, 3, 0.1, 0.01)
    first = PointRecord("kfac", 5, [layer], 900, 700)
    last = PointRecord("svd", 9, [layer], 900, 600)
    first.metrics = {"before": {"val_accuracy": 0.91}, "after": {"val_accuracy": 0.85}}
    last.metrics = {"before": {"val_accuracy": 0.9}, "after": {"val_accuracy": 0.8}}
    return Report([first, last], {"val_accuracy": 0.88, "val_loss": 0.25})


def test_a_card_has_every_figure_and_how_to_load() -> None:
    model = made("bert")
    text = model_card(model, Plan.of(model), report())
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "# BertForSequenceClassification, 12 of its layers" in text
    assert "Method `kfac`, `svd`." in text
    assert "1 targeted layers keep 0.312 of their parameters, the whole model 0.667." in text
    assert "| val_accuracy | 0.9100 | 0.8000 | 0.8800 |" in text
    assert "| val_loss |  |  | 0.2500 |" in text
    assert "import lrcompress.export" in text
    assert "lrcompress.load_pretrained" in text
    before, after = 5491, sum(p.numel() for p in model.parameters())
    assert f"{after:,} of {before:,} parameters remain" in text


def test_a_card_without_a_report_says_what_is_known() -> None:
    model = made("bert")
    for nothing in (None, Report()):
        text = model_card(model, Plan.of(model), nothing)
        assert "What was done" not in text
        assert "parameters remain (0.575)" in text
    unmeasured = report()
    unmeasured.final = {}
    for point in unmeasured.points:
        point.metrics = {}
    assert "just after" not in model_card(model, Plan.of(model), unmeasured)


def test_a_card_of_a_checkpoint_has_the_last_figures_that_were_taken() -> None:
    """The run had not ended when it was written."""
    going, model = report(), made("bert")
    going.final, going.history = {}, {"val_accuracy": ((9, 0.8), (12, 0.875))}
    text = model_card(model, Plan.of(model), going)
    assert "| | before | just after compression | at step 12 |" in text
    assert "| val_accuracy | 0.9100 | 0.8000 | 0.8750 |" in text
