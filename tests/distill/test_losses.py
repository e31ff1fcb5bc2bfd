"""What each loss looks at in a model, and what it refuses."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model

import lrcompress
from lrcompress.distill import DistillationLoss, HiddenStates, Logits, Relations
from lrcompress.distill.losses import LOGITS, first_tensor
from lrcompress.errors import LayerError, NoMatchError, SettingError, ShapeError

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
Make = Callable[..., Any]
BERT = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
)


def test_hidden_states_are_the_outermost_numbered_blocks() -> None:
    model = BertForSequenceClassification(BERT)
    names = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert HiddenStates().layers(model) == names
    assert HiddenStates().layers(model.bert, "bert.") == names
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])])
    idle = nn.ModuleList([nn.ReLU()])
    assert HiddenStates().layers(nn.ModuleDict({"a": nested, "b": idle})) == ("a.0", "a.1")


def test_hidden_states_by_pattern() -> None:
    model = BertForSequenceClassification(BERT)
    some = HiddenStates(layers=["bert.embeddings", "*.layer.1"])
    assert some.layers(model) == ("bert.embeddings", "bert.encoder.layer.1")
    with pytest.raises(NoMatchError, match=r"layers='\*.block.1' matches none .*; nearest: "):
        HiddenStates(layers=["*.block.1"]).layers(model)


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(NoMatchError, match=r"no numbered blocks in Sequential; choose .* 0, 1"):
        HiddenStates().layers(model)


def test_relations_of_bert_and_gpt2() -> None:
    layer = "bert.encoder.layer.1.attention.self"
    names = tuple(f"{layer}.{part}" for part in ("query", "key", "value"))
    assert Relations().layers(BertForSequenceClassification(BERT)) == names
    gpt2 = GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    assert Relations(layer=0).layers(gpt2) == ("h.0.attn.c_attn",)
    loss = Relations()
    loss.check(gpt2, gpt2)
    mine, theirs = ({"h.1.attn.c_attn": torch.randn(3, 5, 24)} for _ in range(2))
    parts = [
        dict(zip("qkv", f["h.1.attn.c_attn"].chunk(3, -1), strict=True)) for f in (mine, theirs)
    ]
    apart = Relations(heads=2)
    assert float(loss(mine, theirs, None)) == pytest.approx(float(apart(*parts, None)))


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v")])
def test_projections_of_other_names(names: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(4, 4) for name in names})})
    found = tuple(f"attn.{name}" for name in names)
    if names[0] == "to_q":
        with pytest.raises(NoMatchError, match=r"looks for query\|key\|value; .*projections="):
            Relations(heads=2).layers(model)
        assert Relations(heads=2, projections=list(names)).layers(model) == found
    else:
        assert Relations(heads=2).layers(model) == found


def test_relations_sum_their_kinds_and_share_keys_among_heads() -> None:
    generator = torch.Generator().manual_seed(0)

    def features() -> dict[str, Tensor]:
        sizes = {"q": 8, "k": 4, "v": 4}
        return {name: torch.randn(3, 5, size, generator=generator) for name, size in sizes.items()}

    mine, theirs = features(), features()
    parts = [
        Relations(kinds=[kind], heads=4)(mine, theirs, None) for kind in ("query_key", "value")
    ]
    assert torch.allclose(Relations(heads=4)(mine, theirs, None), parts[0] + parts[1])


def test_what_relations_refuse(reader: Make) -> None:
    model = reader()
    with pytest.raises(NoMatchError, match="layer=2 of 2 attention layers; they go from 0 to 1"):
        Relations(layer=2).layers(model)
    with pytest.raises(NoMatchError, match="no query, key and value projections in Linear"):
        Relations().layers(nn.Linear(2, 2))
    bare = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v")})
    with pytest.raises(SettingError, match="no number of heads in a config of ModuleDict; give"):
        Relations().check(bare, bare)
    three = {name: torch.randn(1, 2, 4) for name in "qkv"}
    with pytest.raises(ShapeError, match="4 features cannot be 3 heads; give heads="):
        Relations(heads=3)(three, three, None)
    fewer = three | {"k": torch.randn(1, 2, 2), "v": torch.randn(1, 2, 2)}
    with pytest.raises(ShapeError, match=r"other numbers of heads in the teacher, \(2, 1\)"):
        Relations(heads=2)(three, fewer, None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Logits(weight=-0.5), "weight of Logits must be .* not negative.* got -0.5"),
        (lambda: HiddenStates(weight="much"), "weight of HiddenStates must be .* got 'much'"),
        (lambda: Relations(weight={0.5: [1, 2, 3]}), r"weight of Relations .* got \[1, 2, 3\]"),
        (lambda: Logits(weight={"epoc:1": 1.0}), "a point is .* got 'epoc:1'"),
        (lambda: Logits(weight={}), "weight of Logits is a mapping without a point"),
        (lambda: Logits(temperature=0), "temperature must be above 0, such as 2.0, got 0"),
        (lambda: Relations(kinds=["valeu"]), "unknown kind 'valeu'; nearest: value"),
        (lambda: Relations(kinds=[]), "kinds is empty; give some of query_key"),
        (lambda: Relations(heads=0), "heads must be at least 1, got 0"),
        (lambda: Relations(projections=["q", "k"]), r"three names, or one of all three, got \['q'"),
    ],
)
def test_settings_that_are_wrong(build: Make, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()


def test_the_first_tensor_of_an_output() -> None:
    tensor = torch.ones(2)
    for output in (tensor, (tensor, None), [None, tensor], {"a": 1, "b": tensor}):
        assert first_tensor(output, "x") is tensor
    for output in (None, (), SimpleNamespace()):
        with pytest.raises(LayerError, match=r"layer 'x' gives a \w+ without a tensor"):
            first_tensor(output, "x")


def test_a_loss_of_one_s_own(reader: Make, trainer: Make, loader: Make) -> None:

    class Margins(DistillationLoss):
        name = "margins"
        needs_mask = False

        def layers(self, model: nn.Module, prefix: str = "") -> tuple[str, ...]:
            return (LOGITS, f"{prefix}head" if prefix else "model.head")

        def __call__(self, student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
            return (student[LOGITS] - teacher["model.head"]).abs().mean()

    module = lrcompress.Distilled(reader(), teacher=reader(1), losses=[Margins(1.0), Margins(2.0)])
    run = trainer()
    run.fit(module, loader())
    logged = {name for name in run.callback_metrics if "margins" in name}
    assert logged == {"distill_margins", "distill_margins_2"}
