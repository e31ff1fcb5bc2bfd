"""Step timing: seconds per training step by phase, of the device's own work.

On an accelerator nothing waits for it. On a CPU it is the time that this process had, all threads
together: phases lie minutes apart, and what else runs on the machine must not decide between them.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class StepTimer:
    """Measures training steps, by events of the accelerator where there is one.

    There a step ends for the host long before the device has done it. Events lie between its
    kernels, and are read in later steps, once the device has passed them.

    Attributes:
        spent: phase to its steps and the seconds they took together.
        started: when it was made, in seconds of ``time.time``.
        first: optimizer steps before it, where a run was resumed.
        of_cpu: whether the seconds are a CPU's own.
    """

    def __init__(self, spent: Mapping[str, Sequence[float]] | None = None) -> None:
        self.started = time.time()
        self.spent = {phase: list(both) for phase, both in (spent or {}).items()}
        self._started: Any = None
        self.first = 0
        self.of_cpu = False
        self._passing: deque[tuple[str, Any, Any]] = deque()

    def start(self, device: torch.device | None) -> None:
        """Begin a step on a device; None leaves it out."""
        if device is not None:
            self.of_cpu = device.type == "cpu"
        self._started = None if device is None else self._event(device)

    def stop(self, phase: str) -> None:
        """End the step, which counts for a phase; nothing happens if none has begun."""
        if self._started is None:
            return
        if isinstance(self._started, float):
            self._add(phase, self._now() - self._started)
        else:
            self._passing.append((phase, self._started, self._event(self._started.device)))
            while self._passing and self._passing[0][2].query():
                self._read()
        self._started = None

    def seconds_per_step(self) -> dict[str, float]:
        """Return the seconds that a step of each phase took; waits for the steps before."""
        while self._passing:
            self._passing[0][2].synchronize()
            self._read()
        return {phase: seconds / steps for phase, (steps, seconds) in self.spent.items()}

    def _read(self) -> None:
        phase, start, end = self._passing.popleft()
        self._add(phase, start.elapsed_time(end) / 1000)

    def _add(self, phase: str, seconds: float) -> None:
        both = self.spent.setdefault(phase, [0, 0.0])
        both[0] += 1
        both[1] += seconds

    def _now(self) -> float:
        return time.process_time() if self.of_cpu else time.perf_counter()

    def _event(self, device: torch.device) -> Any:
        """Return an event that the device will pass now; the time, where it has none."""
        if device.type == "cpu":
            return self._now()
        try:
            event = torch.Event(device, enable_timing=True)
            event.record()
        except (RuntimeError, NotImplementedError):  # of a backend without timed events
            return self._now()
        return event
