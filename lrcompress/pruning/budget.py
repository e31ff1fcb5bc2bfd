"""LoSparse budget: how the kept parameters are shared between ranks and sparse rows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lrcompress.budget import check_keep
from lrcompress.errors import SettingError
from lrcompress.importance import ROW_SCORES
from lrcompress.objective import COMPARABLE, LOW_RANK

AUTO = "auto"
GRANULARITIES = ("rows", "entries")


@dataclass(frozen=True, kw_only=True)
class LoSparseBudget:
    """The parameter budget of LoSparse; every entry is checked when it is made.

    Attributes:
        keep: parameters that remain / parameters before, over the targeted layers. At 1 nothing
            is pruned.
        low_rank_share: share of the kept parameters that go to the factors, the rest goes to
            rows; 1 is low rank alone. ``"auto"`` lets ranks and rows compete.
        initial_rank: share of the full rank that factors start with; their components are then
            pruned too. None starts with the final rank.
        row_score: ``"mean"`` or ``"group"``, of :mod:`lrcompress.importance`.
        granularity: whether ``"rows"`` of the sparse part are pruned, or single ``"entries"``.
        revive: let pruned units compete again at every mask.

    Raises:
        SettingError: if an entry is not what it may be, or two do not go together.
    """

    keep: float
    low_rank_share: float | str = 0.25
    initial_rank: float | None = None
    row_score: str = "mean"
    granularity: str = "rows"
    revive: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        share = self.low_rank_share
        if share != AUTO and not (_is_number(share) and 0 < float(share) <= 1):
            raise SettingError(
                f"low_rank_share must be above 0 and at most 1, or 'auto', got {share!r}"
            )
        rank = self.initial_rank
        if rank is not None and not (_is_number(rank) and 0 < rank <= 1):
            raise SettingError(
                f"initial_rank is a share of the full rank, above 0 and at most 1, got {rank!r}"
            )
        if self.row_score not in ROW_SCORES:
            raise SettingError(
                f"row_score must be one of {', '.join(ROW_SCORES)}, got {self.row_score!r}"
            )
        if self.granularity not in GRANULARITIES:
            raise SettingError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        if self.granularity == "entries" and self.low_rank_share in (1, AUTO):
            raise SettingError(
                "granularity='entries' prunes a sparse part of its own budget: "
                f"low_rank_share must be a number below 1, got {share!r}"
            )

    def check_method(self, method: str) -> None:
        """Check that ``method`` can start LoSparse with this budget.

        Raises:
            SettingError: if it gives no low-rank split, or ranks and rows compete by predicted
                losses, which it does not know.
        """
        if method not in LOW_RANK:
            raise SettingError(
                f"LoSparse starts from a low-rank split, which method {method!r} does not give; "
                f"use one of {', '.join(LOW_RANK)}"
            )
        if self.low_rank_share == AUTO and self.start_rank is None and method not in COMPARABLE:
            raise SettingError(
                "low_rank_share='auto' compares predicted losses of ranks and rows, which method "
                f"{method!r} does not know; use one of {', '.join(COMPARABLE)}, or give "
                "initial_rank="
            )

    def check_same(self, written: Mapping[str, object]) -> None:
        """Check that layers that were split for a budget go on with the same.

        Args:
            written: the fields of the budget that they were split for.

        Raises:
            SettingError: if one of them differs.
        """
        for name, now in asdict(self).items():
            if written[name] != now:
                raise SettingError(
                    f"the checkpoint was written after layers were split for "
                    f"{name}={written[name]!r}, got {name}={now!r}; go on with the same, or "
                    "resume from a checkpoint before that"
                )

    @property
    def sparse(self) -> bool:
        """Whether there is a sparse part at all."""
        return self.low_rank_share != 1

    @property
    def start_rank(self) -> float | None:
        """The share of the full rank that factors start with; None is their final rank."""
        return 1.0 if not self.sparse and self.initial_rank is None else self.initial_rank

    @property
    def competes(self) -> bool:
        """Whether rank components and rows are pruned from one budget."""
        return self.low_rank_share == AUTO and self.initial_rank is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Quota:
    """The parameters that units of some kind may have while they are pruned.

    Attributes:
        parts: which units: ``components``, ``rows``, or both.
        start: parameters before pruning.
        final: parameters after it.
    """

    parts: tuple[str, ...]
    start: int
    final: int

    def at(self, share: float) -> float:
        """Return the parameters left when ``share`` of what has to go is still there."""
        return self.final + (self.start - self.final) * share
