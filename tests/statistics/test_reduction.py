"""Reducing statistics, as far as one process can tell; tests/test_distributed.py has four."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Barrier
from typing import Any

import pytest
import torch

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.errors import ObservationError
from lrcompress.statistics.moments import (
    INPUT_KINDS,
    KINDS,
    OUTPUT_KINDS,
    Statistics,
    Sums,
    shapes,
)
from lrcompress.statistics.reduction import (
    _buckets,
    all_reduce_,
    gathered_on_first,
    of_layers,
    reduce_to_first_,
    reduced_bytes,
)


def statistics() -> Statistics:
    torch.manual_seed(0)
    made = Sums.zeros(shapes(KINDS, 150, 70))
    for value in made.values.values():
        value.copy_(torch.randn(value.shape))
    return Statistics(inputs={"a": made}, source={"a": "a"}, steps=2, skipped=1, tokens=9)


@pytest.mark.parametrize("bucket", [1, 100, 1000, 1 << 20])
def test_buckets_hold_every_value_that_counts_once(bucket: int) -> None:
    one, other = statistics(), statistics()
    for value in other.inputs["a"].values.values():
        value.zero_()
    total = 0
    pairs = (_buckets([x.inputs["a"]], bucket) for x in (one, other))
    for parts, empty in zip(*pairs, strict=True):
        size = sum(part.numel() for part in parts)
        assert size <= bucket
        total += 4 * size
        for part, place in zip(parts, empty, strict=True):
            place.copy_(part)
    assert total + 8 * 3 == reduced_bytes(one)
    for kind, value in one.inputs["a"].values.items():
        assert torch.equal(other.inputs["a"].values[kind], value)


def test_the_bytes_are_those_of_one_triangle() -> None:
    sums = Sums.zeros(shapes(["input_moment"], 600, 1))  # five block rows, the last of 88
    rows = 128 * (600 + 472 + 344 + 216) + 88 * 88
    assert reduced_bytes(Statistics(inputs={"a": sums})) == 4 * (rows + 600) + 24


def test_one_process_keeps_what_it_has() -> None:
    one, other = statistics(), statistics()
    all_reduce_(one, ONE_PROCESS)
    reduce_to_first_(one, ONE_PROCESS)
    assert one.steps == 2
    assert torch.equal(
        one.inputs["a"].values["input_moment"], other.inputs["a"].values["input_moment"]
    )
    one.clear_()
    assert not one.inputs
    assert not one.source
    assert (one.steps, one.skipped, one.tokens) == (0, 0, 0)


# Several processes, as threads that wait for each other


@dataclass(frozen=True)
class Thread(Processes):
    barrier: Any = None
    board: Any = None
    box: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def all_gather(self, value: Any) -> list[Any]:
        self.board[self.index] = value
        self.barrier.wait()
        found = [self.board[i] for i in range(self.size)]
        self.barrier.wait()
        return found

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        total = sum(self.all_gather(tensor.clone()))
        assert isinstance(total, torch.Tensor)
        tensor.copy_(total)

    def send_to_first(self, tensor: torch.Tensor, source: int) -> None:
        if self.index == 0:
            tensor.copy_(self.box[source].get(timeout=60))
        elif self.index == source:
            self.box[source].put(tensor.clone())


def together(work: Callable[[Processes], Any], size: int = 3) -> list[Any]:
    """What each of several processes gives, or the error it raises."""
    barrier, board, box = Barrier(size, timeout=60), {}, [SimpleQueue() for _ in range(size)]
    everyone = [Thread(i, size, barrier=barrier, board=board, box=box) for i in range(size)]

    def attempt(one: Processes) -> Any:
        try:
            return work(one)
        except ObservationError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(attempt, everyone))


def seen_by(number: int, layers: str) -> Statistics:
    """Layers of which each reads the tensor of the first of its letter's case."""
    own = torch.Generator().manual_seed(number)  # threads share the other one
    found = Statistics(steps=number + 1, skipped=number, tokens=10 * number)
    for name in layers:
        found.source[name] = "a" if name.islower() else "A"
        for held, key, kinds in (
            (found.inputs, found.source[name], INPUT_KINDS),
            (found.outputs, name, OUTPUT_KINDS),
        ):
            held[key] = Sums.zeros(shapes(kinds, 9, 5))
            for value in held[key].named_tensors().values():
                value.copy_(torch.randint(0, 99, value.shape, generator=own))
    return found


SEEN = ("ab", "a", "bAB")


