"""Updates attached, pruned and merged on bare models, beside what they are by definition."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lrcompress.errors import LayerError, NoMatchError, NotFiniteError, SettingError, ShapeError
from lrcompress.nn import LowRankLinear, LowRankUpdateLinear
from lrcompress.pruning.dsee import (
    attach_,
    check_updatable,
    freeze_,
    merge_updates_,
    prune_,
    trained_names,
    update_parameters,
    updated_names,
)
from lrcompress.solvers.godec import godec


@pytest.fixture
def gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()


def out(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(12).view(2, 6)).logits


C_ATTN = ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")


def test_query_and_value_get_updates_by_default(tiny_bert: str, gpt: nn.Module) -> None:
    assert updated_names(gpt, None) == C_ATTN
    bert = BertForSequenceClassification.from_pretrained(tiny_bert)
    assert [name[-5:] for name in updated_names(bert, None)] == ["query", "value"] * 2
    assert updated_names(gpt, ["*.mlp.c_fc"])[0] == "transformer.h.0.mlp.c_fc"
    trained = trained_names(bert, None, ())
    assert [n.rpartition(".")[0] for n in trained[::2]] == ["bert.pooler.dense", "classifier"]
    assert trained_names(gpt, None, ()) == ()  # its head is tied to the embedding
    assert trained_names(gpt, ["*.ln_1.bias"], C_ATTN)[0] == "transformer.h.0.ln_1.bias"
    assert len(trained_names(gpt, ["*.c_attn.bias"], C_ATTN)) == 2
    bert.classifier.weight.requires_grad_(False)
    assert "classifier.weight" not in trained_names(bert, None, ())


def test_attached_pruned_and_merged_on_conv1d(gpt: nn.Module) -> None:
    before = out(gpt)
    weight = gpt.get_submodule(C_ATTN[0]).weight.detach().T.clone()
    state = torch.get_rng_state()
    attach_(gpt, C_ATTN, rank=3, entries=7, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    layer = gpt.get_submodule(C_ATTN[0])
    torch.testing.assert_close(out(gpt), before)
    assert layer.support.equal(godec(weight, 3, 7, seed=4).support)
    assert layer.right.abs().max() <= 1 / 16**0.5
    assert not layer.right.equal(gpt.get_submodule(C_ATTN[1]).right)
    freeze_(gpt, update_parameters(gpt))
    assert sum(p.numel() for p in gpt.parameters() if p.requires_grad) == 2 * (3 * 64 + 7)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in update_parameters(gpt):
            gpt.get_parameter(name).normal_(std=0.02)

    names = updated_names(gpt, ["*.h.*"])
    prune_(gpt, names, 0.75, "global")
    first = {name: gpt.get_submodule(name).weight != 0 for name in names}
    prune_(gpt, names, 0.3, "global")
    sizes = [gpt.get_submodule(name).weight.numel() for name in names]
    left = {name: gpt.get_submodule(name).weight != 0 for name in names}
    assert sum(int(x.sum()) for x in left.values()) == round(0.3 * sum(sizes))
    assert not any((left[name] & ~first[name]).any() for name in names)
    expected = out(gpt)
    merge_updates_(gpt)
    assert not [m for m in gpt.modules() if isinstance(m, LowRankUpdateLinear)]
    torch.testing.assert_close(out(gpt), expected)
    merged = {name: gpt.get_submodule(name).weight != 0 for name in C_ATTN}
    assert all(merged[name].T.equal(left[name]) for name in C_ATTN)


def test_freezing_drops_gradients(gpt: nn.Module) -> None:
    out(gpt).sum().backward()
    freeze_(gpt, ["transformer.ln_f.bias"])
    assert [n for n, p in gpt.named_parameters() if p.requires_grad] == ["transformer.ln_f.bias"]
    assert [n for n, p in gpt.named_parameters() if p.grad is not None] == ["transformer.ln_f.bias"]


def test_says_what_cannot_be_updated(gpt: nn.Module) -> None:
    with pytest.raises(NoMatchError, match=r"no linear layer is called query or value.*0.up"):
        updated_names(nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(4, 4)})}), None)
    with pytest.raises(NoMatchError, match=r"trained: pattern 'head' matches none of the 28 para"):
        trained_names(gpt, ["head"], ())
    with pytest.raises(SettingError, match=r"trained: '.*h.0.attn.c_attn.weight' is the weight of"):
        trained_names(gpt, ["*.h.0.attn.c_attn.*"], C_ATTN)
    with pytest.raises(ShapeError, match=r"of shape \(48, 16\) .* of rank 17 and 0 entries; at m"):
        check_updatable(gpt, (), C_ATTN, 17, 0)
    with pytest.raises(ShapeError, match=r"of rank 1 and 769 entries; at most 16 and 768, or"):
        check_updatable(gpt, (), C_ATTN, 1, 769)
    gpt.get_submodule(C_ATTN[1]).weight.data[3, 3] = torch.nan
    with pytest.raises(
        NotFiniteError, match=r"^layer .*attn.c_attn': weight holds 1 non-finite of 768"
    ):
        attach_(gpt, C_ATTN, rank=1, entries=1)
    assert not [m for m in gpt.modules() if isinstance(m, LowRankUpdateLinear)]
    gpt.transformer.h[0].mlp.c_fc = LowRankLinear(16, 64, 2)
    with pytest.raises(
        LayerError, match=r"c_fc' is a LowRankLinear; DSEE starts from plain layers"
    ):
        check_updatable(gpt, ["transformer.h.0.mlp.c_fc"], C_ATTN, 1, 1)
