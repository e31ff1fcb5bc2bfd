"""Blocks that are compiled one by one go through a point, also with CUDA graphs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from conftest import Loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # Dynamo's
]
NUM, WIDTH = 4, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Deep(L.LightningModule):
    """Blocks, each compiled by itself, or not."""

    def __init__(self, **compiling: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(NUM))
        self.head = nn.Linear(WIDTH, 2)
        self.losses: list[float] = []
        for block in self.blocks if compiling else ():
            block.compile(**compiling)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x), (batch[:, 0] > 0).long())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """As it is in a new process."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["kfac", "losparse"])
def test_compiled_blocks_train_as_eager_ones(
    card: Any, tmp_path: Path, method: str, mode: str
) -> None:
    """Observed steps run without ``torch.compile``, so graphs are left, made anew, and replayed."""
    card.needs("cuda", "cpu", why="Inductor does not know the stand-in")
    if mode == "reduce-overhead":
        card.needs("cuda", why="only CUDA has graphs of launches")
    # Inductor compiles long for a CPU; what is left without it has graphs too
    compiling: dict[str, Any] = {"mode": mode} if card.real else {"backend": "aot_eager"}
    seen = {"at": "step:4", "every_n_steps": 2, "window": "step:4", "targets": ["blocks.*"]}
    quiet = {"verbose": False, "validate": False, "report_path": None}
    ends = []
    for given in ({}, compiling):
        torch.manual_seed(0)
        if method == "kfac":
            callback: Any = lrcompress.Factorize(0.5, method=method, **seen, **quiet)
        else:
            given_too = {"init": "kfac", "prune_until": "step:8", "fix_at": "step:9"}
            callback = lrcompress.LoSparse(0.5, mask_every=2, **given_too, **seen, **quiet)
        model = Deep(**given)
        batches = [torch.randn(16, WIDTH) for _ in range(14)]
        run = card.trainer(callback, default_root_dir=tmp_path, max_steps=12)
        torch._dynamo.utils.counters.clear()
        run.fit(model, Loader(batches))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs >= 2) == bool(given)  # before the point and after it
        if card.real and given and mode == "reduce-overhead":
            assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        ends.append((model.losses, {key: x.cpu() for key, x in model.state_dict().items()}))
    assert ends[0][1].keys() != Deep().state_dict().keys()
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-2, atol=1e-3)
