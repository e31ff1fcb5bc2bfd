"""Results of a benchmark, as data."""

import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Speed:
    """Latency, memory and FLOPs of one model at one batch × length.

    Attributes:
        seconds: of every round, one call each.
        batch: examples in each call.
        peak_bytes: bytes of parameters and buffers, and the most that one call holds besides;
            None if not known.
        flops: floating-point operations of one call, 2 a multiply-add; None if not known.

    Example:
        >>> speed = Speed([0.5, 0.25, 0.5], batch=32, peak_bytes=None, flops=None)
        >>> speed.median, speed.throughput
        (0.5, 64.0)
    """

    seconds: list[float]
    batch: int
    peak_bytes: int | None
    flops: int | None

    @property
    def median(self) -> float:
        """Seconds of a call, the median over rounds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the calls stayed below.

        Example:
            >>> Speed([1.0, 2.0, 3.0], 1, None, None).p95
            2.9
        """
        if len(self.seconds) == 1:
            return self.seconds[0]
        return round(statistics.quantiles(self.seconds, n=20, method="inclusive")[-1], 12)

    @property
    def throughput(self) -> float:
        """Examples a second, at the median."""
        return self.batch / self.median

    def figures(self) -> dict[str, object]:
        """Return median, p95, throughput, ``peak_bytes`` and ``flops`` in plain types."""
        known = {"median": self.median, "p95": self.p95, "throughput": self.throughput}
        return known | {"peak_bytes": self.peak_bytes, "flops": self.flops}


@dataclass(frozen=True)
class LayerTime:
    """Latency of one factored layer, beside that of the plain layer in the reference.

    Attributes:
        name: its path in the model.
        out_features: rows of its weight.
        in_features: columns of its weight.
        rank: of its factors.
        keep: parameters of what stands there / of the plain weight.
        plain: median seconds of the plain layer.
        factored: median seconds of the factored one.
        share: of the plain model's time that the plain layer takes, a median over rounds.
        ratio: factored / plain, a median over rounds.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    keep: float
    plain: float
    factored: float
    share: float
    ratio: float


@dataclass(frozen=True)
class Run:
    """Benchmark of two models, or of one alone, at one batch × length.

    Attributes:
        mode: ``"eager"``, ``"compiled"`` or ``"onnx"``.
        device: they ran on.
        batch: examples in each call.
        length: tokens of each example.
        speeds: model name to what was measured; where there are two, the second is the
            reference.
        faster: time of the reference / of the first, a median over rounds; None of one alone.
        ideal: what ``faster`` would be if each factored layer took the share of the plain one's
            time that it keeps of its parameters, and all else as long as before:
            ``T / (T − Σ_l t_l (1 − keep_l))`` with ``T`` the reference's time and ``t_l`` that of
            its layers, always measured eagerly; of onnxruntime, ``t`` and ``keep`` are those of
            all products with weights together. None where no layer of the first stands for one
            of the reference, or where compiled the whole takes less than its layers alone.
        layers: of two PyTorch models, those factored in the first and plain in the reference.

    Example:
        >>> Run("eager", "cpu", 1, 128, {}, faster=1.5, ideal=2.0).share_of_ideal
        0.75
    """

    mode: str
    device: str
    batch: int
    length: int
    speeds: dict[str, Speed]
    faster: float | None = None
    ideal: float | None = None
    layers: list[LayerTime] = field(default_factory=list)

    @property
    def share_of_ideal(self) -> float | None:
        """Ideal time / measured time of the first model, that is ``faster / ideal``.

        Above 1 where the rest of the model is faster too, from caches it now has to itself.
        """
        return None if self.ideal is None or self.faster is None else self.faster / self.ideal

    @property
    def slower(self) -> list[LayerTime]:
        """The layers whose factors are slower than the plain layer."""
        return [layer for layer in self.layers if layer.ratio > 1]

    def to_dict(self) -> dict[str, object]:
        """Return the run in plain types; of ``seconds`` the median and the 95th percentile."""
        return {
            **{name: getattr(self, name) for name in ("mode", "device", "batch", "length")},
            "speeds": {name: speed.figures() for name, speed in self.speeds.items()},
            **{name: getattr(self, name) for name in ("faster", "ideal", "share_of_ideal")},
            "layers": [vars(layer).copy() for layer in self.layers],
        }


def ideal_speedup(share: float, keep: float) -> float | None:
    """Return Amdahl's bound ``1 / (1 − share (1 − keep))``; None where ``share`` is all or more.

    Args:
        share: of the whole time, of what becomes faster.
        keep: the time that remains of it / its time before.

    Example:
        >>> ideal_speedup(0.75, 1 / 3)
        2.0
    """
    return 1 / (1 - share * (1 - keep)) if share < 1 else None
