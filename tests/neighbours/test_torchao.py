"""torchao: optimizers of few bits, and weights quantised before or after factoring."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchao import optim
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lrcompress
from lrcompress.errors import LayerError, NoMatchError
from lrcompress.nn import LowRankLinear
from lrcompress.structure.low_bit_state import is_low_bit
from tests.callbacks.conftest import Loader, Tagger, sentences

from .conftest import IDS, bert

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
OPTIMIZERS = {"8 bit": optim.AdamW8bit, "4 bit": optim.AdamW4bit, "fp8": optim.AdamWFp8}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


class Wide(Tagger):
    """Wide enough for state of few bits, of factors too."""

    def __init__(self, kind: str) -> None:
        super().__init__(width=96, dropout=0.0)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self.parameters(), lr=0.003)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_state_of_few_bits(kind: str, trainer: Make) -> None:
    L.seed_everything(0, verbose=False)
    made = Wide(kind)
    ours = lrcompress.Factorize(keep=0.7, at="epoch:1", every_n_steps=1, **QUIET)
    fit = trainer(ours, max_epochs=2)
    fit.fit(made, Loader(sentences()))
    factors = [p for m in made.modules() if isinstance(m, LowRankLinear) for p in m.factors]
    (optimizer,) = fit.optimizers
    assert len(factors) >= 4
    assert any(is_low_bit(optimizer.state[p]["exp_avg"]) for p in factors)
    assert all(float(optimizer.state[p]["step"]) == 12 for p in factors)
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_a_factored_folder_is_quantised_after_it_is_loaded(tmp_path: Path) -> None:
    model = bert(64)
    lrcompress.compress(model, [IDS], lambda m, x: m(x).logits.sum(), method="svd", keep=0.5)
    lrcompress.save_pretrained(model, tmp_path / "half")
    loaded = lrcompress.load_pretrained(tmp_path / "half").eval()
    quantize_(loaded, Int8WeightOnlyConfig())
    layer = loaded.bert.encoder.layer[0].intermediate.dense
    assert isinstance(layer, LowRankLinear)
    assert type(layer.left.weight) is not nn.Parameter
    with torch.no_grad():
        found, wanted = loaded(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    message = re.escape("query' are quantised (torch.float32, Int8Tensor); do this before they are")
    with pytest.raises(LayerError, match=message):
        lrcompress.merge_dense(loaded)


def test_quantised_weights_are_no_targets() -> None:
    model = bert(64)
    quantize_(model, Int8WeightOnlyConfig())
    given: Any = {"loss": lambda m, x: m(x).logits.sum(), "keep": 0.5, "method": "svd"}
    with pytest.raises(NoMatchError, match="its weight is quantised"):
        lrcompress.compress(model, [IDS], **given)
    name = "bert.encoder.layer.0.intermediate.dense"
    with pytest.raises(LayerError, match=re.escape(f"{name!r} cannot be factored: its weight is")):
        lrcompress.compress(model, [IDS], targets=[name], **given)


@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_that_are_quantised_are_not_factored_again(side: str) -> None:
    model = bert(64)
    given: Any = {"loss": lambda m, x: m(x).logits.sum(), "method": "svd"}
    lrcompress.compress(model, [IDS], keep=0.5, **given)
    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: name.endswith(side))
    with pytest.raises(NoMatchError, match="its weight is quantised"):
        lrcompress.compress(model, [IDS], keep=0.3, **given)
