"""Trial runs of a few steps (``fast_dev_run``) pass through everything they have steps for."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import lrcompress

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")


def factorize(**options: Any) -> list[Any]:
    return [lrcompress.Factorize(**({"keep": 0.5, "verbose": False} | options))]


def embedding(**options: Any) -> list[Any]:
    return [lrcompress.FactorizeEmbedding(keep=0.5, verbose=False, **options)]


def losparse(**options: Any) -> list[Any]:
    return [lrcompress.LoSparse(keep=0.4, verbose=False, **options)]


def dsee(**options: Any) -> list[Any]:
    options = {"keep": 0.4, "rank": 2, "entries": 5, "updates": ["*.up"]} | options
    return [lrcompress.DSEE(verbose=False, **options)]


# Callbacks, and the steps of their points in runs of 1, 2 and 4 steps.
KINDS: dict[str, tuple[Callable[[], list[Any]], list[list[int]]]] = {
    "kfac": (factorize, [[1], [1], [2]]),
    "svd": (lambda: factorize(method="svd"), [[0], [1], [2]]),
    "an epoch": (lambda: factorize(at="epoch:2", every_n_steps=50), [[1], [1], [3]]),
    "a step": (lambda: factorize(at="step:700", window="step:300"), [[1], [1], [3]]),
    "two points": (lambda: factorize(keep=[0.5, 0.3], at=[0.3, "step:9"]), [[1], [1, 2], [1, 3]]),
    "three": (
        lambda: factorize(keep=[0.7, 0.5, 0.3], at=[0.3, 0.4, 0.5]),
        [[1], [1, 2], [1, 2, 3]],
    ),
    "kronecker": (lambda: factorize(method="kronecker"), [[1], [1], [2]]),
    "measured": (lambda: factorize(measure_layers=True), [[1], [1], [2]]),
    "embedding": (embedding, [[1], [1], [2]]),
    "LoSparse": (losparse, [[1], [1], [2]]),
    "late": (lambda: losparse(at="epoch:1", fix_at="epoch:3"), [[1], [1], [3]]),
    "observed": (lambda: losparse(at="epoch:1", init="kfac"), [[], [2], [3]]),
    "revived": (lambda: losparse(revive=True, beta2=0.9), [[1], [1], [3]]),
    "entries": (lambda: losparse(granularity="entries"), [[1], [1], [2]]),
    "DSEE": (dsee, [[1], [1], [1]]),
    "LoRA": (lambda: dsee(keep=1, entries=0, at="step:7"), [[0], [1], [3]]),
    "gradual": (
        lambda: dsee(at="step:7", prune_from="epoch:2", prune_at="epoch:3"),
        [[1], [1], [3]],
    ),
    "both": (lambda: [*embedding(), *factorize()], [[1], [1], [2]]),
}


@pytest.mark.filterwarnings("ignore:(Factorize|LoSparse) did not reach point")  # as KINDS say
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("number", [1, 2, 4])
def test_points_lie_within_the_run(
    number: int, kind: str, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    make, expected = KINDS[kind]
    callbacks, model = make(), tagger()
    dense = sum(p.numel() for p in model.parameters())
    run = trainer(*callbacks, fast_dev_run=number)
    run.fit(model, loader(), loader())
    assert run.global_step == number
    steps = expected[(1, 2, 4).index(number)]
    for callback in callbacks:
        assert [point.step for point in callback.report.points] == steps
        if steps:  # what validation after the run sees is what the last point left, or trained on
            assert set(callback.report.final) == {"val_loss"}
        if steps and steps[-1] == number and type(callback) is type(callbacks[-1]):
            after = callback.report.points[-1].metrics["after"]
            assert callback.report.final == pytest.approx(after)
    if steps and kind not in ("DSEE", "LoRA", "gradual", "entries"):  # zeros are stored
        assert sum(p.numel() for p in model.parameters()) < dense
    assert not list(tmp_path.iterdir())


def test_where_the_points_were_put_is_said(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer(*factorize(at="epoch:1"), fast_dev_run=2).fit(tagger(), loader())
        trainer(*dsee(), fast_dev_run=1).fit(tagger(), loader())
    said = [one.getMessage() for one in caplog.records if "trial run" in one.getMessage()]
    start = "lrcompress: in a trial run (fast_dev_run)"
    assert said == [
        f"{start} Factorize changes the model at step 1 of 2",
        f"{start} DSEE changes the model at steps 0, 1 of 1",
    ]


def test_points_for_which_a_trial_is_too_short_are_named(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(*factorize(keep=[0.5, 0.3], at=[0.3, 0.6]), fast_dev_run=True)
    with (
        caplog.at_level(logging.INFO),
        pytest.warns(UserWarning, match="Factorize did not reach point 0.6"),
    ):
        run.fit(tagger(), loader())
    assert "at step 1 of 1; the run is too short for 1 more of its points" in caplog.text


def test_every_step_after_the_first_point_trains_the_factors(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    one, two = tagger(dropout=0.0), tagger(dropout=0.0)
    trainer(*factorize(at="epoch:1"), fast_dev_run=2).fit(one, loader())
    trainer(*factorize(at="step:1", report_path=None), max_steps=2).fit(two, loader())
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_accumulated_gradients(number: int, tagger: Make, loader: Make, trainer: Make) -> None:
    (callback,) = factorize()
    run = trainer(callback, fast_dev_run=number, accumulate_grad_batches=3)
    run.fit(tagger(), loader(), loader())
    (point,) = callback.report.points
    assert point.step == 1
    assert point.observed["steps"] == min(number, 3)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("make", [factorize, losparse, dsee])
def test_manual_optimization(
    make: Make, number: int, tagger: Make, loader: Make, trainer: Make
) -> None:
    model, (callback,) = tagger(), make()
    model.automatic_optimization = False

    def step(batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(model(batch), batch["labels"])
        optimizer: Any = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(loss)
        optimizer.step()

    model.training_step = step
    trainer(callback, fast_dev_run=number).fit(model, loader(), loader())
    assert [point.step for point in callback.report.points] == [1]


def test_a_fit_after_a_trial_is_not_a_trial(tagger: Make, loader: Make, trainer: Make) -> None:
    (callback,) = factorize(at="epoch:2", report_path=None)
    trainer(callback, fast_dev_run=1).fit(tagger(), loader())
    trainer(callback).fit(tagger(), loader())
    assert [point.step for point in callback.report.points] == [12]


def test_data_without_a_length(tagger: Make, batches: Make, trainer: Make) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(batches())

    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    for number in (1, 2):
        (callback,) = factorize(at="epoch:3")
        trainer(callback, fast_dev_run=number).fit(tagger(), data)
        assert [point.step for point in callback.report.points] == [1]


def test_errors_of_the_compression_are_raised(tagger: Make, loader: Make, trainer: Make) -> None:
    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            with torch.no_grad():
                pl_module.blocks[0]["up"].weight[0, 0] = torch.nan

    with pytest.raises(
        lrcompress.errors.NotFiniteError, match=r"layer 'blocks.0.up': .*1 non-finite of 512 values"
    ):
        trainer(*factorize(), Watch(), fast_dev_run=1).fit(tagger(), loader())


TWO = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
import torch.distributed as dist
import lrcompress
from conftest import Loader, Tagger, sentences

number, options = int(os.environ["RANK"]), dict(verbose=False)
dsee = dict(keep=0.4, rank=2, entries=5, updates=["*.up"])
for callback in (
    lrcompress.Factorize(keep=0.5, **options), lrcompress.LoSparse(keep=0.4, **options),
    lrcompress.FactorizeEmbedding(keep=0.5, **options), lrcompress.DSEE(**dsee, **options),
):
    L.seed_everything(0, verbose=False)
    model = Tagger()
    data = [{{k: v[number::2] for k, v in batch.items()}} for batch in sentences()]
    trainer = L.Trainer(callbacks=[callback], accelerator="cpu", devices=2, strategy="ddp",
        fast_dev_run=1, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir={root!r})
    trainer.fit(model, Loader(data), Loader(data))
    assert [point.step for point in callback.report.points] == [1]
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(whole) for _ in range(2)]
    dist.all_gather(both, whole)
    assert torch.equal(*both)
print("alike")
"""


def test_two_processes(launch: Make, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent), root=str(tmp_path / "root")))
    assert [out.splitlines()[-1] for out in launch(script, 2)] == ["alike"] * 2
    assert not (tmp_path / "root").exists()


@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.*sync_dist")
@pytest.mark.parametrize("make", [factorize, losparse])
def test_a_sharded_model(
    make: Make, sharding: Any, tagger: Make, loader: Make, trainer: Make
) -> None:
    class Sharded(type(tagger())):  # type: ignore[misc]
        def configure_model(self) -> None:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    (callback,) = make()
    trainer(callback, strategy=sharding, fast_dev_run=1).fit(Sharded(), loader(), loader())
    assert [point.step for point in callback.report.points] == [1]
