"""Models whose layers lie on several devices, as ``device_map`` loads them, without a trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcompress
from lrcompress.budget import kept_units
from lrcompress.callbacks import factor_checkpoint
from lrcompress.errors import PlatformError, SettingError
from lrcompress.objective import METHODS
from lrcompress.pruning.magnitude import largest


class Spread(nn.Module):
    """An embedding, two blocks and a head, on as many devices as are given, in turn."""

    def __init__(self, *devices: torch.device, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        places = [devices[i * len(devices) // 4] for i in range(4)]
        self.embed = nn.Embedding(20, width).to(places[0])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        for block, place in zip(self.blocks, places[1:3], strict=True):
            block.to(place)
        self.head = nn.Linear(width, 3).to(places[3])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["input_ids"].to(self.embed.weight.device))
        for block in self.blocks:
            x = x.to(block[0].bias.device)
            x = x + block(x)
        x = x.to(self.head.weight.device)
        mask = batch["attention_mask"].unsqueeze(-1).to(x.device)
        return self.head((x * mask).sum(1) / mask.sum(1))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(batch)
    return nn.functional.cross_entropy(found, batch["labels"].to(found.device))


def batches(device: SimpleNamespace, where: torch.device) -> list[dict[str, Tensor]]:
    return [{k: v.to(where) for k, v in batch.items()} for batch in device.sentences(4)]


@pytest.mark.parametrize(
    ("method", "keep_measured"), [*((method, False) for method in METHODS), ("kfac", True)]
)
def test_a_model_on_two_devices_is_compressed_as_on_one(
    device: SimpleNamespace, method: str, keep_measured: bool
) -> None:
    found = []
    for places in ([device.DEVICE, device.OTHER], [torch.device("cpu")]):
        model = Spread(*places)
        before = {name: p.device for name, p in model.named_parameters()}
        given = batches(device, places[0])
        record = lrcompress.compress(
            model, given, loss, method=method, keep=0.5, keep_measured=keep_measured
        )
        for name, layer in model.named_modules():
            if layer._parameters and name.count("."):
                home = before[".".join(name.split(".")[:3]) + ".bias"]
                assert {p.device for p in layer.parameters()} == {home}
        assert bool(loss(model, given[0]).isfinite())
        found.append([(layer.name, layer.rank, layer.error) for layer in record.layers])
    if not keep_measured:
        for one, other in zip(*found, strict=True):
            assert one[:2] == other[:2]
            assert one[2] == pytest.approx(other[2], rel=1e-4)


def test_statistics_lie_beside_their_layers(device: SimpleNamespace) -> None:
    model = Spread(device.DEVICE, device.OTHER)
    kinds = lrcompress.objective.METHODS["row_fisher"].kinds
    with lrcompress.observe(model, kinds=kinds) as recorder:
        for batch in batches(device, device.OTHER):
            with recorder.step(batch["attention_mask"]):
                loss(model, batch).backward()
    for name in ("blocks.0.0", "blocks.1.0"):
        home = model.get_submodule(name).weight.device
        for held in (recorder.statistics.inputs, recorder.statistics.outputs):
            for value in held[name].values.values() if name in held else ():
                assert value.device == home


def test_units_of_layers_on_several_devices_are_compared(device: SimpleNamespace) -> None:
    one, other = torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0, 0.5])
    spread = {"a": one.to(device.DEVICE), "b": other.to(device.OTHER)}
    for price in (2, 3):  # alike, and not
        prices = {"a": 2, "b": price}
        wanted = kept_units({"a": one, "b": other}, prices, 6)
        for name, kept in kept_units(spread, prices, 6).items():
            assert kept.device == spread[name].device
            assert kept.tolist() == wanted[name].tolist()
    entries = dict(largest({"a": one, "b": other}, 0.6, "global"))
    for name, kept in largest(spread, 0.6, "global"):
        assert kept.device == spread[name].device
        assert kept.tolist() == entries[name].tolist()


class Solving(TorchDispatchMode):
    """Notes on which devices matrices are decomposed inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind in function._schema.name for kind in ("eigh", "cholesky", "svd", "_qr")):
            self.devices.add(args[0].device.type)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_solved_on_the_device_that_is_named(
    device: SimpleNamespace, method: str
) -> None:
    found = []
    for where in (None, "cpu"):
        model = Spread(device.DEVICE, device.OTHER)
        given = batches(device, device.DEVICE)
        with Solving() as solving:
            lrcompress.compress(model, given, loss, method=method, keep=0.5, solve_device=where)
        assert solving.devices == {where or "vgpu"}
        assert {p.device for p in model.parameters()} == {device.DEVICE, device.OTHER}
        found.append(loss(model, given[0]).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.parametrize("name", ["kfac", "losparse auto"])
def test_a_point_solves_on_the_device_that_is_named(
    device: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    watched = device.callbacks(name, solve_device="cpu")
    model = device.tagger(name, tmp_path)
    with Solving() as solving:
        run = device.trainer(*watched, default_root_dir=tmp_path)
        run.fit(model, device.Loader(device.sentences(10)))
    assert solving.devices == {"cpu"}
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("method", ["kfac", "row_fisher"])
def test_statistics_of_a_compression_lie_where_they_are_wanted(
    device: SimpleNamespace, method: str
) -> None:
    found, taken = [], []
    given = batches(device, device.DEVICE)
    for where in (None, "cpu"):
        model = Spread(device.DEVICE, device.OTHER, width=128)

        def work(model: nn.Module = model, where: str | None = where) -> None:
            options = {"method": method, "keep": 0.5, "solve_device": "cpu"}
            lrcompress.compress(model, given, loss, offload=where, **options)

        taken.append(device.peak_bytes(work))
        found.append(loss(model, given[0]).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert taken[1] < taken[0]


def test_what_is_no_device_is_refused() -> None:
    given = {"keep": 0.5, "targets": ["*"]}
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SettingError, match="offload must be a device of torch"):
        lrcompress.compress(model, [], loss, offload="gpu", **given)
    with pytest.raises(PlatformError, match="offload='xpu:7': torch finds no such device"):
        lrcompress.compress(model, [], loss, offload="xpu:7", **given)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_factored_between_two_fits_on_the_device(
    device: SimpleNamespace, tmp_path: Path, dtype: torch.dtype
) -> None:
    seen: list[tuple[torch.device, torch.dtype]] = []

    class Seen(device.Tagger):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any) -> Tensor:
            seen.extend((p.device, p.dtype) for p in self.parameters())
            return super().training_step(*args)

    torch.manual_seed(0)
    state = Seen().to(dtype).state_dict()
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, tmp_path / "dense.ckpt")
    reports, states = [], []
    for where in ("vgpu:1", "cpu"):
        callback = lrcompress.Factorize(0.5, verbose=False, validate=False, report_path=None)
        loader = device.Loader(device.sentences(4))
        out = tmp_path / f"{where}.ckpt"
        given = (tmp_path / "dense.ckpt", out, Seen(), loader, callback)
        reports.append(factor_checkpoint(*given, batches=4, device=where))
        assert {*seen} == {(torch.device(where), dtype)}
        seen.clear()
        states.append(torch.load(out, weights_only=True)["state_dict"])
        assert {(x.device.type, x.dtype) for x in states[-1].values()} == {("cpu", dtype)}
    there, here = reports
    assert [x.rank for x in there.points[0].layers] == [x.rank for x in here.points[0].layers]
    torch.testing.assert_close(*states)


def test_a_checkpoint_is_not_factored_on_what_is_not_there(
    device: SimpleNamespace, tmp_path: Path
) -> None:
    given = (tmp_path / "a", tmp_path / "b", device.Tagger(), None, lrcompress.Factorize(keep=0.5))
    with pytest.raises(PlatformError, match="device='xpu:7': torch finds no such device"):
        factor_checkpoint(*given, device="xpu:7")
