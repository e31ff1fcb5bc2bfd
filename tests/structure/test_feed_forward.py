"""Feed-forward blocks are found by what is computed, in every architecture, and only those."""

import re
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompress.errors import CheckpointError
from lrcompress.nn import LowRankLinear, PrunedLinear
from lrcompress.statistics.views import view
from lrcompress.structure.feed_forward import Block, Blocks, BlockTrace
from lrcompress.structure.selection import select
from tests.architectures.models import GROUPED, MODELS, batch_for, made

T5_SIZES = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
MORE: dict[str, Callable[[], nn.Module]] = {
    "Gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED)),
    "Phi-3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, pad_token_id=0)),
    "BLOOM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4)
    ),
    "gated T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    ),
}
# How many there are, and the last parts of the names of their layers.
EXPECTED = {
    "BERT": (2, "intermediate.dense", "output.dense"),
    "RoBERTa": (2, "intermediate.dense", "output.dense"),
    "DistilBERT": (2, "lin1", "lin2"),
    "ALBERT": (0,),
    "DeBERTa-v2": (2, "intermediate.dense", "output.dense"),
    "DeBERTa-v3": (2, "intermediate.dense", "output.dense"),
    "GPT-2": (2, "c_fc", "c_proj"),
    "OPT": (2, "fc1", "fc2"),
    "Llama": (2, "gate_proj", "up_proj", "down_proj"),
    "Mistral": (2, "gate_proj", "up_proj", "down_proj"),
    "Qwen2": (2, "gate_proj", "up_proj", "down_proj"),
    "Qwen3": (2, "gate_proj", "up_proj", "down_proj"),
    "Mixtral": (0,),
    "Qwen3-MoE": (0,),
    "T5": (4, "wi", "wo"),
    "BART": (4, "fc1", "fc2"),
    "ViT": (2, "fc1", "fc2"),
    "`nn.TransformerEncoder`": (2, "linear1", "linear2"),
    "`nn.MultiheadAttention`": None,  # nothing is targeted
    "Gemma": (2, "gate_proj", "up_proj", "down_proj"),
    "Phi-3": (0,),
    "BLOOM": (2, "dense_h_to_4h", "dense_4h_to_h"),
    "gated T5": (4, "wi_0", "wi_1", "wo"),
}
LEFT_ALONE = {
    "ALBERT": "used 2 times in one step",
    "Phi-3": "Split, by which its inputs are made, is not known to act on every feature alone",
}


def traced(model: nn.Module, shared: bool = True) -> Blocks:
    trace = BlockTrace(model, select(model, shared=shared).names)
    with trace.forward():
        loss = model(**batch_for(model)).loss
    return trace.blocks(loss)


def test_every_architecture_of_the_table_is_among_them() -> None:
    assert EXPECTED.keys() == {*MODELS, *MORE}


@pytest.mark.parametrize("name", [name for name, found in EXPECTED.items() if found])
def test_blocks_of_every_architecture_are_found_and_others_named(name: str) -> None:
    model = made(name) if name in MODELS else MORE[name]().train()
    blocks = traced(model)
    count, *ends = EXPECTED[name]
    assert len(blocks.found) == count
    for block in blocks.found:
        if name != "ViT" or "intermediate" not in block.ups[0]:  # as older transformers name it
            assert all(one.endswith(end) for one, end in zip(block.names, ends, strict=True))
        inner = {view(model.get_submodule(one)).shape[0] for one in block.ups}
        assert inner == {view(model.get_submodule(block.down)).shape[1]}
    told = LEFT_ALONE.get(name)
    assert bool(blocks.left_alone) == bool(told)
    assert all(str(told) in why for why in blocks.left_alone.values())
    assert Blocks.from_dict(blocks.to_dict()) == blocks


class Net(nn.Module):
    """A block between two layers, with an inner part of any kind."""

    def __init__(self, inner: Callable[..., Tensor], **more: nn.Module | Tensor) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.inner = inner
        for name, value in more.items():
            if isinstance(value, nn.Module | nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


def blocks_of(
    inner: Callable[..., Tensor], names: tuple[str, ...] = ("up", "gate", "down"), **more: object
) -> Blocks:
    net = Net(inner, **more)
    trace = BlockTrace(net, names)
    with trace.forward():
        loss = net(torch.randn(4, 3, 6)).square().mean()
    return trace.blocks(loss)


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.ELU(),
        nn.SELU(),
        nn.CELU(),
        nn.LeakyReLU(),
        nn.ReLU6(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Mish(),
        nn.Softplus(),
        nn.LogSigmoid(),
        nn.Threshold(0.1, 0.0),
        tf.activations.NewGELUActivation(),
        tf.activations.FastGELUActivation(),
        tf.activations.QuickGELUActivation(),
        tf.activations.ReLUSquaredActivation(),
    ],
    ids=str,
)
def test_activations_that_are_known(act: nn.Module) -> None:
    alone = blocks_of(lambda net, x: net.down(act(net.up(x))))
    assert alone.found == (Block(("up",), "down"),)
    gated = blocks_of(lambda net, x: net.down(act(net.gate(x)) * net.up(x)))
    assert [{*block.ups} for block in gated.found] == [{"gate", "up"}]


