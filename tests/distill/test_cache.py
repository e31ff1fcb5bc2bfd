"""The teacher's features on disk: the same to rounding, and no teacher in later epochs."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lrcompress.distill import Distilled, HiddenStates, Logits, Relations
from lrcompress.distill.cache import FILE
from lrcompress.errors import CheckpointError, ObservationError

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
Make = Callable[..., Any]


def everything() -> list[Any]:
    return [Logits(), HiddenStates(), Relations()]


class Count(L.Callback):
    """Counts the calls of a teacher's model in every step."""

    def __init__(self, teacher: Any) -> None:
        self.calls, self.steps = 0, []
        teacher.model.register_forward_hook(self._hear)

    def _hear(self, *_: Any) -> None:
        self.calls += 1

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.calls)
        self.calls = 0


def shuffled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same examples in other batches, with more padding and other labels."""
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(1))
    padding = torch.nn.functional.pad
    rows = {k: padding(v, (0, 2)) if v.ndim == 2 else 2 - v for k, v in rows.items()}
    chunks = order.chunk(2)
    return [{key: value[chunk] for key, value in rows.items()} for chunk in chunks]


def test_later_epochs_run_no_teacher(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    ended = []
    for cache in (None, str(tmp_path / "cache")):
        teacher = reader(1)
        count = Count(teacher)
        module = Distilled(reader(), teacher=teacher, losses=everything(), cache=cache)
        L.seed_everything(0, verbose=False)
        trainer(count, max_epochs=3).fit(module, loader())
        ended.append(module)
    assert count.steps == [1] * 4 + [0] * 8
    for one, other in zip(*(module.parameters() for module in ended), strict=True):
        assert torch.equal(one, other)


def test_examples_are_found_in_other_batches_with_other_padding(
    reader: Make, batches: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    fit(reader(1), None, reader, loader, trainer, tmp_path)
    ended, again = [], shuffled(batches())
    for cache in (None, str(tmp_path / "cache")):
        teacher = reader(1)
        count = Count(teacher)
        module = Distilled(reader(dropout=0.0), teacher=teacher, losses=everything(), cache=cache)
        # Adam would blow up the rounding of gradients that vanish, as those of key biases do
        module.configure_optimizers = sgd(module)
        trainer(count, max_epochs=1).fit(module, loader(again))
        ended.append(module)
    assert count.steps == [0, 0]
    for one, other in zip(*(module.parameters() for module in ended), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def sgd(module: Any) -> Any:
    return lambda: torch.optim.SGD(module.parameters(), lr=0.1)


def fit(
    teacher: Any,
    losses: Any,
    reader: Make,
    loader: Make,
    trainer: Make,
    tmp_path: Path,
    **kwargs: Any,
) -> list[int]:
    """Return the teacher's calls in the steps of an epoch with the cache."""
    count = Count(teacher)
    losses = losses or everything()
    module = Distilled(reader(), teacher=teacher, losses=losses, cache=str(tmp_path / "cache"))
    trainer(count, max_epochs=1, **kwargs).fit(module, loader())
    return count.steps


def test_another_teacher_other_features_and_another_precision_are_not_taken(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    held = (reader, loader, trainer, tmp_path)
    assert fit(reader(1), None, *held) == [1] * 4
    assert fit(reader(1), None, *held) == [0] * 4
    assert fit(reader(2), None, *held) == [1] * 4
    assert fit(reader(1), [Logits()], *held) == [1] * 4
    assert fit(reader(1), None, *held, precision="bf16-mixed") == [1] * 4
    assert fit(reader(1), None, *held, precision="bf16-mixed") == [0] * 4


def test_a_damaged_file_says_so(reader: Make, loader: Make, trainer: Make, tmp_path: Path) -> None:
    held = (reader, loader, trainer, tmp_path)
    fit(reader(1), None, *held)
    path = tmp_path / "cache" / FILE
    with sqlite3.connect(path) as database:
        database.execute("UPDATE features SET value = zeroblob(length(value))")
    database.close()
    message = rf"features at .*{FILE} cannot be used: .*; delete it"
    with pytest.raises(CheckpointError, match=message):
        fit(reader(1), None, *held)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CheckpointError, match=message):
        fit(reader(1), None, *held)
    path.unlink()
    assert fit(reader(1), None, *held) == [1] * 4


def test_features_that_are_not_per_example(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    class Turned(type(reader())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model.turn = torch.nn.Flatten(0, 1)
            self.model.layers[1].register_forward_hook(lambda m, a, out: self._turn(out[0]))

        def _turn(self, x: Tensor) -> None:
            self.model.turn(x)

    losses = [Logits(), HiddenStates(layers=["model.turn"])]
    module = Distilled(Turned(), teacher=Turned(), losses=losses, cache=str(tmp_path), mask=None)
    with pytest.raises(
        ObservationError, match=r"cache keeps features per example, but 'model.turn'"
    ):
        trainer().fit(module, loader())
