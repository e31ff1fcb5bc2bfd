"""Factors by columns: the same model and the same files, read faster a token at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress import compress, save_pretrained
from lrcompress.nn import (
    KroneckerLinear,
    LowRankLinear,
    LowRankSparseLinear,
    NarrowLowRankLinear,
    NarrowPivotedLinear,
    PivotedLinear,
)
from lrcompress.nn.decoding_layout import decoding_layout_

KINDS: dict[str, Callable[[], nn.Module]] = {
    "low rank": lambda: LowRankLinear(12, 9, rank=4),
    "pivoted": lambda: PivotedLinear(12, 9, rank=4),
    "sparse": lambda: LowRankSparseLinear(12, 9, rank=4, num_rows=3),
    "narrow": lambda: NarrowLowRankLinear(12, 9, 8, 12, rank=4),
    "narrow, pivoted": lambda: NarrowPivotedLinear(12, 9, 8, 12, rank=4),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def strides(layer: nn.Module) -> set[tuple[int, ...]]:
    return {p.stride() for p in layer.parameters() if p.dim() == 2}


@pytest.mark.parametrize("kind", KINDS)
def test_only_strides_change(kind: str) -> None:
    layer = KINDS[kind]()
    x = torch.randn(3, 12)
    before, wanted = {n: t.clone() for n, t in layer.state_dict().items()}, layer(x)
    parameters = dict(layer.named_parameters())
    assert decoding_layout_(layer) == [""]
    assert all(stride[0] == 1 for stride in strides(layer)), strides(layer)
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    assert {n: id(p) for n, p in layer.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    torch.testing.assert_close(layer(x), wanted)
    assert decoding_layout_(layer) == []


def test_what_would_not_become_faster_is_left_alone() -> None:
    left = [
        LowRankLinear(12, 9, rank=4, dtype=torch.bfloat16),
        LowRankLinear(12, 9, rank=4, dtype=torch.float16),
        LowRankLinear(12, 9, rank=4, dtype=torch.float64),
        LowRankLinear(12, 9, rank=4, device="meta"),
        KroneckerLinear(12, 9, terms=1, first=(3, 3)),
        nn.Linear(12, 9),
    ]
    before = [strides(layer) for layer in left]
    assert decoding_layout_(nn.Sequential(*left)) == []
    assert [strides(layer) for layer in left] == before


def test_it_generates_the_same_and_is_saved_as_before(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    compress(model, [], lambda *_: torch.zeros(()), method="svd", keep=0.5)
    ids = torch.arange(7)[None]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    save_pretrained(model, tmp_path / "before")
    assert len(decoding_layout_(model)) == 14
    found = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)
    save_pretrained(model, tmp_path / "after")
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("before", "after")]
    assert files[0] == files[1]


def test_factors_laid_out_so_still_train() -> None:
    layers = [LowRankLinear(12, 9, rank=4) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    decoding_layout_(layers[1])
    x, y = torch.randn(5, 12), torch.randn(5, 9)
    for layer in layers:
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), y).backward()
            optimizer.step()
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(other, one)
