"""How large a model is, and was: counted from what it really holds."""

import torch
from torch import nn

from lrcompress.structure.parameter_counts import dense_bytes, dense_size, stored_bytes
from lrcompress.structure.plan import LayerPlan, Plan


def test_a_factored_model_knows_how_large_it_was() -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 30).to(torch.float16), nn.Linear(30, 4))
    parameters = sum(p.numel() for p in model.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (dense_size(model), dense_bytes(model), stored_bytes(model)) == (
        parameters,
        nbytes,
        nbytes,
    )
    Plan(
        (
            LayerPlan("0", "low_rank", {"in": 20, "out": 10, "rank": 3}),
            LayerPlan("1", "low_rank_sparse", {"in": 10, "out": 30, "rank": 2, "rows": 5}),
        )
    ).apply_(model)
    assert (dense_size(model), dense_bytes(model)) == (parameters, nbytes)
    smaller = (3 * 30 - 200) * 4 + (2 * 40 + 5 * 10 - 300) * 2
    assert stored_bytes(model) == nbytes + smaller
