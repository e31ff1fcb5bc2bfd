"""Observation in real fits: what counts as a token, and what is said at the first batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import CheckpointError, ObservationError, SettingError

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"align": 1, "verbose": False, "validate": False, "report_path": None}


class Encoder(L.LightningModule):
    """torch's own encoder, which reads the length first unless it is told otherwise."""

    def __init__(self, batch_first: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.batch_first, self.cut = batch_first, cut
        self.embed = nn.Embedding(20, 16)
        block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.cut:
            longest = int(mask.sum(1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["input_ids"], batch["attention_mask"], batch["labels"]
        ids, mask, labels = batch
        return nn.functional.cross_entropy(self(ids, mask), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def padded(batches: list[dict[str, Tensor]], width: int) -> list[dict[str, Tensor]]:
    def wider(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        more = (0, width - batch["input_ids"].shape[1])
        both = {k: nn.functional.pad(batch[k], more) for k in ("input_ids", "attention_mask")}
        return batch | both

    return [wider(batch) for batch in batches]


def real_tokens(batches: list[dict[str, Tensor]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("size", [4, 7])  # of 7 tokens: a square too
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("method", ["kfac", "drone", "row_fisher"])
def test_tokens_are_those_of_the_mask_whatever_layers_read(
    batch_first: bool,
    size: int,
    cut: bool,
    method: str,
    batches: Make,
    loader: Make,
    trainer: Make,
) -> None:
    given = batches(6, size)
    data = padded(given, 12) if cut else given
    factorize = lrcompress.Factorize(0.5, "step:6", method, every_n_steps=1, **QUIET)
    torch.manual_seed(0)
    trainer(factorize, max_epochs=2).fit(Encoder(batch_first, cut), loader(data))
    (point,) = factorize.report.points
    assert point.observed["steps"] == 6
    assert point.observed["tokens"] == real_tokens(given)


def test_tuples_have_their_mask_by_its_index(batches: Make, loader: Make, trainer: Make) -> None:
    given = batches()
    data = [(b["input_ids"], b["attention_mask"], b["labels"]) for b in given]
    factorize = lrcompress.Factorize(0.5, "step:6", every_n_steps=1, mask=1, **QUIET)
    trainer(factorize, max_epochs=2).fit(Encoder(), loader(data))
    assert factorize.report.points[0].observed["tokens"] == real_tokens(given)


class Steps(L.Callback):
    """Counts the optimizer steps of a fit."""

    def __init__(self) -> None:
        self.taken = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.taken += 1


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ("attention_maks", r"the batch's 'attention_maks', which this batch does not have"),
        (lambda batch: batch["attention_mask"][:, :3], r"and the padding mask is for \(8, 3\)"),
        ("~attention_mask", r"all gradients lie .*: leave the ~ out, mask='attention_mask'"),
        (lambda batch: batch["attention_mask"].tolist(), r"expected a tensor as the padding mask"),
        ("input_ids", r"mask='input_ids' gives int64 \(8, \d\) with \d"),
    ],
    ids=["mistyped", "of another length", "inverted", "a list", "token ids"],
)
@pytest.mark.parametrize("method", ["kfac", "drone"])
def test_a_mask_that_cannot_be_used_is_said_at_the_first_batch(
    mask: Any, told: str, method: str, loader: Make, trainer: Make
) -> None:
    factorize = lrcompress.Factorize(0.5, "epoch:2", method, mask=mask, **QUIET)
    steps, module = Steps(), Encoder()
    with pytest.raises(ObservationError, match=told):
        trainer(factorize, steps).fit(module, loader())
    assert steps.taken <= 1  # gradients are there when the first step is taken
    assert not any(m._forward_hooks for m in module.modules())


class Twice(Encoder):
    """Calls everything twice in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


def test_a_layer_that_is_called_twice_is_said_at_the_first_batch(
    loader: Make, trainer: Make
) -> None:
    steps, factorize = Steps(), lrcompress.Factorize(0.5, "epoch:2", **QUIET)
    with pytest.raises(ObservationError, match=r"was called twice in one step: Factorize expects"):
        trainer(factorize, steps).fit(Twice(), loader())
    assert steps.taken == 0


class InTurns(Encoder):
    """Two forward and backward passes a step, as adversarial training has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("window", ["step:2", "step:6"])
def test_several_passes_in_a_step_are_looked_at_as_they_are_observed(
    window: str, loader: Make, trainer: Make
) -> None:
    factorize = lrcompress.Factorize(0.5, "step:6", window=window, every_n_steps=1, **QUIET)
    trainer(factorize).fit(InTurns(), loader())
    assert factorize.report.points[0].observed["steps"] >= 2


def test_the_first_look_adds_nothing(loader: Make, trainer: Make, tagger: Make) -> None:
    factorize = lrcompress.Factorize(0.5, "epoch:2", every_n_steps=1, window="step:2", **QUIET)
    trainer(factorize).fit(tagger(), loader())
    (point,) = factorize.report.points
    assert point.observed["steps"] == 2
    assert point.observed["skipped"] == 0


@pytest.mark.parametrize("mask", [True, 2.0, ["attention_mask"]])
def test_a_mask_of_no_kind_is_refused_at_once(mask: Any) -> None:
    for kind in (lrcompress.Factorize, lrcompress.FactorizeEmbedding, lrcompress.LoSparse):
        with pytest.raises(SettingError, match=r"mask is a key of the batch"):
            kind(0.5, mask=mask)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks")
def test_statistics_that_a_checkpoint_lacks_are_said_before_training(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def factorize(method: str) -> lrcompress.Factorize:
        return lrcompress.Factorize(0.5, "step:8", method, every_n_steps=1, **QUIET)

    trainer(factorize("drone"), every_step=True).fit(tagger(), loader())
    steps = Steps()
    told = (
        r"steps in which input_moment was observed, and Factorize now needs output_moment of them"
    )
    path = str(tmp_path / "step=4.ckpt")
    with pytest.raises(CheckpointError, match=told):
        trainer(factorize("kfac"), steps).fit(tagger(), loader(), ckpt_path=path)
    assert steps.taken == 0
    trainer(factorize("kfac")).fit(tagger(), loader(), ckpt_path=str(tmp_path / "step=2.ckpt"))


class NextTokens(L.LightningModule):
    """A language model of three linear layers, which makes its labels from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch["ids"] if isinstance(batch, dict) else batch[0]
        logits = self.head(self.down(self.up(self.embed(ids)).relu()))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_language_models_loss_is_predicted_without_labels_in_its_batches(
    trainer: Make, loader: Make
) -> None:
    tokens = [torch.randint(0, 20, (4, 25)) for _ in range(6)]
    found = []
    for data in ([(x,) for x in tokens], [{"ids": x, "labels": x[:, 1:]} for x in tokens]):
        factorize = lrcompress.Factorize(
            0.5, "step:6", every_n_steps=1, mask=None, targets=["up", "down"], **QUIET
        )
        torch.manual_seed(0)
        trainer(factorize, max_epochs=2).fit(NextTokens(), loader(data))
        found.append([layer.predicted_loss for layer in factorize.report.points[0].layers])
    without, labelled = found
    assert without == labelled  # 24 times too low, the length, where examples were counted


class Still(Encoder):
    """Steps that change nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_drawn_labels_count_all_rows_whatever_the_loss_leaves_out(
    batches: Make, loader: Make, trainer: Make
) -> None:
    (batch,) = batches(1)
    found = []
    for left_out in (0, 5):
        labels = batch["labels"].clone()
        labels[:left_out] = -100
        factorize = lrcompress.Factorize(
            0.5, "step:1", every_n_steps=1, fisher="model", logits="head", **QUIET
        )
        torch.manual_seed(0)
        trainer(factorize, max_epochs=2).fit(Still(), loader([batch | {"labels": labels}]))
        found.append([layer.predicted_loss for layer in factorize.report.points[0].layers])
    assert found[0] == found[1]  # 2.7 times less where the terms of the loss were taken
