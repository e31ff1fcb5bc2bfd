"""Blocks that were compiled one by one stay compiled after a point gave each other ranks."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # Dynamo's
]
NUM = 12
RANKS = {f"inner.blocks.{number}.*": number + 1 for number in range(NUM)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Deep(L.LightningModule):
    """As many blocks as are not few for Dynamo, each compiled by itself."""

    def __init__(self, compiled: Callable[[nn.Module], nn.Module], width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.blocks = nn.ModuleList(compiled(Block(width)) for _ in range(NUM))
        self.head = nn.Linear(width, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for block in self.inner.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), (batch[:, 0] > 0).long())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def calls() -> Iterator[list[None]]:
    """Calls of compiled graphs, with Dynamo as it is in a new process, and as it was after."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield []
    torch.compiler.reset()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("resumed", [False, True])
def test_blocks_of_other_ranks_stay_compiled(
    trainer: Callable[..., L.Trainer],
    loader: Any,
    tmp_path: Any,
    calls: list[None],
    in_place: bool,
    resumed: bool,
) -> None:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(None)
            return graph.forward(*args)

        return run

    def compiled(block: nn.Module) -> nn.Module:
        if not in_place:
            return torch.compile(block, backend=backend)
        block.compile(backend=backend)
        return block

    per_step: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            per_step.append(len(calls))
            calls.clear()

    def fit(steps: int, **kwargs: Any) -> None:
        torch.manual_seed(0)
        callback = lrcompress.Factorize(
            None, at="step:2", method="svd", targets=["*.up", "*.down"], ranks=RANKS, verbose=False,
            validate=False, report_path=None,
        )  # fmt: skip
        run = trainer(callback, Count(), max_steps=steps, max_epochs=-1, every_step=True)
        batches = [torch.randn(4, 32) for _ in range(10)]
        run.fit(Deep(compiled), loader(batches), **kwargs)

    fit(4)
    if resumed:
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 8
        per_step.clear()
        fit(6, ckpt_path=tmp_path / "step=4.ckpt")
    assert per_step == [NUM] * len(per_step)
    assert len(per_step) >= 2


@pytest.mark.parametrize("whole", [False, True])
def test_graphs_of_the_dense_model_are_freed_at_the_point(
    trainer: Callable[..., L.Trainer], loader: Any, calls: list[None], whole: bool
) -> None:
    made: list[tuple[int, weakref.ref[Any]]] = []
    callback = lrcompress.Factorize(
        0.5, at="step:2", method="svd", targets=["*.up", "*.down"], verbose=False, validate=False,
        report_path=None,
    )  # fmt: skip

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append((callback._stage, weakref.ref(graph)))
        return graph.forward

    def compiled(block: nn.Module) -> nn.Module:
        return block if whole else torch.compile(block, backend=backend)

    torch.manual_seed(0)
    module: Any = Deep(compiled)
    if whole:
        module = torch.compile(module, backend=backend)
    run = trainer(callback, max_steps=4, max_epochs=-1)
    run.fit(module, loader([torch.randn(4, 32) for _ in range(10)]))
    gc.collect()
    alive = [(stage, graph()) for stage, graph in made]
    assert any(stage == 0 for stage, _ in alive)
    assert all(graph is None for stage, graph in alive if stage == 0)
    assert any(graph is not None for stage, graph in alive if stage == 1)
