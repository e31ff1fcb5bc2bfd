"""What watching costs on the card: waits of ordinary steps, bytes of observed steps and points."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcompress
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from short_runs import Loader, callbacks, sentences, tagger

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
WIDTHS = {"cuda": 1024, "standin": 128, "cpu": 128}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "name", ["kfac", "weighted_kfac", "dsee", "embedding low_rank", "losparse", "distilled"]
)
def test_steps_that_are_not_observed_wait_no_more_than_plain_ones(
    card: Any, tmp_path: Path, name: str, precision: str
) -> None:
    card.needs("cuda", "standin", why="nobody waits for a CPU")

    def waits(name: str, *watching: L.Callback) -> list[int]:
        found = []
        with card.counting_waits() as count:

            class Count(L.Callback):
                def on_train_batch_end(self, *_: object) -> None:
                    found.append(count())

            run = card.trainer(
                *watching, Count(), precision=precision, default_root_dir=tmp_path, max_steps=12
            )
            run.fit(tagger(name, tmp_path), Loader(sentences(12)))
        return found

    watched, plain = waits(name, *callbacks(name, window="step:2")), waits("")
    assert len(watched) == len(plain) == 12
    assert max(watched) > max(plain[1:])  # the point, at least, waits: they are counted
    # the first is looked at, 2 and 3 are observed, 4 begins with the point
    skipped = {0, 2, 3, 4} | ({6, 7} if name == "losparse" else set())  # a new mask, rows dropped
    ordinary = [step for step in range(12) if step not in skipped]
    assert [watched[step] for step in ordinary] == [plain[step] for step in ordinary]


@pytest.mark.parametrize("name", ["kfac", "kronecker", "losparse", "dsee", "embedding low_rank"])
def test_steps_of_a_compressed_model_wait_for_nothing(card: Any, tmp_path: Path, name: str) -> None:
    """Not counted beside a plain run but refused; what a fit leaves is trained without it."""
    model, _ = card.fit(name, tmp_path)
    model.to(card.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = {key: value.to(card.device) for key, value in sentences(1)[0].items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), batch["labels"]).backward()
        optimizer.step()

    step()
    with card.no_waits():
        step(), step()
    after = model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_wait_is_refused(card: Any) -> None:
    """Else the tests above would show nothing."""
    x = torch.ones(3, device=card.device)
    with pytest.raises((RuntimeError, AssertionError), match=r"synchroniz|waits"), card.no_waits():
        x.nonzero()


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing, and a head with more outputs than they have."""

    def __init__(self, width: int, num: int = 4) -> None:
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
def test_an_observed_step_holds_little_more_than_a_plain_one(card: Any, method: str) -> None:
    card.needs("cuda", "standin", why="the CPU does not count bytes")
    width = WIDTHS[card.name] // 4
    model = Checkpointed(width).to(card.device)
    x = torch.randn(64, width, width, device=card.device)
    names = [name for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)]
    recorder = Recorder(model.blocks, names, METHODS[method].kinds)

    def plain() -> None:
        model.zero_grad()
        model(x).backward()

    def observed() -> None:
        with recorder.step():
            plain()

    plain(), observed()  # what stays is there from now on
    most, least = card.peak_bytes(observed), card.peak_bytes(plain)
    assert recorder.statistics.steps == 2
    assert most <= 1.3 * least


