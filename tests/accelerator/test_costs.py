"""What watching costs on the stand-in device: waits of ordinary steps, bytes of observed ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcompress
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.sampling import Sampling
from lrcompress.engine.compress import factor_
from lrcompress.engine.footprint import footprint
from lrcompress.engine.settings import Settings
from lrcompress.objective import METHODS
from lrcompress.pruning import LoSparseBudget, growth, split_
from lrcompress.statistics.capture import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
WIDTH, INNER = 128, 344  # in the ratio of Llama-2-7B


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "kfac",
            "weighted_kfac",
            "kronecker",
            "dsee",
            "embedding low_rank",
            "embedding kronecker",
        ),
        *("losparse", "losparse auto", "losparse entries", "distilled", "distilled relations"),
    ],
)
def test_steps_that_are_not_observed_wait_for_nothing_and_others_a_few_times(
    device: SimpleNamespace, tmp_path: Path, name: str, precision: str
) -> None:
    def waits(name: str, *callbacks: L.Callback) -> list[tuple[int, int]]:
        found = []

        class Count(L.Callback):
            def on_train_batch_end(self, *_: object) -> None:
                found.append(device.counts(reset=True)[2:])

        run = device.trainer(
            *callbacks, Count(), precision=precision, default_root_dir=tmp_path, max_steps=12
        )
        run.fit(device.tagger(name, tmp_path), device.Loader(device.sentences(12)))
        return found

    watched, plain = waits(name, *device.callbacks(name, window="step:2")), waits("")
    assert len(watched) == len(plain) == 12
    # the first is looked at, 2 and 3 are observed, 4 begins with the point
    ordinary = [step for step in range(12) if step not in (0, 2, 3, 4)]
    if name.startswith("losparse"):  # a new mask at 6; at 7 rows are dropped
        ordinary = [step for step in ordinary if step not in (6, 7)]
        # of entries the least that stays is found by bisecting the bits of a number
        assert watched[6][0] - plain[6][0] <= (32 if name.endswith("entries") else 3)
    assert [watched[step] for step in ordinary] == [plain[step] for step in ordinary]
    # whether the loss is finite, its terms and tokens: the same however many layers there are
    assert max(watched[step][0] - plain[step][0] for step in (2, 3)) <= 6


def test_times_of_steps_are_those_of_the_device(device: SimpleNamespace, tmp_path: Path) -> None:
    callback = device.callbacks("kfac", window="step:2")[0]
    model = device.tagger("kfac", tmp_path)

    class Slow(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            device.launch(7.0)

        def on_before_backward(self, *_: object) -> None:
            device.launch(3.0 if callback._stage else 5.0)

    run = device.trainer(callback, Slow(), default_root_dir=tmp_path)
    run.fit(model, device.Loader(device.sentences(10)))
    found = callback.report.seconds_per_step
    assert found == pytest.approx({"dense": 5.0, "factored": 3.0}, abs=0.9)


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing, and a head with more outputs than they have."""

    def __init__(self, num: int = 4, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(num)
        )
        self.head = nn.Linear(width, 12 * width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x).square().mean()


@pytest.mark.parametrize("method", ["kfac", "row_fisher"])
def test_an_observed_step_holds_little_more_than_a_plain_one(
    device: SimpleNamespace, method: str
) -> None:
    model = Checkpointed().to(device.DEVICE)
    x = torch.randn(64, 32, 32, device=device.DEVICE)
    names = [name for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)]
    recorder = Recorder(model.blocks, names, METHODS[method].kinds)

    def plain() -> None:
        model.zero_grad()
        model(x).backward()

    def observed() -> None:
        with recorder.step():
            plain()

    plain(), observed()  # what stays is there from now on
    most, least = device.peak_bytes(observed), device.peak_bytes(plain)
    assert recorder.statistics.steps == 2
    assert most <= 1.3 * least


@pytest.mark.parametrize("method", ["drone", "kfac", "weighted_kfac", "row_fisher"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_that_is_observed_into_host_memory_waits_once_for_each_device(
    device: SimpleNamespace, method: str, devices: int
) -> None:
    kinds, names = METHODS[method].kinds, [str(i) for i in range(12)]
    held, waits = [], []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in names)).to(device.DEVICE)
        second = model[6:].to((device.DEVICE, device.OTHER)[devices - 1])
        given = [torch.randn(8, 32).to(device.DEVICE) for _ in range(3)]
        recorder = Recorder(model, names, kinds, offload=offload)
        for x in given:
            device.counts(reset=True)
            with recorder.step():
                y = model[:6](x)
                second(y.to(second[0].weight.device)).square().mean().backward()
            waits.append(device.counts().waits)
            if offload:  # as from a checkpoint, all in one place
                recorder.statistics.load_state_dict(recorder.statistics.state_dict(), "cpu")
        held.append([recorder.statistics.of(name, kinds) for name in names])
    assert waits[:3] == [0] * 3
    assert waits[3:] == [devices] * 3
    for here, there in zip(*held, strict=True):
        assert {x.device.type for x in there.values.values() if x.ndim > 1} == {"cpu"}
        both = ({k: v.cpu() for k, v in x.values.items()} for x in (here, there))
        torch.testing.assert_close(*both)
        assert int(here.tokens) == int(there.tokens) == 24


