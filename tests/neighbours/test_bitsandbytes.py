"""bitsandbytes: its optimizers go on, and say what they lose; its layers are no targets."""

import re
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear
from tests.callbacks.conftest import Loader, Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}


class Bits(Tagger):
    def __init__(self, kind: str) -> None:
        super().__init__(width=96, dropout=0.0)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return getattr(bnb.optim, self.kind)(self.parameters(), lr=0.001)


class Steps(L.Callback):
    """How far the factors go in the step after the change."""

    farthest = 0.0
    before: dict[str, Tensor] | None = None

    def on_structure_change(self, trainer: Any, module: nn.Module, changes: Any) -> None:
        names = [name for new in changes.values() for name in new]
        self.before = {name: module.get_parameter(name).detach().clone() for name in names}

    def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
        if self.before is not None:
            far = [
                float((module.get_parameter(n) - p).detach().abs().max())
                for n, p in self.before.items()
            ]
            self.farthest, self.before = max(far), None


@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "Lion8bit"])
def test_factors_start_without_state_and_steps_are_no_larger_for_it(
    kind: str, trainer: Make
) -> None:
    L.seed_everything(0, verbose=False)
    made, steps = Bits(kind), Steps()
    ours = lrcompress.Factorize(keep=0.7, at="epoch:1", every_n_steps=1, restart_steps=0, **QUIET)
    run = trainer(ours, steps, max_epochs=2)
    with pytest.warns(UserWarning, match=f"{kind} keeps state1.*: these start without state"):
        run.fit(made, Loader(sentences()))
    factors = [p for m in made.modules() if isinstance(m, LowRankLinear) for p in m.factors]
    assert len(factors) >= 4
    assert all(run.optimizers[0].state[p]["step"] == 6 for p in factors)
    assert 0 < steps.farthest < 0.002
    assert "these start without state" in ours.report.points[0].note


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers_are_refused_by_name(kind: str, trainer: Make) -> None:
    made = Tagger()
    for block in made.blocks:
        for name, layer in list(block.items()):
            block[name] = getattr(bnb.nn, kind)(layer.in_features, layer.out_features)
    message = re.escape(f"layer 'blocks.0.up' cannot be factored: it is a {kind} of bitsandbytes")
    run = trainer(lrcompress.Factorize(keep=0.5, **QUIET))
    with pytest.raises(LayerError, match=message):
        run.fit(made, Loader(sentences()))
    with pytest.raises(LayerError, match=message):
        lrcompress.compress(made, sentences(1), lambda m, x: m(x).sum(), keep=0.5, method="svd")
    assert torch.is_tensor(made.head.weight)
