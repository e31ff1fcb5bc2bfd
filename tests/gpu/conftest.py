"""Tests of this folder run on a GPU of CUDA, by ``pytest tests/gpu``; elsewhere they are skipped.

Their bodies ask a :class:`Card` for what differs between devices, so that they can be tried where
there is no GPU: ``LRCOMPRESS_CARD=cpu`` runs them on the CPU, ``LRCOMPRESS_CARD=standin`` on the
stand-in device of ``tests/accelerator``. What only a GPU has is skipped there, test by test.
"""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.amp import GradScaler

HERE = Path(__file__).parent
CARD = os.environ.get("LRCOMPRESS_CARD", "cuda")
LACKING = (
    "needs a GPU of CUDA: torch.cuda.is_available() is false (LRCOMPRESS_CARD=cpu or =standin "
    "tries the tests without one)"
    if CARD == "cuda" and not torch.cuda.is_available()
    else None
)
# What CUDA, NCCL and Inductor tell their users, of which none is a fault here.
TOLD = (
    "Synchronization debug mode is a prototype",
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "TensorFloat32 tensor cores for float32 matrix multiplication available",
    ".*barrier().*device",
    ".*No device id is provided via",
    "Memory Efficient attention defaults to a non-deterministic algorithm",
    "The CUDA Graph is empty",
)

sys.path.insert(0, str(HERE.parent / "callbacks"))
if CARD == "standin":  # before a backward pass has run, for it comes too late after one
    sys.path.insert(0, str(HERE.parent / "accelerator" / "standin"))
    import vgpu
    import vtrainer
import short_runs  # noqa: E402


class Card:
    """The device under test, what trains on it, and what it tells of bytes and waits."""

    name = CARD
    real = CARD == "cuda"

    def __init__(self, no_waits: type) -> None:
        self._no_waits = no_waits
        self.device = vgpu.DEVICE if CARD == "standin" else torch.device(CARD)
        if self.real:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.type = self.device.type
        self.fit = partial(short_runs.fit, self.trainer)

    def needs(self, *names: str, why: str) -> None:
        """Skip the test but on cards of these names."""
        if CARD not in names:
            pytest.skip(f"{why} (LRCOMPRESS_CARD={CARD})")

    def others(self) -> list[torch.device]:
        """Further devices of its kind."""
        count = 0 if CARD == "cpu" else torch.get_device_module(self.type).device_count()
        return [torch.device(self.type, i) for i in range(count) if i != self.device.index]

    def trainer(self, *callbacks: L.Callback, precision: str = "32-true", **kwargs: Any) -> Any:
        """Return a trainer on the device, of 8 steps by default."""
        if CARD == "standin":
            return vtrainer.trainer(*callbacks, precision=precision, **kwargs)
        kinds: dict[str, Any] = {"precision": precision}
        if CARD == "cpu" and precision == "16-mixed":  # which Lightning refuses on a CPU
            kinds = {"plugins": [MixedPrecision(precision, "cpu", GradScaler("cpu"))]}
        defaults: dict[str, Any] = {
            "accelerator": CARD,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_steps": 8,
        }
        return L.Trainer(callbacks=list(callbacks), **(defaults | kinds | kwargs))

    def no_waits(self) -> AbstractContextManager[object]:
        """Return a context in which an operation that waits for the device is an error."""
        return _refusing_waits() if self.real else self._no_waits()

    @contextmanager
    def counting_waits(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns how often the device was waited for since its last call."""
        if not self.real:
            yield lambda: vgpu.counts(reset=True).waits
            return
        with warnings.catch_warnings(record=True) as told, _waits("warn"):
            warnings.simplefilter("always")

            def count() -> int:
                found = [one for one in told if "synchronizing CUDA" in str(one.message)]
                told.clear()
                return len(found)

            yield count

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Return the most bytes that ``work`` had on the device above what was there before."""
        gc.collect()
        if not self.real:
            return vgpu.peak_bytes(work)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@contextmanager
def _waits(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


_refusing_waits = partial(_waits, "error")


@pytest.fixture
def card(no_waits: type) -> Iterator[Card]:
    """The device; whatever a test sets of torch's precision and determinism is undone."""
    held = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    known = dict(os.environ)
    torch.manual_seed(0)
    yield Card(no_waits)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(held)
    os.environ.clear()
    os.environ.update(known)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and item.path.name != "test_dry_run.py":
            item.add_marker(pytest.mark.gpu)
            for start in TOLD:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{start}"))
            if LACKING:
                item.add_marker(pytest.mark.skip(LACKING))