class Block(nn.Module):
    """The seven layers of a Llama-type block, without its softmax and its norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 344 * width // 128  # in the ratio of Llama-2-7B
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x).sigmoid() + self.v(x))
        return x + self.down(self.gate(x).relu() * self.up(x))


def observed(card: Any, method: str, offload: str | None = None) -> tuple[nn.Module, Recorder]:
    width = WIDTHS[card.name]
    torch.manual_seed(0)
    model = nn.ModuleList(Block(width) for _ in range(8 if card.real else 4)).to(card.device)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    recorder = Recorder(model, names, METHODS[method].kinds, offload=offload)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(1)).to(card.device)
    with recorder.step():
        for block in model:
            x = block(x)
        x.square().mean().backward()
    return model, recorder


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("method", ["svd", "kfac"])
def test_a_point_takes_little_more_than_the_weights(card: Any, method: str, trained: bool) -> None:
    card.needs("cuda", "standin", why="the CPU does not count bytes")
    model, recorder = observed(card, method)
    optimizers = []
    if trained:
        optimizers.append(torch.optim.AdamW(model.parameters(), foreach=False))
        optimizers[0].step()
    weights = sum(p.nbytes for p in model.parameters())
    settings = Settings(method=method, keep=0.5, targets=["*"])
    taken = card.peak_bytes(
        lambda: factor_(model, recorder.statistics, settings, optimizers=optimizers)
    )
    assert taken <= 1.3 * weights


@pytest.mark.parametrize("method", ["kfac", "row_fisher"])
def test_offloaded_statistics_lie_on_the_host_and_are_the_same(card: Any, method: str) -> None:
    _, here = observed(card, method)
    model, there = observed(card, method, "cpu")
    for side in ("inputs", "outputs"):
        ours, theirs = (getattr(one.statistics, side) for one in (here, there))
        assert ours.keys() == theirs.keys() != set()
        for name, sums in ours.items():
            for key, value in sums.named_tensors().items():
                other = theirs[name].named_tensors()[key]
                host = value.ndim > 1  # vectors and counts stay beside their layer
                assert value.device == card.device
                assert other.device.type == ("cpu" if host else card.type)
                size = float(value.abs().max())
                torch.testing.assert_close(other.cpu(), value.cpu(), rtol=1e-4, atol=1e-6 * size)
    factor_(model, there.statistics, Settings(method=method, keep=0.5, targets=["*"]))
    assert {p.device for p in model.parameters()} == {card.device}


def test_steps_on_another_stream_are_observed_into_host_memory(card: Any) -> None:
    """Copies to pinned memory are queued behind the products, on whatever stream those are."""
    card.needs("cuda", why="only CUDA has streams")
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(8)]
    model = nn.Sequential(*layers).to(card.device)
    x = torch.randn(4096, 1024, device=card.device)
    side, ends = torch.cuda.Stream(), []
    for stream, offload in ((None, None), (None, "cpu"), (side, "cpu")):
        names = [name for name, _ in model.named_children()]
        recorder = Recorder(model, names, METHODS["kfac"].kinds, offload=offload)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                with recorder.step():
                    model(x).square().mean().backward()
        torch.cuda.current_stream().wait_stream(side)
        held = recorder.statistics
        ends.append(
            [
                sums.values[kind].cpu()
                for side_of in (held.inputs, held.outputs)
                for sums in side_of.values()
                for kind in sorted(sums.values)
            ]
        )
    for found in ends[1:]:
        for one, other in zip(ends[0], found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("name", ["kfac", "losparse"])
def test_a_fit_with_turns_ends_as_on_the_cpu(card: Any, tmp_path: Path, name: str) -> None:
    """The sums of a group go to the host once, when its part of the window ends."""
    ends = []
    for place in ({}, {"accelerator": "cpu", "strategy": "auto"}):
        run = card.trainer(*callbacks(name, turns=2), default_root_dir=tmp_path, **place)
        model = tagger(name, tmp_path, dropout=0.0)
        run.fit(model, Loader(sentences(10)))
        ends.append({key: value.cpu() for key, value in model.state_dict().items()})
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kfac", "losparse"])
def test_a_fit_with_offloaded_statistics_ends_as_one_without(
    card: Any, tmp_path: Path, name: str
) -> None:
    ends = []
    for where in (None, "cpu"):
        run = card.trainer(*callbacks(name, offload=where), default_root_dir=tmp_path)
        model = tagger(name, tmp_path, dropout=0.0)
        run.fit(model, Loader(sentences(10)))
        assert any(
            isinstance(layer, lrcompress.LowRankLinear | lrcompress.LowRankSparseLinear)
            for layer in model.modules()
        )
        ends.append({key: value.cpu() for key, value in model.state_dict().items()})
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
