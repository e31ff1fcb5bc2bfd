"""A small model with layers of three kinds, its data, and an optimizer that decays weights."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lrcompress.engine.observation import observe
from lrcompress.engine.settings import Settings
from lrcompress.importance import Importance
from lrcompress.nn import FactoredLinear
from lrcompress.pruning import LoSparseBudget, Pruner, Quota, split_
from lrcompress.statistics.moments import KINDS, Statistics

WIDTH, HIDDEN, CLASSES = 20, 32, 3


class Net(nn.Module):
    """Two residual blocks: a ``Linear``, a ``Conv1D``, and a ``Linear`` without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(WIDTH, HIDDEN),
                    "down": Conv1D(WIDTH, HIDDEN),
                    "gate": nn.Linear(WIDTH, WIDTH, bias=False),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.reads_all = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            gate = block["gate"](x).sigmoid() if self.reads_all else 0.5
            x = x + gate * block["down"](block["up"](x).tanh())
        return self.head(x)


@dataclass
class Bench:
    """One training run: dense for a few steps, then split, then whatever a test does."""

    model: Net
    optimizer: Optimizer
    batches: list[tuple[Tensor, Tensor]]
    steps: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return Settings(method="svd").select(self.model).names

    @property
    def dense(self) -> int:
        sizes = (self.model.get_submodule(name) for name in self.names)
        return sum(m.out_features * m.in_features for m in sizes if isinstance(m, FactoredLinear))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.model(x.to(next(self.model.parameters()))), labels)

    def backward(self) -> None:
        """Leave the gradients of the next batch."""
        self.optimizer.zero_grad()
        self.loss(self.batches[self.steps % len(self.batches)]).backward()
        self.steps += 1

    def train(self, steps: int = 1, pruner: Pruner | None = None, *, observe: bool = True) -> None:
        for _ in range(steps):
            self.backward()
            if pruner is not None and observe:
                pruner.observe()
            self.optimizer.step()
            if pruner is not None:
                pruner.hold_([self.optimizer])
        self.optimizer.zero_grad()

    def statistics(self) -> Statistics:
        with observe(self.model, kinds=KINDS) as recorder:
            for batch in self.batches:
                with recorder.step(None):
                    loss = self.loss(batch)
                    recorder.commit(len(batch[1]))
                    loss.backward()
        self.model.zero_grad()
        return recorder.statistics

    def split(
        self, shares: LoSparseBudget, method: str = "svd", **settings: Any
    ) -> tuple[dict[str, Tensor], list[Quota]]:
        chosen = Settings(method=method, **settings)
        statistics = self.statistics() if method != "svd" else Statistics()
        return split_(self.model, statistics, chosen, shares, optimizers=[self.optimizer])

    def pruner(
        self, shares: LoSparseBudget, importance: Importance | None = None, method: str = "svd"
    ) -> Pruner:
        names = self.names
        means, quotas = self.split(shares, method)
        importance = importance or Importance(0.85, 1.0, 2)
        return Pruner(self.model, names, quotas, shares, importance, means)


@pytest.fixture
def make() -> Callable[..., Bench]:
    """A function that gives the same :class:`Bench` every time, three steps into training."""

    def make(dtype: torch.dtype = torch.float32) -> Bench:
        torch.manual_seed(0)
        model = Net().to(dtype)
        for name, p in model.named_parameters():
            if name.endswith("weight"):  # rows, columns and layers that differ
                nn.init.normal_(p, std=0.3)
                scales = torch.rand(p.shape[0], 1) + 0.1, torch.rand(1, p.shape[1]) + 0.1
                p.data.mul_(scales[0] * scales[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True)
        batches = [
            (torch.randn(16, WIDTH) + torch.arange(WIDTH) / 20, torch.randint(CLASSES, (16,)))
            for _ in range(5)
        ]
        bench = Bench(model, optimizer, batches)
        bench.train(3)
        return bench

    return make


class Counting(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are alive, kernels, and waits of the host.

    Not seen is ``tolist``, which on a device is one wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.waits = self.kernels = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.waits += func.overloadpacket in WAITING or (
            func.overloadpacket in INDEXING
            and any(x is not None and x.dtype == torch.bool for x in args[1])
        )
        self.kernels += not func.is_view
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, Tensor):
                self._see(one, args)
        self.peak = max(self.peak, self.now)
        return made

    def _see(self, made: Tensor, args: Any) -> None:
        storage, nbytes = made.untyped_storage().data_ptr(), made.untyped_storage().nbytes()
        old = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        if storage in self._held or storage not in old:
            self.now += 0 if storage in self._held else nbytes
            self._held[storage] = self._held.get(storage, 0) + 1
            weakref.finalize(made, self._drop, storage, nbytes)

    def _drop(self, storage: int, nbytes: int) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            self.now -= nbytes


_ATEN = torch.ops.aten
WAITING = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal}
INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_}


@pytest.fixture
def counting() -> type[Counting]:
    """What counts memory, kernels and waits within a ``with`` block."""
    return Counting
