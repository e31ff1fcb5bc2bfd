"""Times of steps by phase; those of an accelerator are in tests/accelerator/test_costs.py."""

import time

import torch

from lrcompress.callbacks.step_timing import StepTimer

CPU = torch.device("cpu")


def work(seconds: float) -> None:
    """Take CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_steps_are_counted_for_their_phase() -> None:
    timer = StepTimer({"dense": [2, 1.0]})
    timer.stop("dense")  # none has begun
    for phase in ("factored", "factored", "dense"):
        timer.start(CPU)
        work(0.02)
        timer.stop(phase)
    timer.start(None)
    timer.stop("dense")
    assert [steps for steps, _ in timer.spent.values()] == [3, 2]
    found = timer.seconds_per_step()
    assert 0.34 <= found["dense"] < 0.4
    assert 0.02 <= found["factored"] < 0.1
    assert timer.of_cpu


def test_what_else_runs_on_the_machine_does_not_count() -> None:
    timer = StepTimer()
    timer.start(CPU)
    time.sleep(0.5)  # as if other processes had the CPU
    work(0.02)
    timer.stop("dense")
    assert 0.02 <= timer.seconds_per_step()["dense"] < 0.2


def test_a_device_without_timed_events_is_timed_by_the_clock() -> None:
    timer = StepTimer()
    timer.start(torch.device("meta"))
    timer.stop("dense")
    assert timer.spent["dense"][0] == 1
    assert not timer.of_cpu
