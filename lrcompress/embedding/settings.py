"""Settings of embedding factorization: which tables, who shares them, and their rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn

from lrcompress.budget import check_keep
from lrcompress.errors import LayerError, NoMatchError, SettingError, nearest
from lrcompress.nn import FactoredEmbedding, KroneckerEmbedding, LowRankEmbedding, SafeEmbedding
from lrcompress.nn.kronecker_embedding import check_divides
from lrcompress.nn.low_rank_embedding import obstacle
from lrcompress.statistics.views import is_embedding, is_linear, view
from lrcompress.structure.selection import Selection

METHODS: Mapping[str, type[FactoredEmbedding]] = {
    "low_rank": LowRankEmbedding,
    "kronecker": KroneckerEmbedding,
    "safe": SafeEmbedding,
}
WEIGHTINGS: Mapping[str, tuple[str, ...]] = {
    "frequency": ("token_count",),
    "fisher": ("token_count", "token_fisher"),
    "none": (),
}
HEADS = ("tied", "untied")
_ALIGN = 8  # ranks are multiples of it, where that costs at most a tenth of them


@dataclass(frozen=True)
class EmbeddingTable:
    """An embedding table and all layers that share it.

    Attributes:
        name: of the first embedding that holds it.
        others: further embeddings that hold it.
        heads: linear layers that hold it, as output heads do.
        shape: ``(vocabulary, width)``.
        padding: the row that is read for padding, or None.
    """

    name: str
    others: tuple[str, ...]
    heads: tuple[str, ...]
    shape: tuple[int, int]
    padding: int | None

    @property
    def embeddings(self) -> tuple[str, ...]:
        """All embeddings that hold it."""
        return (self.name, *self.others)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """Settings of embedding factorization; every entry is checked when it is made.

    Attributes:
        method: a key of :data:`METHODS`.
        keep: parameters that remain of a table / before; None where ``rank`` is given.
        rank: width of the narrow table; None where ``keep`` is given.
        targets: patterns of embeddings; None is the model's token embedding.
        exclude: patterns of embeddings to leave out.
        weighting: a key of :data:`WEIGHTINGS`.
        heads: ``"tied"`` heads get the same factors, ``"untied"`` ones keep the table itself.
        head_share: of tied heads in the metric of the columns, from 0 to 1.
        floor: share of the mean weight that every row counts besides its own.

    Raises:
        SettingError: if an entry is not what it may be.
    """

    shared: ClassVar[bool] = True
    method: str = "low_rank"
    keep: float | None = None
    rank: int | None = None
    targets: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    weighting: str = "frequency"
    heads: str = "tied"
    head_share: float = 0.5
    floor: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("weighting", WEIGHTINGS), ("heads", HEADS)):
            value = getattr(self, name)
            if value not in known:
                raise SettingError(
                    f"{name} must be one of {', '.join(known)}; got {value!r}, "
                    f"nearest: {nearest(str(value), known, 1)}"
                )
        if (self.keep is None) == (self.rank is None):
            raise SettingError(
                "give keep, the share of a table's parameters that remains, or rank, the width of "
                f"the narrow table; got keep={self.keep!r} and rank={self.rank!r}"
            )
        if self.keep is not None:
            check_keep(self.keep)
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise SettingError(f"rank must be a whole number from 1, got {self.rank!r}")
        for name in ("head_share", "floor"):
            share = getattr(self, name)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise SettingError(f"{name} must be a share from 0 to 1, got {share!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of statistics to observe."""
        joint = self.method == "low_rank" and self.heads == "tied" and self.head_share > 0
        return WEIGHTINGS[self.weighting] + (("input_moment",) if joint else ())

    def select(self, model: nn.Module) -> Selection:
        """Return the names of the embeddings of ``model`` that are targeted."""
        return Selection(tuple(name for one in self.tables(model) for name in one.embeddings))

    def watched(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the layers of ``model`` to observe: embeddings and tied heads."""
        joint = "input_moment" in self.kinds
        tables = self.tables(model)
        return tuple(n for x in tables for n in (*x.embeddings, *(x.heads if joint else ())))

    def tables(self, model: nn.Module) -> list[EmbeddingTable]:
        """Return the tables of ``model`` that are targeted.

        Raises:
            NoMatchError: if a pattern matches no embedding, or there is no token embedding.
            LayerError: if one is of a type that cannot be factored, or its head cannot follow.
        """
        found = _tables_in(model)
        chosen = _chosen(model, found, self.targets, self.exclude)
        for table in chosen:
            for name in table.embeddings:
                reason = obstacle(model.get_submodule(name))
                if reason is not None:
                    raise LayerError(
                        f"embedding {name!r} is a {type(model.get_submodule(name)).__name__}, "
                        f"which cannot be factored: {reason}; leave it out with exclude="
                    )
            if table.heads and self.heads == "tied" and self.method != "low_rank":
                raise LayerError(
                    f"the output head {table.heads[0]!r} is tied to {table.name!r} and cannot have "
                    f"its {self.method} form; pass heads='untied', with which it keeps "
                    f"{math.prod(table.shape):,} parameters of its own, or method='low_rank'"
                )
        if self.method == "safe":
            _check_not_generating(model)
        return chosen

    def rank_of(self, table: EmbeddingTable) -> int:
        """Return the rank to which a table is factored.

        Raises:
            SettingError: if no rank makes it as small as it should be.
            ShapeError: if a given rank does not divide the width of Kronecker rows.
        """
        vocabulary, width = table.shape
        kind, dense = METHODS[self.method], vocabulary * width
        possible = [
            r
            for r in range(1, min(table.shape) + 1)
            if self.method != "kronecker" or width % r == 0
        ]
        if self.rank is not None:
            if self.method == "kronecker":
                check_divides(width, self.rank)
            if self.rank not in possible or parameters_of(kind, table.shape, self.rank) >= dense:
                small = [r for r in possible if parameters_of(kind, table.shape, r) < dense]
                raise SettingError(
                    f"rank {self.rank} does not make table {table.name!r} of shape {table.shape} "
                    f"smaller; from 1 to {max(small, default=0)} it would"
                )
            return self.rank
        assert self.keep is not None
        most = min(self.keep * dense, dense - 1)
        small = [r for r in possible if parameters_of(kind, table.shape, r) <= most]
        if not small:
            least = parameters_of(kind, table.shape, 1) / dense
            raise SettingError(
                f"keep={self.keep:g} is not possible for table {table.name!r} of shape "
                f"{table.shape} with method={self.method!r}: a rank of 1 takes {least:.3f}"
            )
        rank = small[-1]
        aligned = rank - rank % _ALIGN
        return aligned if aligned in small and aligned >= 0.9 * rank else rank


def parameters_of(kind: type[FactoredEmbedding], shape: tuple[int, int], rank: int) -> int:
    """Return the number of parameters of a table of that shape after factoring."""
    sizes = {"out": shape[0], "in": shape[1], "rank": rank}
    return sum(math.prod(each) for each in kind.tensors(sizes).values())


def _tables_in(model: nn.Module) -> list[EmbeddingTable]:
    embeddings: dict[int, list[str]] = {}
    heads: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, int]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or not (is_embedding(module) or is_linear(module)):
            continue
        inside |= set(module.modules())
        seen = view(module, table=True)
        key = id(seen.parameters[-1])
        (embeddings if is_embedding(module) else heads).setdefault(key, []).append(name)
        shapes[key] = seen.shape
    return [
        EmbeddingTable(
            names[0],
            tuple(names[1:]),
            tuple(heads.get(key, ())),
            shapes[key],
            getattr(model.get_submodule(names[0]), "padding_idx", None),
        )
        for key, names in embeddings.items()
    ]


def _chosen(
    model: nn.Module,
    found: Sequence[EmbeddingTable],
    targets: Sequence[str] | None,
    exclude: Sequence[str],
) -> list[EmbeddingTable]:
    names = [name for table in found for name in table.embeddings]
    wanted = set(_token_embedding(model, names) if targets is None else ())
    for argument, patterns in (("targets", targets or ()), ("exclude", exclude)):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                raise NoMatchError(
                    f"{argument}: pattern {pattern!r} matches none of the {len(names)} embeddings; "
                    f"nearest names: {nearest(pattern, names)}"
                )
            wanted = wanted | hits if argument == "targets" else wanted - hits
    chosen = [table for table in found if wanted & set(table.embeddings)]
    if not chosen:
        raise NoMatchError(f"no embedding is left of {len(names)}: all were excluded")
    return chosen


def _token_embedding(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the input embedding of a ``transformers`` model, or the only one there is.

    Raises:
        NoMatchError: if there is no such one.
    """
    for module in model.modules():
        ask: Any = getattr(module, "get_input_embeddings", None)
        if ask is not None:
            given = ask()
            own = [name for name in names if model.get_submodule(name) is given]
            if own:
                return own
    if len(names) != 1:
        raise NoMatchError(
            f"which of {len(names)} embeddings is the tokens'? Name it with targets=: "
            f"{nearest('', names) or 'there is none'}"
        )
    return list(names)


def _check_not_generating(model: nn.Module) -> None:
    """Check that a model does not generate token by token, as SAFE needs whole sequences.

    Raises:
        LayerError: if it does.
    """
    for module in model.modules():
        generates = getattr(module, "can_generate", None)
        if generates is not None and generates():
            raise LayerError(
                f"{type(module).__name__} generates: method='safe' reads whole sequences, later "
                "tokens too, and would see those to be predicted; use method='low_rank' or "
                "'kronecker'"
            )
