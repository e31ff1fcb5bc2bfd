"""Turns: layers that are observed group after group, each in a part of the window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrcompress.distributed import Processes
from lrcompress.errors import CheckpointError, ObservationError
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import Statistics


class Turns:
    """Which layers are observed at a step, where groups of them take turns.

    The window is cut into as many parts of equal length as there are groups. The sums of a group
    are on its layers' devices in its part, and on the host after it: a device holds those of one
    group, and each crosses to the host once.

    Args:
        every: watches all layers.
        count: groups that are asked for; where modules are fewer, there are fewer.

    Attributes:
        groups: the layers of each, in the order of the model.
        seen: the groups of which a step was observed, and of how many tokens.
    """

    def __init__(self, every: Recorder, count: int) -> None:
        self.count = count
        self.groups = in_turns({name: every.bytes_of(name) for name in every.layers}, count)
        self.seen: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.groups)

    def at(self, ahead: int, window: int) -> int:
        """Return the group of a step that is ``ahead`` steps before the end of a window."""
        return (window - ahead) * len(self) // window

    def add(self, group: int, tokens: int) -> None:
        """Count a step of a group, and the tokens of it."""
        self.seen[group] = self.seen.get(group, 0) + tokens

    def agree_(self, processes: Processes, *, dealt: bool) -> None:
        """Know what was observed: dealt what all processes have seen, otherwise what any has."""
        every = processes.all_gather(self.seen)
        known = [group for one in every for group in one]
        needed = len(every) if dealt else 1
        self.seen = {
            g: max(one.get(g, 0) for one in every) for g in known if known.count(g) >= needed
        }

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return what a checkpoint holds; a collective call."""
        return {"count": self.count, "seen": processes.all_gather(self.seen)}

    def load(self, state: Mapping[str, Any], processes: Processes) -> None:
        """Go on from :meth:`state`, with any number of processes.

        Raises:
            CheckpointError: if it is of another number of turns.
        """
        written, seen = state.get("count", 1), state.get("seen", [])
        if written != self.count:
            raise CheckpointError(
                f"the checkpoint was written within a window of turns={written}, got "
                f"turns={self.count}; resume with the same, or from a checkpoint of before it"
            )
        same = len(seen) == processes.size
        for one in [seen[processes.index]] if same else seen:
            self.seen |= {group: max(more, self.seen.get(group, 0)) for group, more in one.items()}

    def check(self, point: object) -> None:
        """Check that every group was observed.

        Raises:
            ObservationError: if one was not.
        """
        missed = [number for number in range(len(self)) if number not in self.seen]
        if missed:
            raise ObservationError(
                f"nothing was observed of {self.groups[missed[0]][0]!r} before point {point}: no "
                f"step of part {missed[0] + 1} of {len(self)} of the window was observed, or none "
                "was finite; widen window=, or lower turns= or every_n_steps="
            )


def in_turns(nbytes: Mapping[str, int], count: int) -> list[list[str]]:
    """Return layers in groups of about as many bytes, in their order.

    Layers of one module stay together, for they may read one tensor.

    Args:
        nbytes: of every layer's statistics.
        count: of groups, at most.

    Example:
        >>> in_turns({"0.q": 3, "0.k": 3, "1.q": 3, "1.k": 3, "2.q": 6}, 3)
        [['0.q', '0.k'], ['1.q', '1.k'], ['2.q']]
    """
    modules: dict[str, list[str]] = {}
    for name in nbytes:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    total, before = max(1, sum(nbytes.values())), 0
    groups: dict[int, list[str]] = {}
    for names in modules.values():
        size = sum(nbytes[name] for name in names)
        middle = 2 * before + size  # of the module, in halves of bytes
        groups.setdefault(min(count - 1, middle * count // (2 * total)), []).extend(names)
        before += size
    return list(groups.values())


def place_(statistics: Statistics, layers: Mapping[str, nn.Module]) -> None:
    """Move the symmetric sums of some layers beside them, and those of all others to the host."""
    for held in (statistics.inputs, statistics.outputs):
        for name, sums in held.items():
            layer = layers.get(name)
            there = torch.device("cpu") if layer is None else next(layer.parameters()).device
            for kind, value in sums.values.items():
                if value.ndim > 1 and value.device != there:
                    sums.values[kind] = value.to(there)
