"""What a language model writes before layers are replaced and at the end stands in the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrcompress
from lrcompress.report import Report, SampleText

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
OPTIONS: dict[str, Any] = {"verbose": False, "validate": False, "every_n_steps": 2}


def writing(tagger: Make, answer: Callable[[Any], Mapping[str, str]]) -> Any:
    """A tagger that can be asked for samples."""
    model = tagger()
    vars(model)["sample_texts"] = lambda: answer(model)
    return model


def layer_of(model: Any) -> str:
    return type(model.blocks[0]["up"]).__name__


def test_it_is_asked_before_the_first_point_and_at_the_end(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    callback = lrcompress.Factorize(
        [0.6, 0.4], at=["step:6", "step:12"], report_path=str(path), **OPTIONS
    )
    state: list[tuple[bool, bool]] = []

    def answer(model: Any) -> dict[str, str]:
        state.append((model.training, torch.is_grad_enabled()))
        return {"A layer is": layer_of(model)}

    model = writing(tagger, answer)
    trainer(callback).fit(model, loader())
    wanted = [SampleText("A layer is", "Linear", "LowRankLinear")]
    assert callback.report.samples == wanted
    assert Report.load(path).samples == wanted
    assert state == [(False, False)] * 2
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "What it writes" in page
    assert "<p>LowRankLinear</p>" in page


def test_asking_changes_nothing_of_the_run(tagger: Make, loader: Make, trainer: Make) -> None:
    weights: list[Tensor] = []
    for model in (tagger(), writing(tagger, lambda model: {"a": str(torch.randn(3))})):
        torch.manual_seed(1)
        callback = lrcompress.Factorize(0.5, at="step:6", report_path=None, **OPTIONS)
        trainer(callback).fit(model, loader())
        weights.append(model.head.weight)
    assert torch.equal(*weights)


def test_what_cannot_be_sampled_ends_no_run(tagger: Make, loader: Make, trainer: Make) -> None:
    def answer(model: Any) -> dict[str, str]:
        raise RuntimeError("no words")

    callback = lrcompress.Factorize(0.5, at="step:6", report_path=None, **OPTIONS)
    with pytest.warns(UserWarning, match="could not sample what the model writes.*no words"):
        trainer(callback).fit(model := writing(tagger, answer), loader())
    assert callback.report.points
    assert not callback.report.samples
    assert model.training


def test_a_trial_run_asks_nothing(tagger: Make, loader: Make, trainer: Make) -> None:
    callback = lrcompress.Factorize(0.5, at="step:6", report_path=None, **OPTIONS)
    model = writing(tagger, lambda model: {"a": "b"})
    trainer(callback, fast_dev_run=True).fit(model, loader())
    assert callback.report.points
    assert not callback.report.samples


def test_several_callbacks_ask_once_of_the_dense_model(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    asked: list[str] = []

    def answer(model: Any) -> dict[str, str]:
        asked.append(layer_of(model))
        return {"a": asked[-1]}

    made = [
        lrcompress.Factorize(0.5, at=at, targets=[f"*.{part}"], report_path=None, **OPTIONS)
        for at, part in (("step:6", "up"), ("step:12", "down"))
    ]
    trainer(*made).fit(writing(tagger, answer), loader())
    assert asked == ["Linear", "LowRankLinear"]
    joined = Report.joined(one.report for one in made)
    assert joined.samples == [SampleText("a", "Linear", "LowRankLinear")]
