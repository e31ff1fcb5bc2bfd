"""Layers that no factors make faster stay; the others pay for them, or keep is missed."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcompress.bench.latency_ranks import allocate_by_latency, relative_time
from lrcompress.budget import Candidate, allocate, kept_share, pivoted_costs
from lrcompress.nn import LowRankLinear, PivotedLinear

# Two calls in place of one are slower where there is next to nothing to compute, and faster
# where there is much: far from where noise could turn it.
WIDE = nn.Linear(1024, 2048)
TOKENS = 64

PROCESS = """
import torch
from torch import nn
import lrcompress.bench.latency_ranks as faster
from lrcompress.engine.compress import Settings, factor_
from lrcompress.distributed import Processes
from lrcompress.statistics.moments import Statistics

torch.distributed.init_process_group("gloo")
processes = Processes.of()
def never(*_):
    raise AssertionError("measured in a process that does not decide")
if processes.index:
    faster.relative_time = never
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1024, 2048), *(nn.Linear(16, 16) for _ in range(20)))
settings = Settings(method="svd", keep=0.2, keep_measured=True, measured_tokens=64)
record = factor_(model, Statistics(), settings, processes=processes)
print(sum(bool(x.note) for x in record.layers), [x.rank for x in record.layers])
"""


def asked(model: nn.Module) -> list[Candidate]:
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [Candidate(name, m.out_features, m.in_features) for name, m in named]


def test_the_others_pay_for_layers_that_stay() -> None:
    model = nn.Sequential(WIDE, *(nn.Linear(16, 16) for _ in range(100)))
    layers = asked(model)
    choice = allocate_by_latency(model, layers, 0.2, "uniform", 1, TOKENS)
    first = allocate(layers, 0.2)
    cut = {name for name, rank in first.items() if rank is not None} - {"0"}
    assert len(cut) > 50
    assert set(choice.notes) == cut
    assert all(choice.ranks[name] is None for name in cut)
    note = choice.notes["100"]
    assert note.startswith(f"stays as it is: a rank of {first['100']} takes ")
    assert note.endswith("× its time at 64 tokens")
    assert choice.ranks["0"] < first["0"]  # type: ignore[operator]
    assert 0.2 - 3072 / (1024 * 2048) < kept_share(layers, choice.ranks) <= 0.2
    assert choice.missed == ""


def test_a_keep_that_cannot_be_met_is_told_and_the_others_do_not_suffer() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(100)), WIDE)
    layers = asked(model)
    choice = allocate_by_latency(model, layers, 0.01, "uniform", 1, TOKENS)
    first = allocate(layers, 0.01)
    assert choice.ranks["100"] == first["100"]
    assert all(choice.ranks[str(i)] is None for i in range(100))
    kept = kept_share(layers, choice.ranks)
    assert kept > 0.01
    assert choice.missed == (
        f"keep=0.01 is missed, {kept:.3f} remains: 100 of 101 layers are not faster with factors "
        "and stay as they are"
    )


def test_where_nothing_is_faster_all_stays() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    choice = allocate_by_latency(model, asked(model), 0.5, "uniform", 1, TOKENS)
    assert choice.ranks == {"0": None}
    assert choice.missed.startswith("keep=0.5 is missed, 1.000 remains: 1 of 1 layers")


def test_what_is_asked_for_by_name_is_not_measured() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    layers = [Candidate("0", 16, 16, rank=3), Candidate("1", 16, 16, keep=0.5)]
    choice = allocate_by_latency(model, layers, None, "uniform", 1, TOKENS)
    assert (choice.ranks, choice.notes) == ({"0": 3, "1": 4}, {})


def test_a_factored_layer_stays_factored() -> None:
    model = nn.Sequential(LowRankLinear(16, 16, rank=1))
    layers = [Candidate("0", 16, 16, highest=1)]
    assert allocate_by_latency(model, layers, 0.5, "uniform", 1, 4).ranks == {"0": 1}


def test_pivoted_rows_are_measured_and_paid_as_such() -> None:
    model = nn.Sequential(WIDE, nn.Linear(16, 16), PivotedLinear(16, 16, rank=3))
    layers = [
        Candidate(name, *sizes, highest=highest, costs=pivoted_costs(*sizes))
        for name, sizes, highest in (
            ("0", (2048, 1024), None),
            ("1", (16, 16), None),
            ("2", (16, 16), 3),
        )
    ]
    choice = allocate_by_latency(model, layers, 0.3, "uniform", 1, TOKENS)
    assert (choice.ranks["1"], choice.ranks["2"]) == (None, 3)
    assert 0.299 < kept_share(layers, choice.ranks) <= 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_compared_with_what_stands_there(dtype: torch.dtype) -> None:
    wide, tiny = (nn.Linear(*sizes, dtype=dtype) for sizes in ((1024, 2048), (16, 16)))
    high, low = (LowRankLinear(1024, 2048, rank, dtype=dtype) for rank in (512, 16))
    rows = PivotedLinear(1024, 2048, 512, dtype=dtype)
    state = torch.get_rng_state()
    assert relative_time(wide, 16, TOKENS) < 0.5
    assert relative_time(high, 16, TOKENS) < 0.5
    assert relative_time(low, 512, TOKENS) > 2
    assert relative_time(tiny, 7, 1) > 1
    assert relative_time(rows, 16, TOKENS, pivoted=True) < 0.5
    assert relative_time(low, 512, TOKENS, pivoted=True) > 2
    assert torch.get_rng_state().equal(state)


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **kwargs or {})


def test_layers_are_measured_in_the_precision_that_the_model_runs_in() -> None:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    layer, model = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))
    for context, dtype in ((nullcontext, torch.float32), (autocast, torch.bfloat16)):
        with Products() as seen:
            relative_time(layer, 4, 8, context)
            allocate_by_latency(model, asked(model), 0.5, "uniform", 1, TOKENS, context)
        assert set(seen.dtypes) == {dtype}
    with Products() as seen, autocast():  # of the caller
        relative_time(layer, 4, 8)
    assert set(seen.dtypes) == {torch.bfloat16}


def test_autocast_converts_the_weights_in_every_call() -> None:
    conversions = []

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.overloadpacket.__name__ == "_to_copy" and args[0].shape == (16, 32):
                conversions.append(kwargs)
            return func(*args, **kwargs or {})

    with Conversions():
        relative_time(nn.Linear(32, 16), 4, 8, partial(torch.autocast, "cpu", torch.bfloat16), 3)
    assert len(conversions) == 4  # three rounds and one before


def test_one_process_decides_for_all(launch: Callable[..., list[str]], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    one, other = launch(script, 2)
    assert one == other
    assert int(one.split()[0]) > 0