class Block(nn.Module):
    """The seven layers of a Llama-type block, without its softmax and its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x).sigmoid() + self.v(x))
        return x + self.down(self.gate(x).relu() * self.up(x))


def at_a_point(
    device: SimpleNamespace, method: str, trained: bool
) -> tuple[nn.Module, Recorder, list[torch.optim.Optimizer]]:
    """Blocks that were observed, without gradients, and the optimizer that has trained them."""
    torch.manual_seed(0)
    model = nn.ModuleList(Block() for _ in range(8)).to(device.DEVICE)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    recorder = Recorder(model, names, METHODS[method].kinds)
    with recorder.step():
        x = torch.randn(64, WIDTH, device=device.DEVICE)
        for block in model:
            x = block(x)
        x.square().mean().backward()
    optimizers: list[torch.optim.Optimizer] = []
    if trained:
        optimizers.append(torch.optim.AdamW(model.parameters(), foreach=False))
        optimizers[0].step()
    model.zero_grad()
    return model, recorder, optimizers


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [*METHODS, "kfac pivoted"])
def test_a_point_takes_little_more_than_the_weights(
    device: SimpleNamespace, kind: str, trained: bool
) -> None:
    method, _, storage = kind.partition(" ")
    model, recorder, optimizers = at_a_point(device, method, trained)
    weights = sum(p.nbytes for p in model.parameters())
    given = {"storage": storage or "balanced", "keep": 0.5, "targets": ["*"]}
    settings = Settings(method=method, **given)
    said = footprint(model, [*recorder.layers], method, 0, rate=1.0)
    taken = device.peak_bytes(
        lambda: factor_(model, recorder.statistics, settings, optimizers=optimizers)
    )
    assert taken <= said.solve + 0.3 * weights
    assert taken <= 1.3 * weights  # 7.7 where all solutions were held in float64 until the end


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "shares",
    [{}, {"low_rank_share": "auto"}, {"low_rank_share": 1}, {"initial_rank": 1.0}],
    ids=["default", "auto", "low rank", "full rank"],
)
def test_splitting_takes_little_more_than_what_it_leaves(
    device: SimpleNamespace, shares: dict[str, Any], trained: bool
) -> None:
    """Ranks that are pruned later are there at first, with their state."""
    model, recorder, optimizers = at_a_point(device, "kfac", trained)
    weights = sum(p.nbytes for p in model.parameters())

    def held() -> int:
        states = [x for o in optimizers for s in o.state.values() for x in s.values()]
        return sum(x.nbytes for x in (*model.parameters(), *states) if x.device.type != "cpu")

    before, settings = held(), Settings(method="kfac", keep=0.5, targets=["*"])
    names, budget = settings.select(model).names, LoSparseBudget(keep=0.5, **shares)
    said = growth(model, names, budget) * 4 * (3 if trained else 1)
    taken = device.peak_bytes(
        lambda: split_(model, recorder.statistics, settings, budget, optimizers=optimizers)
    )
    grown = held() - before
    assert grown <= said <= 1.3 * grown + weights
    assert taken <= max(0, grown) + 1.3 * weights


def test_groups_that_take_turns_have_a_share_of_the_device_and_cross_to_the_host_once(
    device: SimpleNamespace, tmp_path: Path
) -> None:
    """Of four equal blocks; the model ends as on the CPU."""

    class Deep(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96)) for _ in range(4)
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for block in self.blocks:
                batch = batch + block(batch)
            return batch.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    ends, found = [], []
    batches = [torch.randn(8, 96) for _ in range(9)]
    for place in ({}, {"accelerator": "cpu", "strategy": "auto"}):
        given = {"at": "step:8", "window": "step:8", "every_n_steps": 1, "turns": 4, "mask": None}
        callback = lrcompress.Factorize(
            0.5, verbose=False, validate=False, report_path=None, **given
        )

        class Look(L.Callback):
            def on_train_batch_end(self, *_: object) -> None:
                held = callback._observation.statistics  # noqa: B023
                sums = [s for side in (held.inputs, held.outputs) for s in side.values()]
                large = [x for s in sums for x in s.values.values() if x.ndim > 1]
                there = sum(x.nbytes for x in large if x.device.type != "cpu")
                found.append((there, sum(x.nbytes for x in large), device.counts(reset=True).waits))

        model = Deep()
        run = device.trainer(callback, Look(), default_root_dir=tmp_path, max_steps=9, **place)
        run.fit(model, device.Loader(batches))
        ends.append({key: value.cpu() for key, value in model.state_dict().items()})
    torch.testing.assert_close(*ends)
    whole = found[7][1]
    assert [there for there, _, _ in found[:8]] == [whole // 4] * 8
    assert [held for _, held, _ in found[:8]] == [whole // 4 * (1 + step // 2) for step in range(8)]
    crossing = len(batches[0][:4])  # the sums of two layers, of inputs and of outputs
    plain = found[1][2]
    assert [waits for _, _, waits in found[1:8]] == [plain, *[plain + crossing, plain] * 3]


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_checkpoint_within_the_window_takes_nothing_of_the_device(
    device: SimpleNamespace, offload: str | None
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(device.DEVICE)
    sampling = Sampling(kinds=METHODS["kfac"].kinds, owner="Factorize", offload=offload, mask=None)
    observation = Observation(sampling)
    observation.watch(model, Settings(method="kfac", keep=0.5, targets=["*"]))
    x = torch.randn(8, 64, device=device.DEVICE)
    observation.open_step([x])
    loss = model(x).square().mean()
    observation.before_backward(loss, 1.0)
    loss.backward()
    observation.close_step()
    del x, loss
    states = []
    assert device.peak_bytes(lambda: states.append(observation.state_dict())) == 0
    values = [v for s in states[0]["statistics"]["outputs"].values() for v in s.values()]
    assert values
    assert {value.device.type for value in values} == {"cpu"}
