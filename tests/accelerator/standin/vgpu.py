"""Registers the stand-in for a GPU with torch: importing this changes the whole process."""

import gc
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from build import library
from torch import Tensor

torch.ops.load_library(str(library()))
torch.utils.rename_privateuse1_backend("vgpu")
# Else tied weights break on .to(), which replaces .data on the devices that torch knows.
torch.__future__.set_swap_module_params_on_conversion(True)

_DEVICES = 2
_ops = torch.ops.vgpu


class Counts(NamedTuple):
    """What has happened since the last reset, on all devices together."""

    now: int  # bytes that are allocated
    peak: int  # most bytes that were
    waits: int  # times that the host waited for a device: copies to it, sizes that values decide
    uploads: int  # copies to a device that block, as those of pageable memory do


def counts(*, reset: bool = False) -> Counts:
    """Return the counts so far, and start anew."""
    return Counts(*_ops.stats(reset))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that ``work`` had on the devices above what was there before."""
    gc.collect()
    before = counts(reset=True).now
    work()
    return counts().peak - before


def launch(seconds: float) -> None:
    """Launch work that keeps the devices busy for so long; the host goes on at once."""
    _ops.launch(seconds)


class _Stream:
    """The only stream: everything in it is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record(self, *_: Any) -> None: ...


class _Module(types.ModuleType):
    """``torch.vgpu``, as ``torch.cuda`` is for CUDA."""

    Stream = Event = _Stream
    capacity = 1 << 40  # bytes of a device; a test may set it

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def _lazy_init() -> None: ...

    @staticmethod
    def device_count() -> int:
        return _DEVICES

    @staticmethod
    def current_device() -> int:
        return int(_ops.set_device(-1))

    @staticmethod
    def set_device(device: Any) -> None:
        _ops.set_device(_index(device))

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.capacity - counts().now, self.capacity

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return counts().now

    memory_reserved = memory_allocated

    @staticmethod
    def synchronize(device: Any = None) -> None:
        torch.accelerator.synchronize(_index(device))

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    @staticmethod
    def stream(_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def manual_seed(seed: int) -> None:
        _ops.seed(_index(), seed)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        for index in range(_DEVICES):
            _ops.seed(index, seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return _ops.get_rng_state(_index(device))

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        _ops.set_rng_state(_index(device), state)


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return int(_ops.set_device(-1)) if index is None else index


torch._register_device_module("vgpu", _Module("torch.vgpu"))
torch.utils.generate_methods_for_privateuse1_backend()
DEVICE = torch.device("vgpu", 0)
OTHER = torch.device("vgpu", 1)
