"""Statistics of layers that have lost inputs or outputs since they were observed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lrcompress.linalg import packed
from lrcompress.statistics.moments import Statistics, Sums

_ROWS = frozenset({"output_moment", "output_fisher"})
_OF_NEITHER = frozenset({"weight"})


@dataclass
class NarrowedStatistics(Statistics):
    """Statistics of layers as if only some of their features had been observed.

    Sums over what is left are those entries of the whole sums: exactly over inputs, and over the
    gradients at outputs for as long as what reads them does not change. Of ``output_fisher``,
    ``G_ii · trace C``, it is the share that the inputs left have in ``trace C``.

    Attributes:
        whole: as they were observed.
        rows: ``(rows,)`` int64 by the name of a layer, which of its outputs are left.
        columns: ``(columns,)`` int64 likewise, which of its inputs are left.
    """

    whole: Statistics = field(default_factory=Statistics)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, kinds: Iterable[str]) -> Sums:
        """Return one layer's sums over what is left, of the kinds that must be there.

        Raises:
            ObservationError: as of the whole statistics.
        """
        sums = self.whole.of(name, kinds)
        values = {}
        for kind, value in sums.values.items():
            kept = (self.rows if kind in _ROWS else self.columns).get(name)
            if kept is None or kind in _OF_NEITHER:
                values[kind] = value
                continue
            kept = kept.to(value.device)
            if value.ndim == 2:
                values[kind] = packed(sums.moment(kind)[kept][:, kept])
            else:
                values[kind] = value[kept]
        if "output_fisher" in values and name in self.columns:
            energy = sums.moment("input_moment").diagonal()
            share = energy[self.columns[name].to(energy.device)].sum() / energy.sum()
            values["output_fisher"] = values["output_fisher"] * share.to(values["output_fisher"])
        return Sums(values, sums.tokens, sums.examples, sums.skipped)
