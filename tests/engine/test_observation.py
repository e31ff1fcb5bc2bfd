"""Observation of a bare module: what it yields, and what it refuses."""

import pytest
import torch

from lrcompress.engine.observation import observe
from lrcompress.errors import SettingError

from .test_compress import Net, a_batch, loss_of, read_by


def test_observe_yields_a_recorder_of_the_method_s_statistics() -> None:
    model = Net()
    with observe(model, method="drone", exclude=["*.down"]) as recorder:
        assert set(recorder.layers) == {"blocks.0.up", "blocks.1.up"}
        assert recorder.kinds == ("input_moment",)
        batch = a_batch()
        with recorder.step(batch["attention_mask"]):
            loss_of(model, batch).backward()
    sums = recorder.statistics.of("blocks.1.up", ["input_moment"])
    real = read_by(model.eval(), "blocks.0.up", [batch])
    assert sums.tokens == len(real)
    found = recorder.statistics.of("blocks.0.up", ["input_moment"]).moment("input_moment")
    torch.testing.assert_close(found.double(), real.mT @ real, rtol=1e-4, atol=1e-4)


def test_observe_refuses_what_it_does_not_know() -> None:
    with (
        pytest.raises(SettingError, match=r"statistics are input_moment, .*; got 'inputs'"),
        observe(Net(), kinds=["inputs"]),
    ):
        pass
    with (
        pytest.raises(SettingError, match=r"method must be one of .*; got 'kfacc', nearest: kfac"),
        observe(Net(), method="kfacc"),
    ):
        pass
