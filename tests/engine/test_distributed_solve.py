"""Layers dealt over processes give what one process gives, with the processes played in turn."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.compress import factor_
from lrcompress.engine.distributed_solve import LayerSummary, Solutions, solve_layers
from lrcompress.engine.settings import Settings
from lrcompress.nn import LowRankLinear
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.surgery import carry_later, swap_parameters_


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 30))


def solved(processes: Processes) -> Solutions:
    names, plain = ["0", "1", "2", "3"], Statistics()
    return solve_layers(
        model(), names, plain, "svd", refit_bias=False, shrink=(0.0, 0.0), processes=processes
    )


@pytest.mark.parametrize("size", [2, 3])
def test_every_layer_is_solved_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = solved(ONE_PROCESS)
    told: dict[str, LayerSummary] = {}
    others = [dict(alone.measured)]  # what processes that are not there would tell
    monkeypatch.setattr(Processes, "run_on_all", lambda _, work: told.update(work()) or others)
    owned = [name for index in range(size) for name in solved(Processes(index, size)).own]
    assert sorted(owned) == ["0", "1", "2", "3"]
    for name, one in alone.measured.items():
        assert torch.equal(told[name].energies, one.energies)


def test_what_is_known_of_a_layer() -> None:
    for name, one in solved(ONE_PROCESS).measured.items():
        values = torch.linalg.svdvals(model()[int(name)].weight.detach().double()).square()
        torch.testing.assert_close(one.energies, values)
        error = float((values[3:].sum() / values.sum()).sqrt())
        assert one.error(3) == pytest.approx(error)
        assert one.error(None) == one.loss(None) == 0.0
        assert one.loss(3) is None


def test_optimizer_state_gets_its_shape_before_its_values() -> None:
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    new = LowRankLinear.in_place_of(layer, 2)
    fresh = (new.right.weight, new.left.weight)
    swap_parameters_([optimizer], [layer.weight], fresh, carry_later(fresh))
    for parameter in fresh:
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert not state["exp_avg"].any()
        assert state["step"] == 1


def test_one_alone_is_the_default() -> None:
    one, other = model(), copy.deepcopy(model())
    settings = Settings(method="svd", keep=0.5, targets=["*"], align=1)
    records = [
        factor_(one, Statistics(), settings),
        factor_(other, Statistics(), settings, processes=ONE_PROCESS),
    ]
    assert replace(records[0], seconds=0.0) == replace(records[1], seconds=0.0)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
