"""What processes tell each other, and how statistics of several become those of all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrcompress.distributed import ONE_PROCESS, Processes, checksums
from lrcompress.errors import ShapeError

Launch = Callable[..., list[str]]
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from lrcompress.errors import LRCompressError, ObservationError, PlatformError, ShapeError
from lrcompress.distributed import Processes, checksums
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import KINDS, Statistics
from lrcompress.statistics.reduction import (
    all_reduce_, gathered_on_first, reduce_to_first_, reduced_bytes)

dist.init_process_group("gloo")
world = Processes.of()
pair = dist.new_group([0, 1])
SIZES = (2, 5, 1, 4)  # of the batches of each process, in each of three steps


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(70, 6), nn.Linear(70, 6)
        self.down, self.idle = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x, use_idle=False):
        y = self.down((self.q(x) * self.k(x)).tanh())
        return self.idle(y) if use_idle else y


def data(step, number):
    generator = torch.Generator().manual_seed(10 * step + number)
    size = SIZES[(number + step) % 4]
    x = torch.randn(size, 7, 70, generator=generator)
    mask = (torch.arange(7) < torch.randint(2, 8, (size, 1), generator=generator)).long()
    return x, mask, torch.randint(0, 5, (size,), generator=generator)


def observed(numbers, accumulate=1, idle=(), kinds=KINDS):
    "Statistics of the batches of some processes, as one process or as each of them sees them."
    torch.manual_seed(0)
    model = Model()
    recorder = Recorder(model, ["q", "k", "down", "idle"], kinds)
    for step in range(3):
        batches = [data(step, number) for number in numbers]
        x, mask, y = (torch.cat(part) for part in zip(*batches))
        for part in range(accumulate):
            px, pm, py = (t[part::accumulate] for t in (x, mask, y))
            if not len(py):
                continue
            with recorder.step(pm):
                out = model(px, bool(set(numbers) & set(idle)))
                loss = nn.functional.cross_entropy((out * pm[..., None]).sum(1), py)
                recorder.commit(len(py) * accumulate)
                (loss / accumulate).backward()
    return recorder.statistics


def raised(work):
    try:
        work()
    except LRCompressError as error:
        return type(error), str(error)
    raise AssertionError("nothing raised")


calls = []
plain = dist.all_reduce


def counted(tensor, *args, **kwargs):
    calls.append(tensor.nbytes)
    return plain(tensor, *args, **kwargs)


for processes, numbers in ((world, range(4)), (Processes.of(pair), range(2))):
    if processes.index < 0:
        continue
    for accumulate in (1, 2):
        mine = observed([processes.index], accumulate)
        whole = observed(list(numbers))
        dist.all_reduce, before = counted, len(calls)
        all_reduce_(mine, processes, bucket=1000)
        dist.all_reduce = plain
        assert sum(calls[before:]) == reduced_bytes(mine), (calls, reduced_bytes(mine))
        assert max(calls[before:]) <= 4000 and len(calls) - before > 3
        inputs = (4900 + 70 + 70) + (36 + 6 + 6)  # q, which k shares, and down: one block row each
        outputs = 2 * (36 + 4900 + 70 + 1 + 70 + 6) + (25 + 36 + 6 + 1 + 6 + 5)
        assert reduced_bytes(mine) == 4 * (inputs + outputs) + 8 * 3 * 5
        assert mine.source == whole.source and mine.tokens == whole.tokens
        assert mine.steps == 3 * accumulate or accumulate == 2
        for side in ("inputs", "outputs"):
            held, once = getattr(mine, side), getattr(whole, side)
            assert held.keys() == once.keys() and held
            for name, sums in once.items():
                assert int(held[name].examples) == int(sums.examples), name
                assert int(held[name].tokens) == int(sums.tokens), name
                for kind in sums.values:
                    torch.testing.assert_close(
                        held[name].moment(kind), sums.moment(kind), rtol=1e-4, atol=1e-5)
        same = processes.all_gather({n: s.state_dict() for n, s in mine.inputs.items()})
        assert all(torch.equal(a["q"][k], same[0]["q"][k]) for a in same for k in a["q"])

# processes that saw other layers, or nothing at all; folded onto the first
mine = observed([world.index], idle=[2]) if world.index != 3 else Statistics()
ours, theirs = observed([0, 1]), observed([2], idle=[2])
reduce_to_first_(mine, world)
if world.index == 0:
    for name in ("q", "down"):
        total = sum(x.outputs[name].moment("output_moment") for x in (ours, theirs))
        torch.testing.assert_close(mine.outputs[name].moment("output_moment"), total)
    assert torch.equal(mine.outputs["idle"].values["output_moment"].triu(),
                       theirs.outputs["idle"].values["output_moment"].triu())
    assert mine.tokens == ours.tokens + theirs.tokens and mine.steps == 3
else:
    assert not mine.inputs and not mine.outputs and not mine.steps and not mine.source

# contradictions are named, in all processes
mine = observed([world.index])
if world.index == 1:
    mine.source["k"] = "k"
assert raised(lambda: all_reduce_(mine, world)) == (ObservationError,
    "layer 'k' reads the tensor of 'q' in process 0 and that of 'k' in process 1; "
    "leave it out with exclude=")
mine = observed([world.index], kinds=KINDS if world.index else KINDS[:2])
kind, message = raised(lambda: all_reduce_(observed([world.index],
    kinds=["output_moment"] if world.index == 2 else ["input_fisher"]), world))
assert kind is ObservationError and "'down'" in message and "process 2" in message, message

# what fails in one process fails in all
def fails():
    if world.index == 2:
        raise ShapeError("no")
    return world.index
told = "no" if world.index == 2 else "process 2: no"
assert raised(lambda: world.run_on_all(fails)) == (ShapeError, told)
def breaks():
    if world.index == 0:
        raise KeyError("x")
try:
    world.run_on_all(breaks)
except (PlatformError, KeyError) as error:
    assert (type(error) is KeyError) == (world.index == 0)
    assert world.index == 0 or str(error) == "process 0: KeyError: 'x'"
assert world.run_on_all(lambda: world.index) == [0, 1, 2, 3]
assert world.run_on_first(lambda: world.index + 10) == 10

tensors = [torch.full(shape, float(world.index)) for shape in ((3,), (2, 2), ())]
tensors.append(torch.full((2,), world.index))
world.broadcast_(tensors, 3)
assert all(bool((t == 3).all()) for t in tensors)
if processes.size == 2:
    tensors = [torch.full((3,), float(processes.index))]
    processes.broadcast_(tensors, 1)
    assert tensors[0][0] == 1
for processes, source in ((world, 2), (Processes.of(pair), 1)):
    if processes.index in (0, source):  # the others do not take part
        found = torch.full((2, 3), float(processes.index))
        processes.send_to_first(found, source)
        assert bool((found == source).all())

# each process holds other layers; the first returns all, as they are, and nothing is broadcast
whole = observed([0])
names = sorted({("inputs", n) for n in whole.inputs} | {("outputs", n) for n in whole.outputs})
mine = observed([0])
for place, (side, name) in enumerate(names):
    if place % 4 != world.index:
        del getattr(mine, side)[name]
mine.source = {n: f for n, f in mine.source.items() if world.index == 3}
Processes.broadcast_ = None
found = gathered_on_first(mine, world)
if world.index == 0:
    assert found["source"] == whole.source
    for side, name in names:
        for kind, value in getattr(whole, side)[name].state_dict().items():
            assert torch.equal(found[side][name][kind], value), (side, name, kind)
else:
    assert not found["inputs"] and not found["outputs"] and not found["source"]
assert world.first_difference({"a": 1, "b": world.index // 3}) == ("b", [0, 0, 0, 1])
assert world.first_difference({"a": 1}) is None
print("ok", world.index)
"""


