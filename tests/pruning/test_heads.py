"""Heads that are removed, in every architecture that is known, beside heads that are silent."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from lrcompress.bench.timing import now
from lrcompress.errors import LayerError
from lrcompress.nn import LowRankLinear, LowRankUpdateLinear, PrunedLinear
from lrcompress.pruning.dsee import attach_, merge_updates_
from lrcompress.pruning.effective_size import (
    effective_size,
    preview,
    pruned_features,
    pruning_record,
    records,
)
from lrcompress.pruning.heads import (
    attentions,
    kept_heads,
    remove_heads_,
    silence_,
)
from lrcompress.structure.plan import Plan
from lrcompress.structure.selection import select

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "attn_implementation": "eager",
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}
CONFIGS = {
    "bert": BertConfig(**BERT),
    "bert, sdpa": BertConfig(**BERT | {"attn_implementation": "sdpa"}),
    "roberta": RobertaConfig(**BERT),
    "xlm_roberta": XLMRobertaConfig(**BERT),
    "camembert": CamembertConfig(**BERT),
    "electra": ElectraConfig(**BERT, embedding_size=16),
    "distilbert": DistilBertConfig(**DISTIL, attn_implementation="eager"),
}
STAYS = torch.tensor([[True, False, True, False], [False, False, False, True]])


def made(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    return model(**inputs()).last_hidden_state


def masked_by_hand(model: nn.Module, outputs: list[str]) -> Tensor:
    """The output with hooks that set what silent heads give to zero."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, stays=stays: (args[0] * stays.repeat_interleave(8),)
        )
        for name, stays in zip(outputs, STAYS, strict=True)
    ]
    result = out(model)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_removed_heads_are_as_silent_as_masked_ones(config: Any) -> None:
    model = made(config)
    before = sum(p.numel() for p in model.parameters())
    found = attentions(model, select(model).names)
    outputs = [one.output for one in found]
    assert [(one.heads, one.head_size) for one in found] == [(4, 8), (4, 8)]
    expected = masked_by_hand(model, outputs)

    queries = [one.inputs[0] for one in found]
    attach_(model, queries, rank=2, entries=3, heads=dict.fromkeys(outputs, 4))
    silence_(model, dict(zip(outputs, STAYS, strict=True)))
    torch.testing.assert_close(out(model), expected)
    names = [name for one in found for name in one.names]
    would = records(model, names, pruned_features(model, found))
    remove_heads_(model, found)
    merge_updates_(model)

    torch.testing.assert_close(out(model), expected)
    assert not [m for m in model.modules() if isinstance(m, LowRankUpdateLinear)]
    assert before - sum(p.numel() for p in model.parameters()) == 5 * (4 * 8 * 32 + 3 * 8)
    assert records(model, names) == would
    assert sum(x.after for x in would) == 3 * 4 * 8 * 32
    state = model.state_dict()
    again = made(config)
    Plan.of(model).apply_(again).load_state_dict(state)
    assert torch.equal(out(again), out(model))
    other = made(config)
    Plan.matching(other, state).apply_(other).load_state_dict(state)
    assert torch.equal(out(other), out(model))


def test_coefficients_become_part_of_the_weights_and_full_attention_stays_plain() -> None:
    model = made(CONFIGS["bert"])
    found = attentions(model, select(model).names)
    attach_(model, (), rank=0, entries=0, heads={one.output: 4 for one in found})
    layers = [model.get_submodule(one.output) for one in found]
    with torch.no_grad():
        layers[0].coefficients.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))
    expected = out(model)
    silence_(model, {found[1].output: STAYS[1]})
    remove_heads_(model, found)
    merge_updates_(model)
    kinds = {type(model.get_submodule(name)) for name in found[0].names}
    assert kinds == {nn.Linear}
    assert isinstance(model.get_submodule(found[1].output), PrunedLinear)
    assert not torch.equal(out(model), expected)


def test_every_attention_keeps_a_head_of_the_largest_coefficients() -> None:
    model = made(CONFIGS["bert"])
    found = attentions(model, select(model).names)
    attach_(model, (), rank=0, entries=0, heads={one.output: 4 for one in found})
    sizes = torch.tensor([[0.9, -0.8, 0.7, 0.6], [0.1, -0.5, 0.2, 0.3]])
    for one, values in zip(found, sizes, strict=True):
        model.get_submodule(one.output).coefficients.detach().copy_(values)

    def stays(keep: float, scope: str) -> list[list[int]]:
        kept = kept_heads(model, found, keep, scope)
        return [kept[one.output].nonzero().flatten().tolist() for one in found]

    assert stays(0.5, "global") == [[0, 1, 2], [1]]
    assert stays(0.5, "layer") == [[0, 1], [1, 3]]
    assert stays(0.01, "global") == stays(0.01, "layer") == [[0], [1]]
    assert stays(0.75, "global") == [[0, 1, 2, 3], [1, 3]]


def test_with_fewer_heads_attention_is_faster() -> None:
    large = BERT | {"hidden_size": 512, "num_attention_heads": 16, "num_hidden_layers": 1}
    model = made(BertConfig(**large))
    attention, x = model.encoder.layer[0].attention, torch.randn(4, 96, 512)

    def seconds() -> float:
        taken = []
        for _ in range(6):
            started = now()
            with torch.no_grad():
                attention(x)
            taken.append(now() - started)
        return min(taken)

    before = seconds()
    found = attentions(model, select(model).names)
    attach_(model, (), rank=0, entries=0, heads={one.output: 16 for one in found})
    silence_(model, {found[0].output: torch.arange(16) < 4})
    remove_heads_(model, found)
    assert seconds() < 0.7 * before


def test_what_is_expected_of_equal_shares() -> None:
    model = made(CONFIGS["bert"])
    found = attentions(model, select(model).names)
    names = [name for one in found for name in one.names]
    layers = preview(model, names, 0.5, found)
    assert sum(x.after for x in layers) == sum(x.before for x in layers) // 2
    assert layers[0].rows == 16
    assert (layers[3].rows, layers[3].parameters, layers[3].stored) == (32, 512, 512)


def test_what_will_be_left_is_said_before_heads_are_gone() -> None:
    model = made(CONFIGS["bert"])
    found = attentions(model, select(model).names)
    names = [name for one in found for name in one.names]
    attach_(model, (), rank=0, entries=0, heads={one.output: one.heads for one in found})
    silence_(model, {one.output: torch.arange(one.heads) < one.heads // 2 for one in found})
    said = pruning_record("DSEE, heads", 3, model, names, found, merge=True)
    remove_heads_(model, found)
    gates = sum(one.heads for one in found)  # that become part of the weights
    assert 0 <= said.effective - effective_size(model) <= gates
    assert said.effective <= said.model_after


def test_says_which_attention_it_knows() -> None:
    llama = made(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=50,
        )
    )
    with pytest.raises(LayerError, match=r"of BertAttention, .*, but LlamaAttention; use struct"):
        attentions(llama, select(llama).names)
    model = made(CONFIGS["bert"])
    with pytest.raises(LayerError, match=r"all projections among the pruned layers, found none"):
        attentions(model, select(model, ["*.intermediate.*"]).names)
    names = select(model).names
    layer = model.encoder.layer[1].attention
    layer.self.key = LowRankLinear(32, 32, 4)
    assert len(attentions(model, names)) == 2
    layer.self.key = PrunedLinear.of(nn.Linear(32, 32), rows=STAYS[0].repeat_interleave(8))
    with pytest.raises(LayerError, match=r"layer.1.attention.self.key' is a PrunedLinear: its he"):
        attentions(model, names)
