"""Process groups: exchange objects and tensors between processes, and distribute work to them.

In this package a rank is that of a matrix; a member of a process group is a process, with an index.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.errors import LRCompressError, PlatformError

T = TypeVar("T")
BUCKET = 1 << 23  # values sent at once
_PATIENCE = timedelta(hours=6)  # with one that solves; of one that has died gloo tells at once


@dataclass(frozen=True)
class Processes:
    """A process group as one of its processes sees it. A single process never communicates.

    All methods but :meth:`of`, :meth:`assign`, :meth:`rounds`, :meth:`reshard` and
    :meth:`send_to_first` are collective: every process calls them in the same order. If the others
    cannot be reached any more, each raises a PlatformError that says so. In this class every
    process holds all parameters in full; a subclass for sharded parameters gathers layers.

    Attributes:
        index: number of this process in the group, from 0.
        size: how many there are.
        group: their process group; None is the default one.
        control: the group of gloo that objects travel over, where ``group`` is one of an
            accelerator: NCCL's collectives return at once, and one that fails ends the process.
        sharded: whether each process holds a part of every parameter.
    """

    sharded: ClassVar[bool] = False
    index: int = 0
    size: int = 1
    group: Any = None
    control: Any = None

    @classmethod
    def of(cls, group: Any = None) -> "Processes":
        """Return the processes of a group; this one alone if torch.distributed is not initialised.

        Args:
            group: a process group of torch; None is the default one.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        found = cls(dist.get_rank(group), dist.get_world_size(group), group)
        return replace(found, control=_control(group)) if found.device.type != "cpu" else found

    @property
    def device(self) -> torch.device:
        """The device that tensors must be on to be sent."""
        own = torch.accelerator.current_accelerator() if self.size > 1 else None
        # nccl of CUDA, xccl of XPU, ...; beside it gloo may serve the CPU
        if own is None or dist.get_default_backend_for_device(own) not in self._backends:
            return torch.device("cpu")
        return torch.device(own.type, torch.accelerator.current_device_index())

    @property
    def _backends(self) -> str:
        """What the group communicates with, as in ``cpu:gloo,cuda:nccl``."""
        return str(dist.get_backend_config(self.group))

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable objects ``value`` of all processes, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._explain_failure():
            dist.all_gather_object(found, value, group=self.control or self.group)
        return found

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Return what ``work`` gives in every process; if it fails in one, fail in all.

        Args:
            work: returns a picklable object, its tensors on the CPU.

        Raises:
            LRCompressError: what another process raised; the one that failed raises its own.
            PlatformError: if what another raised is no error of this package.
        """
        value: Any = None
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        told = self.all_gather((value, None if failure is None else _described_error(failure)))
        if failure is not None:
            raise failure
        for number, (_, error_told) in enumerate(told):
            if error_told is not None:
                kind, message = error_told
                raise kind(f"process {number}: {message}")
        return [one for one, _ in told]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Return in all processes what ``work`` gives in the first; fails as :meth:`run_on_all`."""
        return self.run_on_all(lambda: work() if self.index == 0 else None)[0]  # type: ignore[return-value]

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Give ``tensors`` the values they have in the process with index ``source``."""
        if self.size == 1:
            return
        group: Any = self.group or dist.group.WORLD
        source = dist.get_global_rank(group, source)
        self._meet()
        for part in _parts(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in part]).to(self.device)
            with self._explain_failure():
                dist.broadcast(flat, source, group=self.group)
            received = torch.split(flat, [tensor.numel() for tensor in part])
            for tensor, values in zip(part, received, strict=True):
                tensor.detach().copy_(values.view(tensor.shape))

    def send_to_first(self, tensor: Tensor, source: int) -> None:
        """Give a tensor of the first process the values that it has in the one of index ``source``.

        Only these two call it. It goes from host to host: nothing is laid on an accelerator, and
        the other processes neither wait nor receive.

        Args:
            tensor: on the CPU, contiguous; of one shape and dtype in both.
            source: not 0.
        """
        group: Any = self.control or self.group or dist.group.WORLD
        send = self.index == source
        other = dist.get_global_rank(group, 0 if send else source)
        with self._explain_failure():
            (dist.send if send else dist.recv)(tensor, other, group=group)

    def all_reduce_(self, flat: Tensor) -> None:
        """Sum a contiguous tensor over all processes, in place."""
        if self.size == 1:
            return
        there = flat.to(self.device)
        with self._explain_failure():
            dist.all_reduce(there, group=self.group)
        if there is not flat:
            flat.copy_(there)

    def _meet(self) -> None:
        """Wait for all processes where gloo can say that one is lost, before NCCL could not."""
        if self.control is not None:
            with self._explain_failure():
                dist.barrier(group=self.control)

    @contextmanager
    def _explain_failure(self) -> Iterator[None]:
        """Explain the backend's error when another process has died or hangs.

        Raises:
            PlatformError: in place of what the backend raises.
        """
        try:
            yield
        except RuntimeError as error:
            raise PlatformError(
                f"process {self.index} of {self.size} waited for the others in vain: {error}; one "
                "may have died or hang, see what it said last. Start all of them again from the "
                "last checkpoint, with ckpt_path="
            ) from error

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Return the process of each task, such that the largest load is small.

        Greedy, in falling order of cost, each to the process with the least so far. The largest
        load is at most 4/3 of the optimal one.

        Args:
            costs: by name of the task, in any unit.

        Returns:
            Task to index of the process, the same in all processes.

        Example:
            >>> Processes(0, 2).assign({"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0})
            {'a': 0, 'b': 1, 'c': 1, 'd': 0}
        """
        load, owner = [0.0] * self.size, dict.fromkeys(costs, 0)
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owner[name] = min(range(self.size), key=load.__getitem__)
            load[owner[name]] += costs[name]
        return owner

    def rounds(self, owner: Mapping[str, int]) -> list[list[str]]:
        """Return layers round by round: in each at most one of every owner.

        Args:
            owner: layer to process, from :meth:`assign`.

        Example:
            >>> Processes(0, 2).rounds({"a": 0, "b": 1, "c": 1})
            [['a', 'b'], ['c']]
        """
        queues = [[name for name in owner if owner[name] == i] for i in range(self.size)]
        return [[name for name in turn if name is not None] for turn in zip_longest(*queues)]

    def reshard(self, model: nn.Module) -> None:
        """Free the parameters that a forward pass has gathered; here there are none."""

    @contextmanager
    def gathered(self, model: nn.Module, name: str) -> Iterator[None]:  # noqa: ARG002
        """Hold a layer's full parameters inside the block, for reading only."""
        yield

    @contextmanager
    def unsharded(
        self,
        model: nn.Module,  # noqa: ARG002
        names: Sequence[str],  # noqa: ARG002
        optimizers: Sequence[Optimizer] = (),  # noqa: ARG002
    ) -> Iterator[None]:
        """Hold full layers and optimizer state inside the block, which may replace them.

        After the block the layers of these names are sharded as before. Their values must then be
        the same in all processes.
        """
        yield

    def sum_rows_(self, parts: Tensor) -> None:
        """Sum what each process found in its :func:`local_rows`; here each has all rows."""

    def first_difference(self, values: Mapping[str, object]) -> tuple[str, list[object]] | None:
        """Return the first name whose value is not the same in all processes, and its values."""
        told = self.all_gather(dict(values))
        names = dict.fromkeys(name for one in told for name in one)
        for name in names:
            found = [one.get(name) for one in told]
            if any(value != found[0] for value in found):
                return name, found
        return None


