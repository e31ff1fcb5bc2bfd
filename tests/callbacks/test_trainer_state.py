"""How long a run is, and where its points lie, whatever makes its epochs differ."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lrcompress
from lrcompress.callbacks.trainer_state import run_lengths
from lrcompress.errors import PlatformError, SettingError
from lrcompress.nn import LowRankLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:.*GradientAccumulationScheduler.*"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"align": 1, "verbose": False, "validate": False, "report_path": None}


class Looks(L.Callback):
    """Notes how long the run is thought to be, and before which step layers are factored."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.lengths = run_lengths(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: object
    ) -> None:
        factored = any(isinstance(m, LowRankLinear) for m in module.modules())
        if factored and not hasattr(self, "first"):
            self.first = trainer.global_step


class Endless(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, batches: list[Any], num: int) -> None:
        self.batches, self.num = batches, num

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.num):
            yield self.batches[number % len(self.batches)]


@pytest.mark.parametrize(
    ("scheduling", "at", "steps", "total"),
    [
        ({0: 3}, 0.5, 4, 8),  # 6 batches an epoch, 4 epochs
        ({0: 1, 1: 2, 3: 6}, 0.5, 6, 13),  # 6 + 3 + 3 + 1 steps
        ({0: 1, 1: 2, 3: 6}, "epoch:2", 9, 13),
        ({2: 4}, "epoch:3", 14, 16),  # of 4 batches, then of the two that are left
    ],
)
def test_a_point_lies_where_accumulation_puts_it(
    scheduling: dict[int, int],
    at: float | str,
    steps: int,
    total: int,
    tagger: Make,
    loader: Make,
    trainer: Make,
) -> None:
    looks, factorize = Looks(), lrcompress.Factorize(0.4, at, **QUIET)
    scheduler = GradientAccumulationScheduler(scheduling)
    run = trainer(factorize, looks, scheduler, max_epochs=4)
    run.fit(tagger(), loader())
    assert looks.lengths[0] == run.global_step == total
    assert [point.step for point in factorize.report.points] == [steps]
    assert looks.first == steps


def test_max_steps_and_accumulation_go_together(tagger: Make, loader: Make, trainer: Make) -> None:
    looks, factorize = Looks(), lrcompress.Factorize(0.4, 0.5, **QUIET)
    scheduler = GradientAccumulationScheduler({1: 2})
    run = trainer(factorize, looks, scheduler, max_epochs=None, max_steps=10)
    run.fit(tagger(), loader())
    assert looks.lengths[0] == run.global_step == 10
    assert [point.step for point in factorize.report.points] == [5]


@pytest.mark.parametrize(
    ("options", "limits", "steps"),
    [
        ({"at": "step:10", "window": "step:5"}, {"max_epochs": 3}, 10),
        ({"at": 0.5}, {"max_steps": 40, "max_epochs": None}, 20),  # the default window
        ({"at": "step:10"}, {"max_epochs": -1, "max_steps": 15}, 10),
        ({"at": "step:10", "restart_steps": 0.2}, {"max_epochs": 3}, 10),
    ],
)
def test_data_without_a_length_needs_none_where_a_step_or_max_steps_says_it(
    options: dict[str, Any],
    limits: dict[str, Any],
    steps: int,
    tagger: Make,
    batches: Make,
    trainer: Make,
) -> None:
    factorize = lrcompress.Factorize(0.4, **options, **QUIET)
    data = DataLoader(Endless(batches(), 8), batch_size=None)
    module = tagger()
    trainer(factorize, **limits).fit(module, data)
    (point,) = factorize.report.points
    assert point.step == steps
    assert point.observed["steps"] >= 1
    assert isinstance(module.blocks[0]["up"], LowRankLinear)


def test_losparse_needs_no_length_where_its_phases_are_steps(
    tagger: Make, batches: Make, trainer: Make
) -> None:
    losparse = lrcompress.LoSparse(
        0.5, prune_from="step:3", prune_until="step:8", verbose=False, report_path=None
    )
    data = DataLoader(Endless(batches(), 8), batch_size=None)
    trainer(losparse, max_epochs=3).fit(tagger(), data)
    assert [point.step for point in losparse.report.points] == [8]