def test_four_processes_know_what_one_would(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    told = launch(script, 4)
    assert [one.split() for one in told] == [["ok", str(i)] for i in range(4)]


def test_one_alone_tells_no_one() -> None:
    tensor = torch.ones(2)
    ONE_PROCESS.broadcast_([tensor], 0)
    ONE_PROCESS.all_reduce_(tensor)
    assert Processes.of() == ONE_PROCESS
    assert ONE_PROCESS.all_gather(3) == [3]
    assert ONE_PROCESS.first_difference({"a": 1}) is None
    assert tensor.tolist() == [1, 1]
    with pytest.raises(ShapeError, match=r"^no$"):
        ONE_PROCESS.run_on_all(_fail)


def _fail() -> None:
    raise ShapeError("no")


def test_work_is_dealt_evenly() -> None:
    costs = {f"layer{i}": float(cost) for i, cost in enumerate([9, 7, 6, 5, 5, 4, 3, 1])}
    owner = Processes(0, 3).assign(costs)
    loads = [sum(costs[n] for n, who in owner.items() if who == i) for i in range(3)]
    assert max(loads) <= 14
    assert owner == Processes(2, 3).assign(costs)
    assert list(owner) == list(costs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_a_checksum_sees_every_change(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (
        (torch.randn(5, 6) > 0).to(dtype) if dtype == torch.bool else torch.randn(5, 6).to(dtype)
    )
    other = {"same": tensor.clone(), "strided": tensor.mT.contiguous().mT}
    changed = tensor.clone()
    changed[3, 2] = not changed[3, 2] if dtype == torch.bool else changed[3, 2] * 1.01
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    sums = checksums({"it": tensor, **other, "changed": changed, "swapped": swapped})
    assert sums["it"] == sums["same"] == sums["strided"]
    assert len({sums["it"], sums["changed"], sums["swapped"]}) == 3
    assert checksums({"empty": torch.zeros(0), "scalar": torch.tensor(1.0)}).keys()
