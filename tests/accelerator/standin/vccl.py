"""Collectives on the stand-in device by the rules of NCCL, with gloo underneath."""

import os
import sys
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # torch 2.15 cannot record a group of one's own
REFUSED = {torch.int16, torch.complex64, torch.complex128, torch.uint16, torch.uint32}


class Group(dist.ProcessGroup):
    """What Lightning, DDP and this package may ask of NCCL; anything else is refused by torch."""

    supports_splitting = False
    _device_types: ClassVar = [torch.device("vgpu")]  # where objects are laid out

    def __init__(self, store: dist.Store, index: int, size: int) -> None:
        super().__init__(index, size)
        self.gloo = dist.ProcessGroupGloo(store, index, size)

    def getBackendName(self) -> str:  # noqa: N802
        return "vccl"

    def _get_backend(self, _: torch.device) -> Any:
        return self

    def _run(self, name: str, tensors: list[Tensor], *options: Any) -> dist.Work:
        for tensor in tensors:
            what = f"{name} of {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            assert tensor.device.type == "vgpu", f"NCCL takes tensors of its device: {what}"
            assert tensor.device.index == torch.vgpu.current_device(), f"another's device: {what}"
            assert tensor.is_contiguous(), f"NCCL takes contiguous tensors: {what}"
            assert tensor.dtype not in REFUSED, f"NCCL has no such numbers: {what}"
        there = [tensor.detach().cpu() for tensor in tensors]
        try:
            getattr(self.gloo, name)(there, *options).wait()
        except RuntimeError as error:  # NCCL's watchdog finds it later, and ends the process
            sys.stderr.write(f"vccl: watchdog: {error}\n")
            sys.stderr.flush()
            os.abort()
        for tensor, value in zip(tensors, there, strict=True):
            tensor.detach().copy_(value)
        return _Done(tensors)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        options = options or dist.AllreduceOptions()
        assert len(tensors) == 1, "NCCL takes one tensor a process"
        return self._run("allreduce", tensors, options)

    def broadcast(self, tensors: list[Tensor], options: Any) -> dist.Work:
        assert len(tensors) == 1, "NCCL takes one tensor a process"
        return self._run("broadcast", tensors, options)

    def allgather(self, out: list[list[Tensor]], given: list[Tensor], _: Any = None) -> dist.Work:
        (outs,), (one,) = out, given
        for source, place in enumerate(outs):
            if source == self.rank():
                place.copy_(one)
            options = dist.BroadcastOptions()
            options.rootRank = source
            self._run("broadcast", [place], options)
        return _Done(outs)

    def barrier(self, opts: Any = None) -> dist.Work:
        self.gloo.barrier().wait()
        return _Done([])


class _Done(dist._Work):
    """Work that is done as soon as it is asked for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


def _group(store: dist.Store, index: int, size: int, _: Any) -> Group:
    return Group(store, index, size)


dist.Backend.register_backend("vccl", _group, devices=["vgpu"])
