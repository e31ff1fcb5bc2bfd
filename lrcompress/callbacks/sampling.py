"""Sampling: which steps are observed, of which layers, and whose gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lrcompress.engine.settings import check_device
from lrcompress.errors import SettingError, nearest
from lrcompress.statistics.fisher import check_fisher
from lrcompress.statistics.masks import MASK, MaskSource, check_mask
from lrcompress.statistics.moments import KINDS


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings: which steps are observed, and whose gradients; checked on construction.

    Attributes:
        kinds: the statistics to accumulate; empty if nothing is observed.
        owner: name of the callback in error messages.
        every_n_steps: every n-th step before a point, counted back from it; None is every 10th,
            or more often where that would be fewer than 16 steps.
        max_tokens: observing stops after so many tokens of all processes; None is no limit.
        fisher: gradients of ``"labels"``, or of labels as the ``"model"`` predicts them.
        logits: the submodule that returns the logits, for ``"model"``.
        mask: where a batch has its padding mask; see
            :func:`lrcompress.statistics.masks.batch_mask`.
        offload: the device the sums live on.
        turns: groups of layers that are observed one after the other, each in its part of the
            window; the sums of a group go to the host at the end of its part.
        deal: whether each of several processes observes some of the layers, or all of them
            and adds up; None deals from 1 GiB of statistics on.
        refit_tokens: of how many tokens the latest batches are kept, by all processes together.
        of_tables: statistics of embedding tables that ``kinds`` may also name.

    Raises:
        SettingError: if an entry is not what it may be.
    """

    kinds: Sequence[str]
    owner: str
    every_n_steps: int | None = None
    max_tokens: int | None = None
    fisher: str = "labels"
    logits: str | None = None
    mask: MaskSource = None
    offload: str | None = None
    turns: int = 1
    deal: bool | None = False
    refit_tokens: int | None = None
    of_tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_mask(self.mask)
        for kind in self.kinds:
            if kind not in KINDS + self.of_tables:
                raise SettingError(
                    f"also_observe takes {', '.join(KINDS)}; got {kind!r}, "
                    f"nearest: {nearest(kind, KINDS, 1)}"
                )
        check_fisher(self.fisher)
        for name in ("every_n_steps", "max_tokens", "refit_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} must be a whole number from 1, got {value!r}")
        check_device("offload", self.offload)
        if not isinstance(self.turns, int) or self.turns < 1:
            raise SettingError(f"turns must be a whole number from 1, got {self.turns!r}")
        if self.turns > 1 and self.offload is not None:
            raise SettingError(
                f"turns={self.turns} puts statistics of other layers on the host by itself; leave "
                f"out offload={self.offload!r}"
            )
        if self.refit_tokens and not self.kinds:
            raise SettingError(
                "refit and latency need batches of observed steps, and the method observes none; "
                "use 'drone', or give also_observe=['input_moment']"
            )

    def for_data(self, data: object) -> "Sampling":
        """Return these settings with the ``statistics_mask`` of a data module, if it has one.

        It stands in for the default alone: a mask that was chosen stays.
        """
        chosen = self.mask != MASK
        return self if chosen else replace(self, mask=getattr(data, "statistics_mask", MASK))
