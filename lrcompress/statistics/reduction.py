"""All-reduce of statistics over processes, once, at the point."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompress.distributed import BUCKET, Processes
from lrcompress.errors import ObservationError
from lrcompress.statistics.moments import Statistics, Sums

_COUNTS = 3


def reduced_bytes(statistics: Statistics) -> int:
    """Return the bytes that :func:`all_reduce_` adds up: all sums, and ``8·3`` for the counts."""
    return sum(8 * _COUNTS + sums.nbytes for _, sums in _every(statistics))


@torch.no_grad()
def all_reduce_(
    statistics: Statistics,
    processes: Processes,
    device: torch.device | str = "cpu",
    *,
    bucket: int = BUCKET,
) -> None:
    """Add up the statistics of all processes, so that every process holds the sum.

    Processes may have seen different layers, steps and batch sizes; one that saw nothing of a
    layer adds zeros. Steps were taken together, so they are those of the process with most.
    To be called by all, once: a second call would count everything once more per process.

    Args:
        statistics: of this process, changed in place.
        processes: the processes.
        device: for sums that others have and this one lacks.
        bucket: the most values sent at once.

    Raises:
        ObservationError: if processes share inputs between layers differently, or hold other
            kinds for a layer; in all of them, and nothing is changed.

    Cost:
        :func:`reduced_bytes` in about ``values / bucket + 1`` reductions; before, one exchange of
        names.
    """
    if processes.size == 1:
        return
    everyone = processes.all_gather(_described(statistics))
    _check_alike(everyone)
    _adopt_(statistics, everyone, device)
    every = [sums for _, sums in sorted(_every(statistics), key=lambda named: named[0])]
    counts = [count for sums in every for count in (sums.tokens, sums.examples, sums.skipped)]
    if not counts:
        return
    packed = torch.stack([count.to(processes.device) for count in counts])
    processes.all_reduce_(packed)
    for count, value in zip(counts, packed.unbind(), strict=True):
        count.copy_(value)
    for parts in _buckets(every, bucket):
        flat = torch.cat([part.to(processes.device) for part in parts])
        processes.all_reduce_(flat)
        places = torch.split(flat, [part.numel() for part in parts])
        for part, place in zip(parts, places, strict=True):
            part.copy_(place)


def reduce_to_first_(
    statistics: Statistics, processes: Processes, device: torch.device | str = "cpu"
) -> None:
    """Add up the statistics of all processes in the first, and clear those of the others.

    The total stays the same, and one file that the first process writes holds it all.
    """
    all_reduce_(statistics, processes, device)
    if processes.index > 0:
        statistics.clear_()


@torch.no_grad()
def gathered_on_first(statistics: Statistics, processes: Processes) -> dict[str, object]:
    """Return the state of statistics of which every process holds other layers, in the first.

    The others return an empty state. Nothing is added up or changed; one tensor after the other
    is sent, from the host of its process to that of the first.

    Args:
        statistics: of this process.
        processes: the processes.

    Cost:
        Every process sends its own part, once. The first has all of them on its host, the others
        one tensor, and no accelerator anything.
    """
    first = processes.index == 0
    state: dict[str, Any] = (statistics if first else Statistics()).state_dict()
    everyone = processes.all_gather(_described(statistics))
    mine = dict(_every(statistics))
    for number, one in enumerate(everyone[1:], start=1):
        if processes.index not in (0, number):
            continue
        state["source"] |= one["source"] if first else {}
        for (side, name), shapes in one["shapes"].items():
            held = Sums.zeros(shapes, "cpu") if first else mine[side, name]
            for key, value in sorted(held.named_tensors().items()):
                sent = value.cpu()
                processes.send_to_first(sent, number)
                if first:
                    state[side].setdefault(name, {})[key] = sent
    return state


def of_layers(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the part of a state of statistics that is about some of the layers.

    The first of them that reads a tensor takes over from a layer that is not among them.

    Args:
        state: as :meth:`~lrcompress.statistics.moments.Statistics.state_dict` gives it.
        names: of the layers.
    """
    firsts: dict[str, str] = {}
    chosen = [*names]
    known = {name: state["source"][name] for name in chosen if name in state["source"]}
    source = {name: firsts.setdefault(read, name) for name, read in known.items()}
    inputs = {name: state["inputs"][read] for read, name in firsts.items()}
    outputs = {name: state["outputs"][name] for name in chosen if name in state["outputs"]}
    return {**state, "source": source, "inputs": inputs, "outputs": outputs}


def _every(statistics: Statistics) -> Iterator[tuple[tuple[str, str], Sums]]:
    for side, held in (("inputs", statistics.inputs), ("outputs", statistics.outputs)):
        yield from (((side, name), sums) for name, sums in held.items())


def _described(statistics: Statistics) -> dict[str, Any]:
    shapes = {
        key: {kind: tuple(value.shape) for kind, value in sums.values.items()}
        for key, sums in _every(statistics)
    }
    counts = (statistics.steps, statistics.skipped, statistics.tokens)
    return {"source": dict(statistics.source), "shapes": shapes, "counts": counts}


def _check_alike(everyone: Sequence[Mapping[str, Any]]) -> None:
    source: dict[str, tuple[str, int]] = {}
    shapes: dict[tuple[str, str], tuple[object, int]] = {}
    for number, one in enumerate(everyone):
        for name, first in one["source"].items():
            known, whose = source.setdefault(name, (first, number))
            if known != first:
                raise ObservationError(
                    f"layer {name!r} reads the tensor of {known!r} in process {whose} and that of "
                    f"{first!r} in process {number}; leave it out with exclude="
                )
        for key, found in one["shapes"].items():
            before, whose = shapes.setdefault(key, (found, number))
            if before != found:
                raise ObservationError(
                    f"statistics of layer {key[1]!r} are {before} in process {whose} and {found} "
                    f"in process {number}; give all processes the same model and settings"
                )


def _adopt_(
    statistics: Statistics, everyone: Sequence[Mapping[str, Any]], device: torch.device | str
) -> None:
    """Take over what others saw: whose tensor a layer reads, zeros for sums, and plain counts."""
    for one in everyone:
        statistics.source |= one["source"]
        for (side, name), shapes in one["shapes"].items():
            held = statistics.inputs if side == "inputs" else statistics.outputs
            if name not in held:
                held[name] = Sums.zeros(shapes, device)
    steps, skipped, tokens = zip(*(one["counts"] for one in everyone), strict=True)
    statistics.steps, statistics.skipped, statistics.tokens = max(steps), sum(skipped), sum(tokens)


def _buckets(every: Sequence[Sums], bucket: int) -> Iterator[list[Tensor]]:
    """Yield flat parts of all sums, of one dtype and about ``bucket`` values together."""
    filled: list[Tensor] = []
    size = 0
    for sums in every:
        for kind in sorted(sums.values):
            for part in torch.split(sums.values[kind].view(-1), bucket):
                other = filled and filled[0].dtype != part.dtype
                if other or (filled and size + part.numel() > bucket):
                    yield filled
                    filled, size = [], 0
                filled.append(part)
                size += part.numel()
    if filled:
        yield filled