class Optimized(L.LightningModule):
    """A tagger with optimizers of its own choice."""

    def __init__(self, inner: L.LightningModule, make: Make) -> None:
        super().__init__()
        self.inner, self.make = inner, make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.inner(batch), batch["labels"])

    def configure_optimizers(self) -> Any:
        return self.make(self.inner)


QUIET_ONLY: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
EVERY: list[tuple[str, Make]] = [
    ("Factorize", lambda: lrcompress.Factorize(0.4, "epoch:2", **QUIET_ONLY)),
    ("LoSparse", lambda: lrcompress.LoSparse(0.5, **QUIET_ONLY)),
    ("DSEE", lambda: lrcompress.DSEE(0.5, 2, 4, updates=["*.up"], **QUIET_ONLY)),
    (
        "FactorizeEmbedding",
        lambda: lrcompress.FactorizeEmbedding(0.5, targets=["inner.embed"], **QUIET_ONLY),
    ),
]


@pytest.mark.parametrize(("name", "make"), EVERY, ids=[name for name, _ in EVERY])
def test_an_optimizer_with_one_flat_vector_is_refused_at_the_start(
    name: str, make: Make, tagger: Make, loader: Make, trainer: Make
) -> None:
    module = Optimized(tagger(), lambda inner: torch.optim.LBFGS(inner.parameters()))
    told = rf"^{name} puts new parameters .* and LBFGS keeps all gradients in one flat vector"
    with pytest.raises(PlatformError, match=told):
        trainer(make()).fit(module, loader())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: lrcompress.Factorize(0.4, "epoch:2", "kronecker", **QUIET_ONLY), True),
        (lambda: lrcompress.DSEE(0.5, 2, 4, updates=["*.up"], **QUIET_ONLY), True),
        (lambda: lrcompress.Factorize(0.4, "step:6", "svd", align=1, **QUIET_ONLY), False),
        (lambda: lrcompress.LoSparse(0.5, **QUIET_ONLY), False),
    ],
    ids=["kronecker", "dsee", "low rank", "losparse"],
)
def test_muon_takes_matrices_only(
    make: Make, refused: bool, tagger: Make, loader: Make, trainer: Make
) -> None:
    def both(inner: nn.Module) -> list[torch.optim.Optimizer]:
        return torch.optim.Muon([p for p in inner.blocks.parameters() if p.ndim == 2], lr=1e-3)

    module = Optimized(tagger(), both)
    if refused:
        with pytest.raises(PlatformError, match="no matrices, and Muon takes matrices only"):
            trainer(make()).fit(module, loader())
    else:
        trainer(make()).fit(module, loader())


@pytest.mark.parametrize("make", [EVERY[0][1], EVERY[1][1], EVERY[3][1]])
def test_layers_that_no_optimizer_holds_are_refused_at_the_start(
    make: Make, tagger: Make, loader: Make, trainer: Make
) -> None:
    module = Optimized(tagger(), lambda inner: torch.optim.AdamW(inner.head.parameters()))
    told = r"no optimizer holds the weight of layer 'inner\.[a-z0-9.]+', so its factors would not"
    with pytest.raises(PlatformError, match=told):
        trainer(make()).fit(module, loader())


def test_two_callbacks_for_one_layer_are_refused_at_the_start(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    one = lrcompress.Factorize(0.6, "epoch:1", targets=["*.up", "*.down"], **QUIET)
    other = lrcompress.Factorize(0.4, "epoch:2", targets=["*.down"], **QUIET)
    told = r"Factorize and Factorize both replace layer 'blocks.0.down': leave it out of one"
    with pytest.raises(SettingError, match=told):
        trainer(one, other).fit(tagger(), loader())
    apart = lrcompress.Factorize(0.6, "epoch:1", targets=["*.up"], **QUIET)
    trainer(apart, other).fit(tagger(), loader())
    assert [len(x.report.points) for x in (apart, other)] == [1, 1]


def test_gradients_of_the_last_step_take_no_memory_at_a_point(
    trainer: Make, tagger: Make, loader: Make
) -> None:
    model, seen = tagger(), []
    model.on_compression_start = lambda: seen.append([p.grad for p in model.parameters()])
    callback = lrcompress.Factorize(0.5, at="step:2", method="svd", **QUIET)
    trainer(callback, accumulate_grad_batches=2, max_steps=4).fit(model, loader())
    assert seen == [[None] * len(list(tagger().parameters()))]
