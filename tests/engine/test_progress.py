"""Those who wait hear of each layer while it is worked on."""

import torch
from torch import Tensor, nn

from lrcompress.engine.compress import factor_
from lrcompress.engine.passes import Passes
from lrcompress.engine.progress import untracked
from lrcompress.engine.settings import Settings
from lrcompress.statistics.moments import Statistics

from .test_refit import Net, data, loss_of


def test_layers_are_told_one_by_one_with_what_is_done_to_them() -> None:
    told: list[tuple[str, str]] = []

    def track(names: list[str], what: str) -> list[str]:
        told.extend((what, name) for name in names)
        return names

    def run(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model, batch)

    passes = Passes(data(), run, lambda _: (None, None, None))
    asked = Settings(method="svd", keep=0.5, refit=0.5, align=1)
    quiet, model = Net(), Net()
    factor_(quiet, Statistics(), asked, passes=passes)
    factor_(model, Statistics(), asked, passes=passes, track=track)  # type: ignore[arg-type]
    layers = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("mix", "gate", "up", "down")]
    assert [name for what, name in told if what == "solving"] == layers
    assert [name for what, name in told if what == "refitting"] == ["blocks.0", "blocks.1"]
    assert {what for what, _ in told} == {"solving", "refitting"}
    assert all(torch.equal(x, quiet.state_dict()[key]) for key, x in model.state_dict().items())


def test_without_a_listener_names_come_as_they_are() -> None:
    assert list(untracked(["a", "b"], "solving")) == ["a", "b"]
