"""Settings of a compression, validated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lrcompress.budget import ALLOCATIONS, check_keep
from lrcompress.errors import PlatformError, SettingError, nearest_hint, share_hint
from lrcompress.objective import COMPARABLE, METHODS, method_named
from lrcompress.solvers.kronecker import are_sizes
from lrcompress.structure.selection import Selection, select

STORAGES = ("balanced", "pivoted")
LOW_RANK = "low_rank"  # of narrow_blocks


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which layers are factored, by which method, to which ranks; validated when made.

    Attributes:
        method: a key of :data:`lrcompress.objective.METHODS`.
        keep: parameters that remain / parameters before, over the targeted layers.
        targets: patterns of layer names; None is every linear layer of a numbered block.
        exclude: patterns of layers to leave out.
        allocation: ``"uniform"``, or ``"global"`` for methods that predict the loss; None
            takes global where it can be had.
        ranks: ranks of their own for layers matching a pattern; of ``kronecker``, terms.
        shapes: with ``kronecker``, sizes ``(rows, columns)`` of the first factors for layers
            matching a pattern; for others the divisors that lose least.
        keeps: shares of their own for layers matching a pattern.
        keep_range: least and greatest keep any one layer may get; 1 allows it to stay dense.
        align: what ranks are multiples of, as far as no budget is lost by it.
        narrow_blocks: let feed-forward blocks keep some of their inner features in place of ranks,
            where that is predicted to lose less; with :data:`LOW_RANK` what is left of their
            layers may have low rank besides.
        storage: what low-rank layers are stored as, a key of :data:`STORAGES`: ``"balanced"``
            factors of ``rank·(out + in)`` parameters, or ``"pivoted"`` rows of
            ``rank·(out + in − rank)``, by which ranks are higher at the same ``keep``.
        refit_bias: let the bias take up the mean error, where the input moment is known.
        refit: once layers are compressed, solve their left factors anew for the inputs that the
            compressed layers before them give: this share of the target comes from the dense
            model's inputs, the rest from their own; None leaves factors as they were chosen.
        shrink: shares of their mean diagonal mixed into the input and the output metric.
        shared: also factor layers used in several places, and untie tied weights.
        keep_measured: leave layers as they are whose factors are not faster on this machine.
        measured_tokens: that layers read at once while they are measured; None is what they
            have read, on average, in an observed step.
        solve_device: where layers are solved; None is where each lies.
        latency: greatest time of a pass of the whole model / that before, without gradients. Beside
            ``keep`` both hold; alone it takes its place. Layers stay as they are, with a warning,
            where even their least sizes take longer.
        latency_shape: examples and length of the batch it is measured on; None is those of the
            batch that is given.

    Raises:
        SettingError: if an entry is not what it may be.
    """

    method: str = "kfac"
    keep: float | None = None
    targets: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    allocation: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    keeps: Mapping[str, float] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    keep_range: tuple[float, float] = (0.0, 1.0)
    align: int = 8
    narrow_blocks: bool | str = False
    storage: str = "balanced"
    refit_bias: bool = True
    refit: float | None = None
    shrink: tuple[float, float] = (0.0, 0.1)
    shared: bool = False
    keep_measured: bool = False
    measured_tokens: int | None = None
    solve_device: str | None = None
    latency: float | None = None
    latency_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        method = method_named(self.method)
        if self.keep is not None:
            check_keep(self.keep)
        for pattern, keep in self.keeps.items():
            check_keep(keep, f"keeps[{pattern!r}]")
        for pattern, rank in self.ranks.items():
            _check_whole(f"ranks[{pattern!r}]", rank)
        if self.allocation not in (None, *ALLOCATIONS):
            raise SettingError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}"
                f"{nearest_hint(self.allocation, ALLOCATIONS)}"
            )
        if self.allocation == "global" and not method.comparable:
            raise SettingError(
                f"allocation='global' compares predicted losses of ranks, which method "
                f"{self.method!r} does not know; use allocation='uniform', or one of "
                f"{', '.join(COMPARABLE)}"
            )
        _check_shares("keep_range", self.keep_range)
        _check_shares("shrink", self.shrink)
        if self.keep_range[0] > self.keep_range[1]:
            raise SettingError(f"keep_range must rise, got {self.keep_range!r}")
        _check_whole("align", self.align)
        check_device("solve_device", self.solve_device)
        self._check_measured()
        self._check_latency()
        self._check_form(method.form)
        self._check_refit(method.form)
        if self.narrow_blocks:
            self._check_narrow()

    def of_method(self, method: str) -> "Settings":
        """Return the same of another method, which allocates ranks as it does by default.

        Feed-forward blocks are narrowed by methods alone that know the predicted loss.
        """
        if method == self.method:
            return self
        narrow = self.narrow_blocks and method_named(method).comparable
        return replace(self, method=method, allocation=None, narrow_blocks=narrow)

    def _check_narrow(self) -> None:
        if self.narrow_blocks not in (True, LOW_RANK):
            raise SettingError(
                f"narrow_blocks must be True, False or {LOW_RANK!r}, got {self.narrow_blocks!r}"
                f"{nearest_hint(self.narrow_blocks, [LOW_RANK])}"
            )
        reason = ""
        if not METHODS[self.method].comparable:
            reason = f"method {self.method!r} does not know; use {' or '.join(COMPARABLE)}"
        elif self.allocation == "uniform":
            reason = "allocation='uniform' does not look at; use allocation='global'"
        if reason:
            raise SettingError(
                f"narrow_blocks compares predicted losses of ranks and of widths, which {reason}"
            )
        if self.keep_measured:
            raise SettingError(
                "keep_measured measures low-rank factors only, and narrow_blocks makes narrower "
                "layers too; leave one of them out"
            )

    def _check_form(self, form: str) -> None:
        if not isinstance(self.shapes, Mapping):
            raise SettingError(
                "shapes are two sizes by pattern of layers, such as {'*.query': [192, 384]}, got "
                f"{self.shapes!r}"
            )
        if self.shapes and form != "kronecker":
            raise SettingError(
                f"shapes are those of Kronecker factors, which method {self.method!r} does not "
                "have; use method='kronecker'"
            )
        for pattern, first in self.shapes.items():
            if not are_sizes(first):
                raise SettingError(
                    f"shapes[{pattern!r}] must be two whole sizes from 1, got {first!r}"
                )
        if self.storage not in STORAGES:
            raise SettingError(
                f"storage must be one of {', '.join(STORAGES)}, got {self.storage!r}"
                f"{nearest_hint(self.storage, STORAGES)}"
            )
        if self.storage == "pivoted" and form != "low_rank":
            raise SettingError(
                f"storage='pivoted' stores rows of low-rank layers, which method {self.method!r} "
                "does not make; leave it out"
            )
        if self.keep_measured and form != "low_rank":
            raise SettingError(
                f"keep_measured measures low-rank factors, which method {self.method!r} does not "
                "have; leave it out"
            )

    def _check_refit(self, form: str) -> None:
        share = self.refit
        if share is None:
            return
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share <= 1:
            raise SettingError(f"refit must be a share from 0 to 1, such as 0.5, got {share!r}")
        if form != "low_rank":
            raise SettingError(
                f"refit solves left factors anew, which method {self.method!r} does not make; "
                "leave it out"
            )

    def _check_measured(self) -> None:
        if self.measured_tokens is not None:
            _check_whole("measured_tokens", self.measured_tokens)
        elif self.keep_measured and not METHODS[self.method].kinds:
            raise SettingError(
                f"keep_measured: method {self.method!r} observes no steps that would tell at how "
                "many tokens; give measured_tokens="
            )

    def _check_latency(self) -> None:
        share, shape = self.latency, self.latency_shape
        if share is None:
            if shape is not None:
                raise SettingError(
                    "latency_shape is the shape of the batch that latency is measured on; give "
                    "latency=, or leave latency_shape out"
                )
            return
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 < share < 1:
            raise SettingError(
                "latency must be above 0 and below 1 (time of the model / its time before), such "
                f"as 0.5, got {share!r}{share_hint(share)}"
            )
        if shape is not None and not are_sizes(shape):
            raise SettingError(
                "latency_shape must be two whole numbers from 1, examples and length, such as "
                f"(1, 128), got {shape!r}"
            )
        reason = ""
        if METHODS[self.method].form != "low_rank":
            reason = f"method {self.method!r} would solve anew for each"
        elif self.keep_measured:
            reason = "leaves layers alone that are not made faster, as keep_measured does"
        if reason:
            raise SettingError(
                f"latency tries sizes by their time, and {reason}; leave one of them out"
            )

    @property
    def spread(self) -> str:
        """The allocation in use: the one requested, else the method's default."""
        default = "global" if METHODS[self.method].comparable else "uniform"
        return self.allocation or default

    def select(self, model: nn.Module) -> Selection:
        """Return the layers of ``model`` that are targeted."""
        return select(model, self.targets, self.exclude, shared=self.shared)

    def watched(self, model: nn.Module) -> tuple[str, ...]:
        """Return the layers of ``model`` that are observed."""
        return self.select(model).names


def check_device(argument: str, name: object) -> None:
    """Check that an argument names a device of torch, or none.

    Raises:
        SettingError: if it does not.
    """
    try:
        torch.device("cpu" if name is None else name)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise SettingError(
            f"{argument} must be a device of torch, such as 'cpu', got {name!r}"
        ) from None


def check_present(argument: str, name: str | None) -> None:
    """Check that this machine has the device that an argument names.

    Raises:
        PlatformError: if it does not.
    """
    try:
        torch.empty(0, device=name or "cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of a build without it
        reason = str(error).partition("\n")[0]
        raise PlatformError(
            f"{argument}={name!r}: torch finds no such device here ({reason}); leave it out, or "
            "name one that is there, such as 'cpu'"
        ) from None


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{name} must be a whole number from 1, got {value!r}")


def _check_shares(name: str, shares: object) -> None:
    pair = shares if isinstance(shares, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in pair):
        raise SettingError(f"{name} must be two shares from 0 to 1, got {shares!r}")
