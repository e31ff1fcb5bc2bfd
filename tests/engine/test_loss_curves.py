"""A predicted loss is what a cut then does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.compress import compress
from lrcompress.engine.loss_curves import loss_curves
from lrcompress.engine.observation import observe
from lrcompress.engine.settings import Settings
from lrcompress.objective import COMPARABLE, LOW_RANK, METHODS
from lrcompress.statistics.moments import Statistics

KINDS = tuple(dict.fromkeys(kind for method in METHODS.values() for kind in method.kinds))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU())


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean()


def observed(model: nn.Module, batches: list[Tensor]) -> Statistics:
    with observe(model, kinds=KINDS) as recorder:
        for batch in batches:
            with recorder.step(keep_outputs=True):
                value = loss(model, batch)
                recorder.commit(float(len(batch)))
                torch.autograd.grad(value, recorder.outputs)
    return recorder.statistics


@pytest.mark.parametrize("method", LOW_RANK)
def test_it_says_what_compressing_with_that_keep_records(model: nn.Module, method: str) -> None:
    batches = [torch.randn(16, 12) for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    settings = Settings(align=2)
    found = loss_curves(model, observed(model, batches), settings, [method], [0.7, 0.4, 0.01])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for one in found[:2]:
        record = compress(
            copy.deepcopy(model), batches, loss, mask=None, method=method, keep=one.keep, align=2
        )
        errors = [layer.error or 0.0 for layer in record.layers]
        assert one.error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert (one.predicted_loss is not None) == (method in COMPARABLE)
        if one.predicted_loss is not None:
            assert one.predicted_loss == pytest.approx(record.predicted_loss, rel=1e-4)
            assert one.predicted_loss > 0
    assert (found[2].error, found[2].predicted_loss) == (None, None)


def test_every_method_is_there_at_every_keep(model: nn.Module) -> None:
    found = loss_curves(model, observed(model, [torch.randn(16, 12)]), Settings(), LOW_RANK)
    assert len({(one.method, one.keep) for one in found}) == len(found) == 7 * 10


def test_what_is_measured_on_the_machine_at_a_point_does_not_stand_in_its_way(
    model: nn.Module,
) -> None:
    statistics = observed(model, [torch.randn(16, 12)])
    plain = loss_curves(model, statistics, Settings(method="kfac"), LOW_RANK)
    measured = Settings(method="kfac", keep_measured=True)
    assert loss_curves(model, statistics, measured, LOW_RANK) == plain
