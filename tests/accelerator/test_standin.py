"""The stand-in device itself: what a GPU refuses, counts and keeps, it does too."""

import threading
from types import SimpleNamespace

import pytest
import torch


def test_tensors_of_other_devices_are_refused(device: SimpleNamespace) -> None:
    here, there = (torch.ones(3, device=x) for x in (device.DEVICE, device.OTHER))
    for other in (there, torch.ones(3)):
        with pytest.raises(RuntimeError, match=r"vgpu:0|beside vgpu"):
            here + other
        with pytest.raises(RuntimeError, match="MIXED DEVICES"):
            torch.cat([here, other])
    assert (here + torch.ones(())).tolist() == [2, 2, 2]


def test_backward_passes_run_in_other_threads(device: SimpleNamespace) -> None:
    seen = []
    x = torch.ones(3, device=device.DEVICE, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(threading.get_ident()))
    y.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert seen != [threading.get_ident()]


def test_counts_bytes_and_waits(device: SimpleNamespace) -> None:
    before = device.counts(reset=True)
    x = torch.zeros(1000, device=device.DEVICE)
    del x
    x = torch.zeros(10, device=device.DEVICE)
    y = x + 1
    assert device.counts().waits == 0
    x.sum().item(), y.cpu(), x[y > 0], y.nonzero(), torch.accelerator.synchronize()
    x[y > 0] = 0.0
    y.to(device.DEVICE), torch.ones(3).to(device.DEVICE)
    after = device.counts()
    assert (after.waits, after.uploads) == (5, 1)
    assert after.peak - before.now == 4000
    assert after.now - before.now == 80


def test_every_device_has_a_random_state_of_its_own(device: SimpleNamespace) -> None:
    def drawn(where: torch.device | str) -> list[float]:
        return torch.rand(3, device=where).tolist()

    torch.manual_seed(1)
    first = [drawn(where) for where in ("cpu", device.DEVICE, device.OTHER)]
    torch.manual_seed(1)
    assert drawn(device.OTHER) == first[2]
    assert drawn("cpu") == first[0]
    state = torch.vgpu.get_rng_state()
    one = torch.nn.functional.dropout(torch.ones(50, device=device.DEVICE))
    torch.vgpu.set_rng_state(state)
    assert torch.equal(one, torch.nn.functional.dropout(torch.ones(50, device=device.DEVICE)))
    assert drawn("cpu") == torch.rand(6, generator=torch.Generator().manual_seed(1))[3:].tolist()
