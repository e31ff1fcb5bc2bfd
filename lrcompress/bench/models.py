"""Models to benchmark: what each has to offer, and PyTorch modules."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Batch = Mapping[str, Tensor]


class BenchModel(ABC):
    """A model to benchmark: subclasses implement :meth:`call`.

    Attributes:
        name: what it is called in tables.
        mode: ``"eager"``, ``"compiled"`` or ``"onnx"``.
        parameters: how many it has; None if not known.
        stored_bytes: bytes that its weights take in a file.
    """

    name: str
    mode: str
    parameters: int | None
    stored_bytes: int

    @abstractmethod
    def call(self, batch: Batch) -> object:
        """Call the model once.

        Args:
            batch: keyword to tensor; the first tensor is ``(batch, length, …)``.

        Returns:
            What the model gives; it is not read.
        """

    def peak_bytes(self, batch: Batch) -> int | None:  # noqa: ARG002
        """Return the bytes it takes at most, parameters included; None if not known."""
        return None

    def flops(self, batch: Batch) -> int | None:  # noqa: ARG002
        """Return the floating-point operations of one call, 2 a multiply-add; None if not known."""
        return None


class TorchModel(BenchModel):
    """A PyTorch module to benchmark, in evaluation mode and without gradients.

    Args:
        name: of it in tables.
        model: is called with the batch as keywords; it is set to evaluation mode.
        stored_bytes: of its files; None counts the tensors of its state, tied ones once.
        compiled: run it through ``torch.compile``, for every shape anew.

    Example:
        >>> model = TorchModel("linear", nn.Linear(4, 3))
        >>> model.parameters, model.stored_bytes, model.flops({"input": torch.ones(2, 4)})
        (15, 60, 48)
    """

    def __init__(
        self, name: str, model: nn.Module, stored_bytes: int | None = None, compiled: bool = False
    ) -> None:
        self.name, self.model = name, model.eval()
        self.mode = "compiled" if compiled else "eager"
        self.parameters = sum(p.numel() for p in model.parameters())
        self.held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        stored = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}  # a tie only once
        self.stored_bytes = sum(stored.values()) if stored_bytes is None else stored_bytes
        self._run: Callable[..., object] = model
        if compiled:
            self._run = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def call(self, batch: Batch) -> object:
        return self._run(**batch)

    def peak_bytes(self, batch: Batch) -> int:
        """Return the bytes of parameters and buffers, and the most a call allocates besides.

        On CUDA they are those of torch's allocator, elsewhere those that the profiler sees. The
        model is called twice, the first time to warm up.
        """
        held = (*self.model.parameters(), *self.model.buffers())
        device = held[0].device if held else torch.device("cpu")
        self.call(batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.call(batch)
            return self.held + torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.call(batch)
        return self.held + _most_allocated(seen)

    def flops(self, batch: Batch) -> int:
        """Return the FLOPs that torch counts, with attention as plain matrix products."""
        # the counter does not know the fused attention of every device
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
            self.model(**batch)
        return int(seen.get_total_flops())


def _most_allocated(seen: profile) -> int:
    """Return the greatest sum of what was allocated and not yet freed, in bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    now = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
