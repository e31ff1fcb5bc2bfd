"""How large a model is, and was: counted from what it really holds."""

import pytest
import torch
from torch import nn

from lrcompress.nn import LowRankSparseLinear, LowRankUpdateLinear, Replacement
from lrcompress.structure.parameter_counts import (
    dense_size,
    replaced_sizes,
    sizes_before,
    stored_bytes,
)
from lrcompress.structure.plan import LayerPlan, Plan


def test_a_factored_model_knows_how_large_it_was() -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 30).to(torch.float16), nn.Linear(30, 4))
    parameters = sum(p.numel() for p in model.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (dense_size(model), stored_bytes(model)) == (parameters, nbytes)
    assert sizes_before(model) == (parameters, nbytes)
    Plan(
        (
            LayerPlan("0", "low_rank", {"in": 20, "out": 10, "rank": 3}),
            LayerPlan("1", "low_rank_sparse", {"in": 10, "out": 30, "rank": 2, "rows": 5}),
        )
    ).apply_(model)
    assert dense_size(model) == parameters
    smaller = (3 * 30 - 200) * 4 + (2 * 40 + 5 * 10 - 300) * 2
    assert stored_bytes(model) == nbytes + smaller
    assert sizes_before(model) == (sum(p.numel() for p in model.parameters()), nbytes + smaller)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (LowRankSparseLinear, {"rank": 2, "rows": 30}),
        (LowRankUpdateLinear, {"rank": 2, "entries": 5, "heads": 0, "masked": 1}),
    ],
)
def test_what_is_being_pruned_or_updated_counts_as_before_that(
    kind: type[Replacement], sizes: dict[str, int]
) -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 30).to(torch.float16))
    factored = LayerPlan("0", "low_rank", {"in": 20, "out": 10, "rank": 3})
    Plan((factored,)).apply_(model)
    before = sum(p.numel() for p in model.parameters()), stored_bytes(model)
    Plan((factored, LayerPlan("1", kind.kind, {"in": 10, "out": 30, **sizes}))).apply_(model)
    assert isinstance(model[1], kind)
    assert stored_bytes(model) > before[1]
    assert sizes_before(model, kind) == before
    assert replaced_sizes(model, ["0"]) == {"0": 90}
