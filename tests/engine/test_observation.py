"""Observation of a bare module: what it yields, adds up and refuses; more in test_compress.py."""

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.observation import observe, observe_batches
from lrcompress.errors import ObservationError, SettingError
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder

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


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("method", ["drone", "kfac"])
def test_parts_of_the_batches_add_up_and_the_model_is_as_it_was(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    batches = [torch.randn(5, 4) for _ in range(4)]
    chosen = METHODS[method]

    def statistics(*parts: list[Tensor]) -> Recorder:
        forward = not chosen.needs_gradients
        recorder = Recorder(model, ["0", "2"], chosen.kinds, forward_only=forward)
        for part in parts:
            observe_batches(recorder, model, part, loss)
        return recorder

    whole, parts = statistics(batches), statistics(batches[:1], batches[1:])
    for name in ("0", "2"):
        one, other = (x.statistics.of(name, chosen.kinds) for x in (whole, parts))
        torch.testing.assert_close(one.values, other.values)
        assert int(one.tokens) == int(other.tokens) == 20
    assert model.training
    assert model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_losses_that_are_not_finite_teach_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    recorder = Recorder(model, ["0"], METHODS["kfac"].kinds)
    batches = [torch.full((2, 4), torch.inf)]
    with pytest.raises(ObservationError, match="1 batches, none with a finite loss"):
        observe_batches(recorder, model, batches, loss)
