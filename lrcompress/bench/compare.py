"""Benchmark of two models side by side, by interleaved calls."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from lrcompress.bench.models import Batch, BenchModel, TorchModel
from lrcompress.bench.onnx import OnnxModel
from lrcompress.bench.record import LayerTime, Run, Speed, ideal_speedup
from lrcompress.bench.timing import interleaved, ratio, timed_layers
from lrcompress.errors import SettingError
from lrcompress.nn import FactoredLinear
from lrcompress.statistics.views import is_linear, view


def compare(
    subject: BenchModel, reference: BenchModel | None, batch: Batch, *, device: str, rounds: int
) -> Run:
    """Measure one model, or two by interleaved calls; of two PyTorch models their layers too.

    Each round calls every model once, so that other load on the machine falls on both alike.
    Speedups are medians over rounds of the ratio of the two times in the same round.

    Args:
        subject: the first model.
        reference: what it is compared with, of the same mode; None measures ``subject`` alone.
        batch: keyword to tensor, what both are called with, on their device; the first tensor is
            ``(batch, length)`` or has these as its leading sizes.
        device: name of the device, for the record.
        rounds: how often each is called, from 1.

    Returns:
        Times, memory, FLOPs and speedups; ``layers`` are those factored in ``subject`` and plain
        of the same shape and name in ``reference``.

    Raises:
        SettingError: if both have one name, ``rounds`` is less than 1, or an ONNX model reads an
            input that is not in ``batch``.

    Cost:
        ``rounds + 1`` calls of each model, as many again where layers are timed, and up to three
        for memory and FLOPs; of two ONNX models six more each.

    Example:
        >>> small, large = (TorchModel(f"{n} wide", nn.Linear(8, n)) for n in (8, 64))
        >>> run = compare(small, large, {"input": torch.ones(2, 8)}, device="cpu", rounds=3)
        >>> {name: speed.flops for name, speed in run.speeds.items()}
        {'8 wide': 256, '64 wide': 2048}
    """
    subjects = [one for one in (subject, reference) if one is not None]
    if len({one.name for one in subjects}) < len(subjects):
        raise SettingError(f"two models are called {subject.name!r}; give them two names")
    work: dict[str, Callable[[], object]] = {one.name: partial(one.call, batch) for one in subjects}
    layers: list[LayerTime] = []
    ideal = None
    if isinstance(subject, TorchModel) and isinstance(reference, TorchModel):
        taken, layers, ideal = _with_layers(subject, reference, work, batch, rounds)
    else:
        taken = interleaved(work, rounds)
    if isinstance(subject, OnnxModel) and isinstance(reference, OnnxModel):
        now, before = (one.products(batch) for one in (subject, reference))
        ideal = ideal_speedup(before.share, now.size / before.size)
    size, length = next(iter(batch.values())).shape[:2]
    speeds = {
        one.name: Speed(taken[one.name], size, one.peak_bytes(batch), one.flops(batch))
        for one in subjects
    }
    faster = None if reference is None else ratio(taken[reference.name], taken[subject.name])
    return Run(subject.mode, device, size, length, speeds, faster, ideal, layers)


def _with_layers(
    subject: TorchModel,
    reference: TorchModel,
    work: Mapping[str, Callable[[], object]],
    batch: Batch,
    rounds: int,
) -> tuple[dict[str, list[float]], list[LayerTime], float | None]:
    """Measure the models, and in the same rounds the layers that only ``subject`` has factored."""
    names = _factored_in_one(subject.model, reference.model)
    seen: dict[str, list[dict[str, float]]] = {subject.name: [], reference.name: []}

    def layers_of(one: TorchModel) -> None:
        with torch.no_grad(), timed_layers(one.model, names) as spent:
            one.model(**batch)
        seen[one.name].append(spent)

    every = dict(work)
    for one in (subject, reference) if names else ():
        every[f"layers of {one.name}"] = partial(layers_of, one)
    taken = interleaved(every, rounds)
    if not names:
        return taken, [], None
    whole = taken[reference.name]
    # the first call of all is not among the rounds
    factored, plain = seen[subject.name][1:], seen[reference.name][1:]
    layers = [
        _layer_time(name, subject.model, [row[name] for row in factored], plain, whole)
        for name in names
    ]
    share = ratio([sum(row.values()) for row in plain], whole)
    keep = sum(x.plain * x.keep for x in layers) / sum(x.plain for x in layers)
    return taken, layers, ideal_speedup(share, keep)


def _layer_time(
    name: str,
    model: nn.Module,
    factored: Sequence[float],
    rows: Sequence[Mapping[str, float]],
    whole: Sequence[float],
) -> LayerTime:
    layer, plain = model.get_submodule(name), [row[name] for row in rows]
    assert isinstance(layer, FactoredLinear)
    found = view(layer)
    return LayerTime(
        name,
        *found.shape,
        rank=layer.rank,
        keep=sum(p.numel() for p in found.parameters) / math.prod(found.shape),
        plain=statistics.median(plain),
        factored=statistics.median(factored),
        share=ratio(plain, whole),
        ratio=ratio(factored, plain),
    )


def _factored_in_one(model: nn.Module, reference: nn.Module) -> list[str]:
    """Return the layers that are factored in ``model`` and plain in ``reference``."""
    plain = {n: m for n, m in reference.named_modules() if not isinstance(m, FactoredLinear)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
        and name in plain
        and is_linear(plain[name])
        and view(plain[name]).shape == view(module).shape
    ]
