"""Settings that are checked when they are made; most are in test_engine.py, where they act."""

import pytest
import torch
from torch import nn

from lrcompress.engine import compress
from lrcompress.errors import SettingError
from lrcompress.settings import Settings


def test_tokens_to_measure_at_are_known_or_given() -> None:
    assert Settings(method="svd", keep_measured=True, measured_tokens=5).measured_tokens == 5
    assert Settings(method="drone", keep_measured=True).measured_tokens is None
    for given in (0, 2.5, True):
        with pytest.raises(SettingError, match="measured_tokens must be a whole number from 1"):
            Settings(measured_tokens=given)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="'svd' observes no steps .* give measured_tokens="):
        Settings(method="svd", keep_measured=True)


def test_layers_are_measured_at_the_tokens_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 8), nn.Linear(8, 8))
    batches = [torch.randn(count, 1024) for count in (60, 68)]
    record = compress(
        model,
        batches,
        lambda model, batch: model(batch).square().mean(),
        method="drone",
        keep=0.3,
        keep_measured=True,
    )
    wide, _, tiny = record.layers
    assert (tiny.rank, model[3].__class__) == (None, nn.Linear)
    assert tiny.note.endswith("× its time at 64 tokens")
    assert wide.rank is not None
    assert wide.note == record.note == ""
    assert record.keep <= 0.3
