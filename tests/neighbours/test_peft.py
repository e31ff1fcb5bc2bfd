"""PEFT: adapters on factored layers, and factoring of models that have adapters."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear
from lrcompress.structure.plan import Plan
from tests.callbacks.conftest import Loader, Tagger, sentences

from .conftest import IDS, bert

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # peft's
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
GIVEN: dict[str, Any] = {"keep": 0.5, "method": "svd"}
INNER = "bert.encoder.layer.0.attention.self.query"


def summed(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch).logits.sum()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = bert()
    lrcompress.compress(model, [IDS], summed, **GIVEN)
    lrcompress.save_pretrained(model, tmp_path / "half")
    return tmp_path / "half"


def adapted(model: Any, targets: Any = ("left", "right"), **kwargs: Any) -> Any:
    given = targets if isinstance(targets, str) else list(targets)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=given, init_lora_weights=False, **kwargs)
    return get_peft_model(model, config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [("left", "right"), ("left",), "all-linear"], ids=str)
def test_adapters_on_a_factored_folder_train_save_load_and_merge(
    targets: Any, dora: bool, folder: Path, tmp_path: Path
) -> None:
    model = adapted(lrcompress.load_pretrained(folder), targets, use_dora=dora)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = logits(model)
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS).logits.square().sum().backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    wanted = logits(model)
    assert not torch.allclose(wanted, before, atol=1e-4)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(lrcompress.load_pretrained(folder), tmp_path / "adapter")
    assert logits(again.eval()).equal(wanted)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted)
    assert Plan.of(merged) == Plan.of(lrcompress.load_pretrained(folder))
    lrcompress.save_pretrained(merged, tmp_path / "merged")
    loaded = lrcompress.load_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), wanted)
    torch.testing.assert_close(logits(lrcompress.merge_dense(loaded)), wanted)


def test_what_reads_factors_refuses_those_with_adapters(folder: Path, tmp_path: Path) -> None:
    model = adapted(lrcompress.load_pretrained(folder))
    before = logits(model)
    message = re.escape(
        f"{INNER}' has adapters, which would be lost; merge the adapters first: mod"
    )
    with pytest.raises(LayerError, match=message):
        lrcompress.merge_dense(model)
    with pytest.raises(LayerError, match=message):
        lrcompress.save_pretrained(model.base_model.model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    message = re.escape("is wrapped by an adapter; merge the adapters first: model = model.merge_")
    with pytest.raises(LayerError, match=message):
        lrcompress.compress(model, [IDS], summed, keep=0.3, method="svd")
    assert logits(model).equal(before)


@pytest.mark.parametrize("kind", ["model", "mixed in"])
def test_a_model_with_adapters_is_factored_once_they_are_merged(kind: str) -> None:
    if kind == "model":
        model = adapted(bert(), ("query", "value"))
    else:
        model = bert()
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        try:
            model.add_adapter(config)
        except ValueError as error:  # a transformers newer than any PEFT that there is
            pytest.skip(str(error))
    with pytest.raises(LayerError, match=re.escape("query.base_layer' is wrapped by an adapter")):
        lrcompress.compress(model, [IDS], summed, **GIVEN)
    record = lrcompress.compress(model, [IDS], summed, exclude=["*.query.*", "*.value.*"], **GIVEN)
    assert not any("query" in layer.name for layer in record.layers)

    model = adapted(bert(), ("query", "value"))
    wanted = logits(model)
    merged = model.merge_and_unload()
    record = lrcompress.compress(merged, [IDS], summed, keep=1, method="svd", ranks={"*": 32})
    assert len(record.layers) == 12
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)


def test_a_module_saved_beside_adapters_is_no_target() -> None:
    model = adapted(bert(), ("query",), modules_to_save=["dense"])
    name = "base_model.model.bert.pooler.dense.original_module"
    with pytest.raises(LayerError, match="is wrapped by an adapter"):
        lrcompress.compress(model, [IDS], summed, targets=[name], **GIVEN)


class Adapted(Tagger):
    """The tagger with adapters on its blocks, as in a script that adds them itself."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        config = LoraConfig(r=2, target_modules=["up", "down"])
        self.blocks = get_peft_model(self.blocks, config)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        blocks, self.blocks = self.blocks, self.blocks.base_model.model
        try:
            return super().forward(batch)
        finally:
            self.blocks = blocks


@pytest.mark.parametrize(
    "callback",
    [
        lrcompress.Factorize(keep=0.5, **QUIET),
        lrcompress.Factorize(keep=0.5, method="svd", targets=["blocks.*"], **QUIET),
        lrcompress.LoSparse(keep=0.5, **QUIET),
        lrcompress.DSEE(keep=0.5, **QUIET),
    ],
    ids=lambda one: type(one).__name__,
)
def test_callbacks_refuse_a_model_with_adapters_before_the_first_step(
    callback: L.Callback, trainer: Make
) -> None:
    run = trainer(callback)
    with pytest.raises(LayerError, match="is wrapped by an adapter; merge the adapters first"):
        run.fit(Adapted(), Loader(sentences()))
    assert run.global_step == 0


def test_training_adapters_of_factors_in_a_fit_and_merging_them(trainer: Make) -> None:
    """First factored in a fit, then adapters on the factors are trained in another."""
    L.seed_everything(0, verbose=False)
    one = Tagger(dropout=0.0)
    ours = lrcompress.Factorize(keep=0.5, method="svd", at="epoch:1", **QUIET)
    trainer(ours, max_epochs=2).fit(one, Loader(sentences()))
    assert isinstance(one.blocks[0]["down"], LowRankLinear)
    one.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["left", "right"])
    inner = one.blocks
    peft = get_peft_model(inner, config)
    before = one(sentences(1)[0]).detach()
    trainer(max_epochs=2).fit(one, Loader(sentences()))
    wanted = one(sentences(1)[0]).detach()
    assert not torch.allclose(before, wanted)
    one.blocks = peft.merge_and_unload()
    torch.testing.assert_close(one(sentences(1)[0]).detach(), wanted)
    assert isinstance(one.blocks[0]["down"].left, nn.Linear)