ONE_PROCESS = Processes()
_controls: list[tuple[Any, Any]] = []  # a group and that of its control traffic


def _control(group: Any) -> Any:
    """Return the group of gloo beside one of an accelerator, made once; collective then."""
    group = group or dist.group.WORLD
    for known, control in _controls:
        if known is group:
            return control
    ranks = dist.get_process_group_ranks(group)
    control = dist.new_group(
        ranks, _PATIENCE, "gloo", use_local_synchronization=group is not dist.group.WORLD
    )
    _controls.append((group, control))
    return control


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of a parameter, its gradient or state that this process holds.

    Of a plain tensor these are all rows. They share the tensor's memory; call without grad.

    Args:
        tensor: ``(rows, ...)``, plain or a DTensor sharded by rows over its whole mesh.

    Returns:
        The local rows, and their place in the whole tensor.

    Example:
        >>> local_rows(torch.zeros(3, 2))[1]
        slice(0, 3, None)
    """
    if not hasattr(tensor, "to_local"):
        return tensor, slice(0, len(tensor))
    local: Tensor = tensor.to_local()
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    start = min(len(tensor), mesh.get_local_rank() * -(-len(tensor) // mesh.size()))
    return local, slice(start, start + len(local))


def _described_error(error: Exception) -> tuple[type[LRCompressError], str]:
    if isinstance(error, LRCompressError):
        return type(error), str(error)
    return PlatformError, f"{type(error).__name__}: {error}"


def _parts(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in buckets of one dtype and device, at most ``BUCKET`` values if possible."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        part = kinds.setdefault((tensor.dtype, tensor.device), [])
        if part and sum(t.numel() for t in part) + tensor.numel() > BUCKET:
            yield list(part)
            part.clear()
        part.append(tensor)
    yield from (part for part in kinds.values() if part)


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a checksum for every tensor, which depends on the values and their order.

    It is integer arithmetic on the bits, so the same on every device.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> sums = checksums({"a": one, "b": other, "c": one.clone()})
        >>> sums["a"] == sums["c"] != sums["b"]
        True
    """
    sums = {name: _checksum(tensor.detach()) for name, tensor in tensors.items()}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in sums.items():
        by_device.setdefault(value.device, []).append(name)
    result: dict[str, int] = {}
    for names in by_device.values():  # one wait for each device
        result |= zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True)
    return {name: result[name] for name in tensors}


def _checksum(tensor: Tensor) -> Tensor:
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().view(-1)
    bits = (flat.to(torch.int8) if flat.dtype == torch.bool else flat).view(
        width[flat.element_size()]
    )
    columns = max(1, tensor.shape[-1] if tensor.ndim else 1)
    bits = bits.view(-1, columns)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for axis in (0, 1):  # every entry counts by its row and by its column
        sums = bits.sum(axis, dtype=torch.int64)
        place = torch.arange(1, len(sums) + 1, device=tensor.device)
        total = total * 1_000_003 + (sums * (place * 2_654_435_761 + axis)).sum()
    return total