def test_dropout_views_and_half_precision_between_them_do_not_matter() -> None:
    drop = nn.Dropout(0.5)

    def inner(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = drop(net.up(x.view(-1, 6)).relu()).view(x.shape[0], -1, 10)
            return net.down(h).float()

    assert blocks_of(inner).found == (Block(("up",), "down"),)
    kept = blocks_of(
        lambda net, x: checkpoint(lambda x: net.down(net.up(x).relu()), x, use_reentrant=False)
    )
    assert kept.found == (Block(("up",), "down"),)


class Swish2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (
            lambda n, x: n.down(nn.functional.relu_(n.up(x).view(-1, 10))),
            "an operation in place, by which",
        ),
        (lambda n, x: n.down(Swish2.apply(n.up(x))), "Swish2, by which its inputs are made"),
        (lambda n, x: n.down(n.up(x).softmax(-1)), "Softmax, by which its inputs are made"),
        (lambda n, x: n.down(n.norm(n.up(x)).relu()), "NativeLayerNorm, by which its inputs"),
        (lambda n, x: n.down(n.up(x).relu()) + n.up.bias.mean(), None),
        (lambda n, x: n.second(h := n.up(x).relu()) + n.down(h), "are also read by"),
        (lambda n, x: n.down((u := n.up(x)).relu()) + u.mean(), "its features are also read by"),
        (lambda n, x: n.down(n.up(x).relu() * n.frozen), "'frozen' may belong to it"),
        (lambda n, x: n.down(n.up(x).relu() * n.learned), "a parameter stands between it"),
        (lambda n, x: n.down(n.up(x).view(4, 3, 2, 5).mT.flatten(-2).relu()), "Transpose, by"),
        (lambda n, x: n.down(n.wide(x).relu().view(4, 6, 10)), "the 20 outputs before it are"),
        (lambda n, x: n.down(n.up(n.down(n.up(x).relu())).relu()), "is used 2 times in one"),
        (lambda n, x: n.down(n.low(x).relu()), "'low' is factored already"),
        (lambda n, x: n.down(n.other(x).relu()), "'other', which is before it, is not among"),
        (lambda n, x: n.down(n.tied(x).relu()), "the weight of 'tied' is used elsewhere too"),
    ],
)
def test_what_is_no_block_that_can_be_narrowed_is_named(
    inner: Callable[..., Tensor], why: str | None
) -> None:
    more = {
        "norm": nn.LayerNorm(10),
        "second": nn.Linear(10, 6),
        "frozen": torch.rand(10),
        "learned": nn.Parameter(torch.rand(10)),
        "wide": nn.Linear(6, 20),
        "low": LowRankLinear(6, 10, rank=2),
        "other": nn.Linear(6, 10),
        "tied": nn.Linear(6, 10),
        "holder": nn.Linear(6, 10),
    }
    more["holder"].weight = more["tied"].weight
    if why is None or "may belong" not in why:
        del more["frozen"]
    names = ("up", "gate", "down", "second", "wide", "low", "tied")
    blocks = blocks_of(inner, names, **more)
    if why is None:
        assert blocks.found == (Block(("up",), "down"),)
        return
    assert not blocks.found
    assert why in blocks.left_alone["down"]


def test_what_reads_no_other_layer_or_no_activation_is_not_spoken_of() -> None:
    mixed = blocks_of(lambda net, x: net.down(net.up(net.norm(x))), norm=nn.LayerNorm(6))
    assert mixed == Blocks()
    straight = blocks_of(lambda net, x: net.down(net.up(x)))
    assert straight == Blocks()


def test_a_narrowed_block_is_one_still() -> None:
    def inner(net: Net, x: Tensor) -> Tensor:
        return net.down(net.up(x).relu())

    net, kept = Net(inner), torch.arange(10) < 4
    net.up, net.down = PrunedLinear.of(net.up, rows=kept), PrunedLinear.of(net.down, columns=kept)
    trace = BlockTrace(net, ("up", "down"))
    with trace.forward():
        loss = net(torch.randn(3, 6)).mean()
    assert trace.blocks(loss).found == (Block(("up",), "down"),)


def test_leaves_no_hooks_behind_and_holds_no_graph() -> None:
    net = Net(lambda net, x: net.down(net.up(x).relu()))
    trace = BlockTrace(net, ("up", "down"))
    with pytest.raises(RuntimeError), trace.forward():
        net(torch.randn(3, 7))
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad(), trace.forward():
        loss = net(torch.randn(3, 6)).mean()
    assert trace.blocks(loss) == Blocks()


def test_says_what_is_no_description_of_blocks() -> None:
    with pytest.raises(CheckpointError, match=re.escape("these are no blocks: KeyError('found')")):
        Blocks.from_dict({})
