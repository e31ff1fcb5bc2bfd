"""What is foretold of memory and time, against what is measured."""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress.engine.compress import Settings, factor_
from lrcompress.engine.distributed_solve import greatest_rank
from lrcompress.engine.footprint import _duration, _rate, footprint
from lrcompress.engine.observation import observe

INPUTS = ("input_moment", "input_sum")


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it and live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if hasattr(x, "data_ptr")}
        result = function(*args, **(kwargs or {}))
        for made in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            storage = made.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(made, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes


def observed(model: nn.Module, method: str) -> Any:
    with observe(model, method=method, targets=["*"]) as recorder, recorder.step():
        x = torch.randn(64, next(model.parameters()).shape[1])
        model(x).square().sum().backward()
    return recorder


@pytest.mark.parametrize("method", ["kfac", "weighted_kfac", "drone", "fwsvd", "svd", "kronecker"])
@pytest.mark.parametrize("shape", [(300, 300), (120, 480), (480, 120)])
def test_solving_a_layer_takes_no_more_than_is_said(method: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    statistics = observed(model, method).statistics
    said = footprint(model, ["0"], method, statistics.nbytes, rate=1.0)
    with Peak() as peak:
        factor_(model, statistics, Settings(method=method, keep=0.5, targets=["*"]))
    assert 0.35 * said.solve <= peak.most <= said.solve + said.solutions


def test_the_formulas_of_a_llama_are_what_is_measured() -> None:
    """Bytes of statistics to the byte, of the solve within a quarter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=100, **sizes))
    ids = torch.randint(100, (4, 64))
    with observe(model, method="kfac") as recorder, recorder.step():
        model(input_ids=ids, labels=ids).loss.backward()
    names = [*recorder.layers]
    shared = [name for name in names if name.endswith(("k_proj", "v_proj", "up_proj"))]
    twice = [4 * math.prod(recorder.shapes[n][k]) for n in shared for k in INPUTS]
    statistics = recorder.statistics
    assert statistics.nbytes == recorder.nbytes - sum(twice)
    said = footprint(model, names, "kfac", statistics.nbytes, rate=1.0)
    with Peak() as peak:
        factor_(model, statistics, Settings(method="kfac", keep=0.5))
    assert peak.most == pytest.approx(said.solve, rel=0.25)


def test_bytes_are_those_that_the_fit_will_have() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    size = sum(p.nbytes for p in model.parameters())
    recorder = observed(model, "kfac")
    for optimizer, states in (
        (torch.optim.AdamW(model.parameters()), 2),
        (torch.optim.SGD(model.parameters(), momentum=0.9), 1),
        (torch.optim.SGD(model.parameters()), 0),
        (torch.optim.RMSprop(model.parameters(), centered=True, momentum=0.5), 3),
    ):
        before = footprint(model, ["0"], "kfac", 1000, optimizers=[optimizer], rate=1.0)
        assert before.optimizer == states * size
        optimizer.step()
        after = footprint(model, ["0"], "kfac", 1000, optimizers=[optimizer], rate=1.0)
        assert after.optimizer == pytest.approx(states * size, abs=100)  # counts of steps
    assert (before.weights, before.gradients, before.statistics) == (size, size, 1000)
    assert before.checkpoint == size + 1000 + before.optimizer
    assert before.solutions == 4 * greatest_rank(model[0]) * 70
    assert recorder.nbytes >= recorder.statistics.nbytes
    shared = footprint(model, ["0"], "kfac", 1000, processes=2, sharded=True, of_all=2000, rate=1.0)
    assert shared.weights == size // 2
    assert shared.checkpoint == size // 2 + 2000
    assert shared.seconds == before.seconds / 2


def test_what_is_solved_elsewhere_is_said() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 30))
    here, there = (
        footprint(model, ["0"], "kfac", 0, solve_device=where, rate=1.0) for where in (None, "cpu")
    )
    assert here.solve == there.solve
    assert (here.solved_on, there.solved_on) == ("", "cpu")
    assert "to compress: 0.1 MiB a layer on cpu, " in there.lines[-1]
    assert "to compress: 0.1 MiB a layer, " in here.lines[-1]


def test_the_time_of_a_solve_is_foretold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(4)))
    statistics = observed(model, "kfac").statistics
    _rate.cache_clear()  # what else runs here now did perhaps not when it was measured
    said = footprint(model, ["0", "1", "2", "3"], "kfac", 0).seconds
    took = min(
        factor_(
            copy.deepcopy(model), statistics, Settings(method="kfac", keep=0.5, targets=["*"])
        ).seconds
        for _ in range(3)
    )
    assert took / 5 < said < took * 5


def test_a_llama_of_8_billion_fits_eight_cards_and_its_statistics_are_dealt() -> None:
    """Shapes alone; the figures of all parts are those of the formulas that others check."""
    with torch.device("meta"):
        block = nn.ModuleDict(
            {
                "q": nn.Linear(4096, 4096, bias=False),
                "k": nn.Linear(4096, 1024, bias=False),
                "v": nn.Linear(4096, 1024, bias=False),
                "o": nn.Linear(4096, 4096, bias=False),
                "gate": nn.Linear(4096, 14336, bias=False),
                "up": nn.Linear(4096, 14336, bias=False),
                "down": nn.Linear(14336, 4096, bias=False),
            }
        )
        model = nn.ModuleList([block])
    names = [f"0.{name}" for name in block]
    said = footprint(model, names, "kfac", 0, processes=8, sharded=True, rate=1.0)
    assert said.solve < 8 * 2**30
    assert math.isclose(32 * said.solutions, 32 * said.weights, rel_tol=0.01)


def test_durations_are_read_by_people() -> None:
    assert [_duration(x) for x in (0.2, 89, 300, 9000)] == ["1 s", "89 s", "5 min", "2.5 h"]
