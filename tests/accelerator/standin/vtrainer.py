"""A Lightning trainer on the stand-in device."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.amp import GradScaler
from vgpu import DEVICE


class StandIn(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        torch.vgpu.set_device(device)

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("vgpu", index) for index in range(devices)]

    @staticmethod
    def auto_device_count() -> int:
        return 2

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "vgpu"


AcceleratorRegistry.register("vgpu", StandIn)


def trainer(*callbacks: L.Callback, precision: str = "32-true", **kwargs: Any) -> L.Trainer:
    """Return a trainer on the first stand-in device, or where ``strategy`` says."""
    plugins: list[Any] = []
    if precision.endswith("-mixed"):
        scaler = GradScaler("vgpu", init_scale=2.0**10) if precision == "16-mixed" else None
        plugins = [MixedPrecision(precision, "vgpu", scaler)]
    defaults: dict[str, Any] = {
        "accelerator": StandIn(),
        "devices": 1,
        "strategy": SingleDeviceStrategy(device=DEVICE),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": 8,
        "plugins": plugins,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | kwargs))