def whole() -> Statistics:
    found = Statistics()
    for number, layers in enumerate(SEEN):
        found.source |= seen_by(number, layers).source
    for number, layers in enumerate(SEEN):
        one = seen_by(number, layers)
        for held, added in ((found.inputs, one.inputs), (found.outputs, one.outputs)):
            for name, sums in added.items():
                held.setdefault(name, Sums.zeros({k: v.shape for k, v in sums.values.items()}))
                held[name].merge_(sums)
    return found


@pytest.mark.parametrize("bucket", [7, 1 << 20])
def test_every_process_holds_what_all_have_seen(bucket: int) -> None:
    def work(processes: Processes) -> Statistics:
        mine = seen_by(processes.index, SEEN[processes.index])
        all_reduce_(mine, processes, bucket=bucket)
        return mine

    wanted = whole()
    for found in together(work):
        assert found.source == wanted.source
        assert (found.steps, found.skipped, found.tokens) == (3, 3, 30)
        for held, other in ((found.inputs, wanted.inputs), (found.outputs, wanted.outputs)):
            assert held.keys() == other.keys()
            for name, sums in other.items():
                for key, value in sums.named_tensors().items():
                    assert held[name].named_tensors()[key].equal(value), (name, key)


def test_where_nothing_was_seen_only_steps_are_told() -> None:
    def work(processes: Processes) -> Statistics:
        mine = Statistics(steps=processes.index, tokens=2)
        all_reduce_(mine, processes)
        return mine

    assert together(work) == [Statistics(steps=2, tokens=6)] * 3
    assert together(work, 2) == [Statistics(steps=1, tokens=4)] * 2


def test_the_first_process_gets_all_and_the_others_nothing_is_left() -> None:
    def work(processes: Processes) -> Statistics:
        mine = seen_by(processes.index, SEEN[processes.index])
        reduce_to_first_(mine, processes)
        return mine

    first, *others = together(work)
    assert others == [Statistics()] * 2
    assert (first.steps, first.skipped, first.tokens) == (3, 3, 30)
    assert first.outputs["b"].tokens == whole().outputs["b"].tokens


@pytest.mark.parametrize(
    ("layers", "change", "told"),
    [
        (
            "ab",
            "source",
            r"layer 'b' reads the tensor of 'a' in process 0 and that of 'b' in process 2; l",
        ),
        (
            "Ab",
            "shapes",
            r"statistics of layer 'b' are \{.*output_fisher.* in process 0 and \{.* in proc",
        ),
    ],
)
def test_processes_that_differ_are_told_by_number_in_all_of_them(
    layers: str, change: str, told: str
) -> None:
    def work(processes: Processes) -> Statistics:
        mine = seen_by(processes.index, layers)
        if processes.index == 2 and change == "source":
            mine.source["b"] = "b"
        elif processes.index == 2:
            del mine.outputs["b"].values["output_fisher"]
        before = mine.state_dict()
        try:
            all_reduce_(mine, processes)
        finally:
            assert mine.steps == processes.index + 1
            assert mine.outputs["b"].tokens.equal(before["outputs"]["b"]["tokens"])  # type: ignore[index]
        return mine

    for error in together(work):
        assert isinstance(error, ObservationError)
        assert re.match(told, str(error)), error
        assert "process 2" in str(error)


def test_layers_of_all_processes_are_gathered_on_the_first_as_they_are() -> None:
    apart = ("a", "cd", "B")

    def work(processes: Processes) -> Any:
        mine = seen_by(processes.index, apart[processes.index])
        if processes.index == 1:
            mine.inputs = {"c": mine.inputs["a"]}
            mine.source = {"c": "c", "d": "c"}
        return mine.state_dict(), gathered_on_first(mine, processes)

    (own, found), *others = together(work)
    for _, empty in others:
        assert empty == Statistics().state_dict()
    assert found["counts"] == own["counts"]
    assert found["source"] == {"a": "a", "c": "c", "d": "c", "B": "A"}
    again = Statistics()
    again.load_state_dict(found, "cpu")
    for state, _ in ((own, None), *others):
        for side in ("inputs", "outputs"):
            for name, sums in state[side].items():
                for key, value in sums.items():
                    assert found[side][name][key].equal(value), (side, name, key)
    assert found["inputs"].keys() == {"a", "c", "A"}
    assert found["outputs"].keys() == {"a", "c", "d", "B"}


def test_a_part_of_a_state_is_of_its_layers_alone() -> None:
    state = seen_by(1, "abcA").state_dict()
    part = of_layers(state, iter(["c", "b", "x"]))
    assert part["source"] == {"c": "c", "b": "c"}
    assert part["inputs"] == {"c": state["inputs"]["a"]}  # type: ignore[index]
    assert part["outputs"].keys() == {"c", "b"}
    assert part["outputs"]["b"] is state["outputs"]["b"]  # type: ignore[index]
    assert part["counts"] == state["counts"]
