"""Shapes of Kronecker factors: as given, or the best for a budget of parameters."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

from lrcompress.engine.distributed_solve import Solver
from lrcompress.engine.settings import Settings
from lrcompress.errors import NoMatchError, SettingError, nearest
from lrcompress.nn import PrunedLinear
from lrcompress.objective import METHODS, Metric
from lrcompress.solvers.kronecker import (
    KroneckerSums,
    Sizes,
    check_divides,
    kronecker_sums,
    nearest_shape,
)
from lrcompress.statistics.views import view
from lrcompress.structure.surgery import check_kinds

Value = TypeVar("Value")


def by_layer(argument: str, given: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Return each layer's value from values by pattern; a later pattern overrides an earlier one.

    Raises:
        NoMatchError: if a pattern matches none of the layers.
    """
    found: dict[str, Value] = {}
    for pattern, value in given.items():
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise NoMatchError(
                f"{argument}: pattern {pattern!r} matches none of the {len(names)} targeted "
                f"layers; nearest names: {nearest(pattern, names)}"
            )
        found |= dict.fromkeys(hits, value)
    return found


def check_layers(model: nn.Module, names: Sequence[str], settings: Settings) -> None:
    """Check that the method can factor these layers, and that given shapes fit them.

    Raises:
        LayerError: if a layer is of a kind that the method cannot start from.
        ShapeError: if a given shape does not divide a layer's.
        NoMatchError: if a pattern matches none of the layers.
        SettingError: if nothing says how large the factors of a layer may be.
    """
    kronecker = METHODS[settings.method].form == "kronecker"
    if settings.narrow_blocks:  # blocks that are narrowed already may become narrower still
        names = [x for x in names if not isinstance(model.get_submodule(x), PrunedLinear)]
    check_kinds(model, names, dense=kronecker)
    if kronecker:
        KroneckerShapes(model, names, settings)


def solver_for(model: nn.Module, names: Sequence[str], settings: Settings) -> Solver | None:
    """Return the solver for Kronecker factors; None for low rank, which is the default."""
    return (
        KroneckerShapes(model, names, settings)
        if METHODS[settings.method].form == "kronecker"
        else None
    )


class KroneckerShapes:
    """Solver of layers by sums of Kronecker products, of a given shape or of the nearest.

    Args:
        model: whose layers they are.
        names: of the layers.
        settings: with ``shapes``, ``ranks`` (the numbers of terms), ``keeps`` and ``keep``.

    Raises:
        ShapeError: if a given shape does not divide a layer's.
        NoMatchError: if a pattern matches none of the layers.
        SettingError: if nothing says how large the factors of a layer may be.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], settings: Settings) -> None:
        self._sizes = {name: view(model.get_submodule(name)).shape for name in names}
        self._given = by_layer("shapes", settings.shapes, names)
        self._terms = by_layer("ranks", settings.ranks, names)
        keeps = by_layer("keeps", settings.keeps, names)
        self._keeps = {name: keeps.get(name, settings.keep) for name in names}
        for name, first in self._given.items():
            check_divides(first, self._sizes[name], f"shapes: layer {name!r}: ")  # type: ignore[arg-type]
            self._check_saves(name)
        self._found: dict[str, Sizes | None] = {}  # of layers that have been solved
        free = [n for n in names if n not in self._given and self._keeps[n] is None]
        if free:
            raise SettingError(
                f"ranks say how many terms layer {free[0]!r} gets, but not how large they are; "
                "give shapes= for it, or keep="
            )

    def _check_saves(self, name: str) -> None:
        """Check that the terms of a given shape, or one of them, fit the budget.

        Raises:
            SettingError: if they do not.
        """
        first, size, keep = self._given[name], self._sizes[name], self._keeps[name]
        whole, terms = size[0] * size[1], self._terms.get(name)
        most = whole - 1 if terms or keep is None else _budget(keep, whole)
        unit = term_parameters((first[0], first[1]), size)
        if unit * (terms or 1) > most:
            raise SettingError(
                f"shapes: layer {name!r}: a term of first factors {list(first)} takes {unit} "
                f"parameters, expected at most {most // (terms or 1)} for {terms or 1} of them in "
                f"place of {whole}; choose others"
            )

    def __call__(self, name: str, weight: Tensor, metric: Metric) -> KroneckerSums | None:
        """Return all sums of the layer's shape; None where no terms are smaller than the weight."""
        if name not in self._found:
            self._found[name] = self.first(name, weight, metric)
        first = self._found[name]
        return first and kronecker_sums(weight, first, metric.output, metric.input)

    def first(self, name: str, weight: Tensor, metric: Metric) -> Sizes | None:
        """Return the sizes of the first factors; None where no terms are smaller."""
        given = self._given.get(name)
        if given is not None:
            return given[0], given[1]
        keep = self._keeps[name]
        assert keep is not None, "it has been checked"
        budget = _budget(keep, weight.numel())
        return nearest_shape(weight, budget, metric.output, metric.input, self._terms.get(name))

    def previewed(self, model: nn.Module) -> dict[str, Sizes | None]:
        """Return shapes found without statistics, one for all layers of equal size and budget."""
        found: dict[object, Sizes | None] = {}
        shapes: dict[str, Sizes | None] = {}
        for name, size in self._sizes.items():
            key = (size, self._given.get(name) and name, self._keeps[name], self._terms.get(name))
            if key not in found:
                found[key] = self.first(name, view(model.get_submodule(name)).weight, Metric())
            shapes[name] = found[key]
        return shapes


def _budget(keep: float, whole: int) -> int:
    return int(keep * whole + 1e-6)


def term_parameters(first: Sizes | None, shape: Sizes) -> int:
    """Return the number of parameters of one Kronecker term; of the weight if ``first`` is None.

    Example:
        >>> term_parameters((2, 3), (4, 6)), term_parameters(None, (4, 6))
        (10, 24)
    """
    whole = shape[0] * shape[1]
    size = first[0] * first[1] if first else 0
    return size + whole // size if size else whole
