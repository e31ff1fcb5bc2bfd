"""Two models in turns, and what their layers take."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrcompress.bench import TorchModel, compare
from lrcompress.errors import SettingError
from lrcompress.structure.plan import LayerPlan, Plan


class Net(nn.Module):
    """A wide layer, one that is not factored, and a tiny one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.rest = nn.Linear(512, 1024), nn.Linear(1024, 512)
        self.tiny = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.wide(x)) + self.tiny(x[0, 0, :4]).sum()


def factored(model: nn.Module) -> nn.Module:
    layers = (
        LayerPlan("wide", "low_rank", {"in": 512, "out": 1024, "rank": 16}),
        LayerPlan("tiny", "low_rank", {"in": 4, "out": 4, "rank": 1}),
    )
    return Plan(layers).apply_(copy.deepcopy(model))


def test_the_ideal_is_that_of_the_layers_alone() -> None:
    dense = Net()
    pair = TorchModel("small", factored(dense)), TorchModel("dense", dense)
    run = compare(*pair, {"x": torch.randn(8, 32, 512)}, device="cpu", rounds=9)
    assert (run.batch, run.length, list(run.speeds)) == (8, 32, ["small", "dense"])
    wide, tiny = run.layers
    assert (wide.name, wide.rank, wide.keep) == ("wide", 16, 16 * 1536 / (512 * 1024))
    assert (tiny.name, tiny.keep) == ("tiny", 0.5)
    assert wide.ratio < 0.5
    assert run.slower == [tiny]  # two calls in place of one
    assert 0.25 < wide.share < 0.75  # of two products as large as each other
    assert run.ideal == pytest.approx(1 / (1 - wide.share * (1 - wide.keep)), rel=0.1)
    assert run.faster is not None
    assert 1.2 < run.faster < 1.2 * run.ideal
    assert all(len(speed.seconds) == 9 for speed in run.speeds.values())


def test_without_a_reference_or_common_layers_there_is_no_ideal() -> None:
    batch = {"x": torch.randn(2, 3, 512)}
    dense = TorchModel("dense", Net())
    alone = compare(dense, None, batch, device="cpu", rounds=1)
    assert (alone.faster, alone.ideal, alone.layers) == (None, None, [])
    twice = compare(TorchModel("other", Net()), dense, batch, device="cpu", rounds=1)
    assert twice.faster is not None
    assert (twice.ideal, twice.layers) == (None, [])
    with pytest.raises(SettingError, match="two models are called 'dense'; give them two names"):
        compare(dense, dense, batch, device="cpu", rounds=1)
