"""Sizes of a model with updates, counted beside one that is merged."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertModel

from lrcompress.export import merge_dense
from lrcompress.nn import LowRankUpdateLinear
from lrcompress.pruning.dsee import (
    attach_,
    freeze_,
    merge_updates_,
    prune_,
    update_parameters,
)
from lrcompress.pruning.effective_size import (
    effective_size,
    preview,
    pruning_record,
    records,
    recount_,
    trained_size,
)
from lrcompress.pruning.heads import attentions, kept_heads, remove_heads_, silence_

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_record_before_heads_are_removed_is_that_of_the_model_without_them(
    tiny_bert: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    made = BertModel.from_pretrained(tiny_bert, num_attention_heads=4).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    names = [n for n, x in made.named_modules() if ".attention." in n and type(x) is nn.Linear]
    found = attentions(made, names)
    sizes = sum(p.numel() for p in made.parameters())
    attach_(made, names, rank=2, entries=3, heads={one.output: 4 for one in found})
    for one in found:
        nn.init.normal_(made.get_submodule(one.output).coefficients)
    silence_(made, kept_heads(made, found, 0.5, "global"))

    record = pruning_record("DSEE, heads", 7, made, names, found, merge=True)
    unmerged = pruning_record("DSEE, heads", 7, made, names, found, merge=False)
    recount_(again := copy.deepcopy(unmerged), made)
    assert again == unmerged
    remove_heads_(made, found)
    merge_updates_(made)
    recount_(after := copy.deepcopy(record), made)
    assert record == after
    assert record.model_before - record.model_after == sizes - record.model_after > 4 * 8 * 32
    assert record.model_after == record.effective
