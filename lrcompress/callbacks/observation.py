"""Statistics from some of the training steps before a point."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrcompress.engine import Settings
from lrcompress.errors import ObservationError, SettingError, nearest
from lrcompress.statistics.batches import batch_examples, batch_mask
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import LogitsTap, drawn_loss
from lrcompress.statistics.moments import KINDS, OUTPUT_KINDS, Statistics

_EVERY, _FEWEST = 10, 16  # steps


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which steps are observed, and whose gradients; every entry is checked when it is made.

    Attributes:
        kinds: the statistics to accumulate.
        every_n_steps: every n-th step before a point, counted back from it; None is every 10th,
            or more often where that would be fewer than 16 steps.
        max_tokens: enough is enough.
        fisher: ``"labels"`` or ``"model"``.
        logits: the submodule that returns the logits, for ``"model"``.
        mask: the batch's key of its padding mask.
        offload: the device the sums live on.
        owner: how the owner calls itself in error messages.

    Raises:
        SettingError: if an entry is not what it may be.
    """

    kinds: Sequence[str]
    every_n_steps: int | None
    max_tokens: int | None
    fisher: str
    logits: str | None
    mask: str | None
    offload: str | None
    owner: str

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise SettingError(
                    f"also_observe takes {', '.join(KINDS)}; got {kind!r}, "
                    f"nearest: {nearest(kind, KINDS, 1)}"
                )
        if self.fisher not in ("labels", "model"):
            raise SettingError(f"fisher must be 'labels' or 'model', got {self.fisher!r}")
        for name in ("every_n_steps", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} must be a whole number from 1, got {value!r}")


class Observation:
    """The statistics before one point after another.

    Args:
        sampling: which steps, and whose gradients.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.statistics = Statistics()
        self._recorder: Recorder | None = None
        self._tap: LogitsTap | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._step = ExitStack()
        self._examples = 1

    @property
    def watching(self) -> bool:
        """Whether a step is being observed now."""
        return self._recorder is not None and self._recorder.watching

    def watch(self, module: nn.Module, settings: Settings) -> int:
        """Get ready to observe the targeted layers; return the bytes it may take."""
        self._recorder = Recorder(
            module,
            settings.select(module).names,
            self.sampling.kinds,
            statistics=self.statistics,
            offload=self.sampling.offload,
            shared=settings.shared,
            name=self.sampling.owner,
        )
        if self.sampling.fisher == "model" and set(self.sampling.kinds) & set(OUTPUT_KINDS):
            self._tap = LogitsTap(module, self.sampling.logits)
        return self._recorder.nbytes

    def forget(self) -> None:
        """Start anew after a point: what was seen was of other weights."""
        self.statistics, self._recorder, self._tap = Statistics(), None, None

    def due(self, ahead: int, window: int) -> bool:
        """Return whether to observe a step that is ``ahead`` steps before the point."""
        every = self.sampling.every_n_steps or min(_EVERY, max(1, window // _FEWEST))
        sampled = ahead % min(every, window) == 0
        most = self.sampling.max_tokens
        full = most is not None and self.statistics.tokens >= most
        return bool(self.sampling.kinds) and 0 < ahead <= window and sampled and not full

    def open_step(self, batch: Any) -> None:
        """Observe the step that begins with this batch, until :meth:`close_step`."""
        assert self._recorder is not None
        mask, missing = batch_mask(batch, self.sampling.mask, self.sampling.owner)
        self._examples = batch_examples(batch)
        self._step.enter_context(self._recorder.step(mask, missing=missing))
        if self._tap is not None:
            self._step.enter_context(self._tap.listening())

    def before_backward(self, finite: bool, factor: float) -> None:
        """Add what the forward pass read, and let gradients count.

        Args:
            finite: whether the loss is.
            factor: what the mean loss is multiplied by before its backward pass.
        """
        assert self._recorder is not None
        self._recorder.commit(self._examples / factor, finite=finite)
        if self._tap is None:
            return
        if finite:  # in the loss scale's range, so that half-precision gradients do not vanish
            drawn = drawn_loss(self._tap.take(), self._generator) * factor
            outputs = self._recorder.outputs
            torch.autograd.grad(drawn, outputs, retain_graph=True, allow_unused=True)
        self._recorder.arm(False)

    def close_step(self) -> None:
        """Take off all hooks."""
        self._step.close()

    def check(self, point: object) -> None:
        """Refuse to go on from nothing.

        Raises:
            ObservationError: if no step was observed though statistics are needed.
        """
        if self.sampling.kinds and not self.statistics.steps:
            raise ObservationError(
                f"nothing was observed before point {point}: {self.statistics.skipped} steps "
                "were skipped as not finite; widen window= or lower every_n_steps="
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything in plain types and tensors."""
        state = {"statistics": self.statistics.state_dict()}
        return state | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on from what :meth:`state_dict` described."""
        where = self.sampling.offload or device
        self.statistics.load_state_dict(state["statistics"], where)
        self._generator.set_state(state["generator"].cpu())
