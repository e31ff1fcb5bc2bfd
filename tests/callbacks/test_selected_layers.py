"""Layers that are targeted and stay as they are, by their names and the reasons."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lrcompress

Make = Callable[..., Any]


@pytest.mark.parametrize(
    "callback",
    [
        lambda: lrcompress.Factorize(keep=0.5, at=0.5, report_path=None),
        lambda: lrcompress.Factorize(keep=0.5, at=0.5, method="svd", report_path=None),
        lambda: lrcompress.LoSparse(keep=0.5, report_path=None),
    ],
)
def test_layers_that_stay_are_said_with_the_reason(
    callback: Callable[[], Any],
    tagger: Make,
    loader: Make,
    trainer: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, made = tagger(), callback()
    model.blocks[1]["attention"] = torch.nn.MultiheadAttention(16, 2)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(made).fit(model, loader(), loader())
    told = (
        "1 layer stays as it is, blocks.1.attention.out_proj: nn.MultiheadAttention reads its "
        "weight without calling it, as its in_proj_weight"
    )
    assert f"lrcompress: {told}" in caplog.messages
    assert told in made.report.points[0].note
