"""Sizes of a model with updates, counted beside one that is merged."""

import torch
from torch import nn

from lrcompress.export import merge_dense
from lrcompress.nn import LowRankUpdateLinear
from lrcompress.pruning.dsee import attach_, freeze_, prune_, update_parameters
from lrcompress.pruning.effective_size import effective_size, preview, records, trained_size

NAMES = ("0", "2")


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6))
    attach_(made, ["0"], rank=2, entries=3)
    freeze_(made, update_parameters(made))
    for name in ("left", "entries"):
        nn.init.normal_(getattr(made[0], name))
    return made


def test_counts_are_those_of_the_merged_model() -> None:
    made = model()
    assert trained_size(made) == 2 * 20 + 3
    assert effective_size(made) == 12 * 8 + 8 + 48 + 6  # the bias of the norm is zero
    prune_(made, NAMES, 0.25, "layer")
    merged = merge_dense(made)
    assert effective_size(made) == effective_size(merged) == 24 + 8 + 12 + 6
    assert effective_size(merged) == sum(int((p != 0).sum()) for p in merged.parameters())


def test_records_say_what_is_left_and_what_is_stored() -> None:
    made = model()
    whole = records(made, NAMES)
    assert [(x.rank, x.after, x.stored) for x in whole] == [(None, 96, 96), (None, 48, 48)]
    expected = preview(made, NAMES, 0.25)
    prune_(made, NAMES, 0.25, "layer")
    found = records(made, NAMES)
    assert found == records(merge_dense(made), NAMES) == expected
    assert [(x.rank, x.after, x.stored) for x in found] == [(0, 24, 96), (0, 12, 48)]
    assert preview(made, NAMES, 1.0) == whole
    assert isinstance(made[0], LowRankUpdateLinear)
