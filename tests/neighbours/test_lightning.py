"""What Lightning has beside the Trainer's fit: the Tuner, Fabric, a step that fetches batches."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrcompress
from lrcompress.errors import PlatformError
from lrcompress.nn import LowRankLinear
from tests.callbacks.conftest import Loader, Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Field .model.batch_size. and .model.hparams"),
    pytest.mark.filterwarnings("ignore:.weights_only. was not set"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}


class Tuned(Tagger):
    """Makes its own loaders, of a batch size that can be found."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__(dropout=0.0)
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        rows = [{k: v[i] for k, v in batch.items()} for batch in sentences() for i in range(8)]
        return DataLoader(rows, batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def model(**kwargs: Any) -> Tuned:
    L.seed_everything(0, verbose=False)
    return Tuned(**kwargs)


def factorize() -> lrcompress.Factorize:
    return lrcompress.Factorize(keep=0.5, at="epoch:1", every_n_steps=1, **QUIET)


FINDERS: dict[str, Callable[[], L.Callback]] = {
    "rate": lambda: LearningRateFinder(num_training_steps=15, update_attr=False),
    "size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=4),
}
SEARCHES: dict[str, Callable[[Tuner, Tuned], Any]] = {
    "rate": lambda tuner, made: tuner.lr_find(made, num_training=15, update_attr=False),
    "size": lambda tuner, made: tuner.scale_batch_size(
        made, max_trials=2, steps_per_trial=1, init_val=4
    ),
}


def check_as_without(ours: lrcompress.Factorize, made: Tuned, trainer: Make) -> None:
    """The fit ends as one in which nothing was searched."""
    plain, theirs = model(batch_size=made.batch_size), factorize()
    trainer(theirs, max_epochs=2).fit(plain)
    (record,), (other,) = ours.report.points, theirs.report.points
    assert (record.step, record.observed) == (other.step, other.observed)
    assert sum(isinstance(m, LowRankLinear) for m in made.modules()) >= 2
    for name, value in plain.state_dict().items():
        assert made.state_dict()[name].equal(value), name


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_tuner_neither_counts_nor_factors(kind: str, trainer: Make) -> None:
    made, ours = model(), factorize()
    run = trainer(ours, max_epochs=2)
    SEARCHES[kind](Tuner(run), made)
    assert not ours.report.points
    assert not any(isinstance(m, LowRankLinear) for m in made.modules())
    run.fit(made)
    check_as_without(ours, made, trainer)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", FINDERS)
def test_finders_among_the_callbacks_do_not_disturb(kind: str, first: bool, trainer: Make) -> None:
    made, ours = model(), factorize()
    both = [FINDERS[kind](), ours]
    run = trainer(*(both if first else both[::-1]), max_epochs=2)
    run.fit(made)
    check_as_without(ours, made, trainer)


class Fetching(Tagger):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return nn.functional.cross_entropy(self(batch), batch["labels"])


@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor")
@pytest.mark.filterwarnings("ignore:Found .dataloader_iter. argument")
def test_a_step_that_fetches_its_batches_is_refused_where_steps_are_observed(
    trainer: Make,
) -> None:
    run = trainer(factorize())
    with pytest.raises(
        PlatformError, match=r"and training_step\(dataloader_iter\) fetches its own"
    ):
        run.fit(Fetching(dropout=0.0), Loader(sentences()))
    made = Fetching(dropout=0.0)
    ours = lrcompress.Factorize(keep=0.5, at="epoch:1", method="svd", **QUIET)
    trainer(ours).fit(made, Loader(sentences()))
    assert ours.report.points[0].step == 6
    assert isinstance(made.blocks[0]["down"], LowRankLinear)


def summed(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch), batch["labels"])


def test_with_fabric_a_model_is_compressed_before_it_is_set_up() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    L.seed_everything(0, verbose=False)
    made = Tagger(dropout=0.0)
    with pytest.raises(PlatformError, match=r"with Fabric before fabric.setup\(model, optimizer\)"):
        lrcompress.compress(fabric.setup(Tagger()), sentences(), summed, keep=0.5)
    with fabric.autocast():
        lrcompress.compress(made, sentences(), summed, keep=0.5)
    module, optimizer = fabric.setup(made, torch.optim.AdamW(made.parameters(), lr=0.01))
    losses = []
    for batch in sentences(1) * 30:
        optimizer.zero_grad()
        loss = summed(module, batch)
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert isinstance(made.blocks[0]["down"], LowRankLinear)
    assert losses[-1] < 0.7 * losses[0]
