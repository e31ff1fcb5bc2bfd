"""Blocks are found by running a model, and run by themselves give what they gave in it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lrcompress.engine.block_runs import (
    Call,
    RealTokens,
    calls_of,
    evaluating,
    find_order,
    inputs_of,
    numbered_block,
    standing_in,
)
from lrcompress.errors import ObservationError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.three(self.one(x) * self.two(x)), None


class Net(nn.Module):
    def __init__(self, between: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.between, self.head = between, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, scale=i + 1.0)[0]
            if self.between and i == 1:
                x = self.between(self, x)
        return self.head(x)


NAMES = [f"blocks.{i}.{key}" for i in range(3) for key in ("three", "two", "one")]
X = torch.arange(20.0).view(5, 4) / 10


def order_of(model: nn.Module, names: list[str] = NAMES, x: Tensor = X) -> Any:
    with evaluating(model):
        return find_order(model, names, lambda: model(x))


@pytest.mark.parametrize(
    ("name", "block"),
    [("layer.2.mlp.4.up", "layer.2"), ("0", "0"), ("a.pooler", "a.pooler")],
)
def test_the_block_of_a_layer(name: str, block: str) -> None:
    assert numbered_block(name) == block


def test_blocks_that_are_given_what_the_one_before_returned_are_a_chain() -> None:
    found = order_of(Net())
    assert found.chains == [["blocks.0", "blocks.1", "blocks.2"]]
    for i in range(3):
        first, second = found.stages[f"blocks.{i}"]
        assert (set(first), second) == (
            {f"blocks.{i}.one", f"blocks.{i}.two"},
            [f"blocks.{i}.three"],
        )
    assert not found.left_alone


def test_what_is_computed_between_blocks_ends_a_chain() -> None:
    found = order_of(Net(lambda _, x: x * 2))
    assert found.chains == [["blocks.0", "blocks.1"], ["blocks.2"]]


def test_a_layer_outside_of_numbered_blocks_is_a_block_by_itself() -> None:
    found = order_of(Net(), [*NAMES, "head"])
    assert found.chains[-1] == ["head"]  # though it reads what the last block returned
    assert found.stages["head"] == [["head"]]


def test_layers_of_a_block_that_is_no_module_to_call_are_blocks_by_themselves() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0]["up"](x)  # type: ignore[index, operator]

    found = order_of(Parts(), ["blocks.0.up"])
    assert found.chains == [["blocks.0.up"]]


def test_what_cannot_be_followed_is_named_with_the_reason() -> None:
    def outside(model: Net, x: Tensor) -> Tensor:
        return x + model.blocks[0](x)[0]

    found = order_of(Net(outside))
    assert found.chains == [["blocks.1"], ["blocks.2"]]
    assert set(found.left_alone.values()) == {"it is called 2 times"}

    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x)[0])[0]  # type: ignore[no-any-return]

    found = order_of(Unused())
    assert set(found.left_alone) == {"blocks.2.one", "blocks.2.two", "blocks.2.three"}
    assert set(found.left_alone.values()) == {"it is not called"}


def test_blocks_that_do_not_give_the_same_again_are_run_layer_by_layer() -> None:
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
            self.calls += 1
            return super().forward(x, scale=scale * self.calls)

    model = Net()
    model.blocks[1] = Counts()
    found = order_of(model)
    assert not found.left_alone
    assert ["blocks.1.three"] in found.chains


def test_inputs_that_are_changed_in_place_are_named() -> None:
    class Adds(Block):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
            h = x * scale
            y = self.one(h)
            h += y
            return self.three(h) + self.two(h), None

    model = Net()
    model.blocks[1] = Adds()
    found = order_of(model)
    assert found.left_alone == {"blocks.1.one": "its input is changed in place after it was read"}


def test_a_chain_run_block_by_block_gives_what_the_model_gives() -> None:
    model, chain = Net(), [f"blocks.{i}" for i in range(3)]
    given: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with evaluating(model):
        model(X)
        calls = calls_of(model, chain, lambda: model(X))
        hidden: object = None
        for block in chain:
            call = calls[block] if calls[block].place is None else calls[block].given(hidden)
            read, none = inputs_of(model, block, call, [f"{block}.two"])
            assert none is None
            assert torch.equal(read[f"{block}.two"], call.args[0])
            _, hidden = inputs_of(model, block, call, (), whole=True)
    assert torch.equal(given[0], hidden)  # type: ignore[arg-type]
    assert len(given) == 1  # the model was ended before its head


def test_caches_of_keys_and_values_do_not_grow() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model, ids = GPT2LMHeadModel(GPT2Config(**sizes)), torch.arange(10).view(1, 10)
    names = [f"transformer.h.{i}.{key}" for i in (0, 1) for key in ("attn.c_attn", "mlp.c_fc")]
    with evaluating(model):
        found = find_order(model, names, lambda: model(ids, use_cache=True))
    assert found.chains == [["transformer.h.0", "transformer.h.1"]]
    assert not found.left_alone


def test_a_call_replaces_what_came_from_the_block_before() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    for call in (Call.of((1, x), {}, x), Call.of((1,), {"hidden": x}, x)):
        assert call.given(y).tensors == [y]
        assert call.tensors == [x]
    assert Call.of((x,), {}, None).place is None


def test_other_modules_stand_in_and_come_back() -> None:
    model, other = Net(), nn.Linear(4, 4)
    model.add_module("alias", model.blocks[0].one)  # type: ignore[arg-type]
    before = dict(model.named_modules())
    with standing_in(model, {"blocks.0.one": other}):
        assert model.blocks[0].one is other
        assert model.alias is other
    assert dict(model.named_modules()) == before


def test_a_mask_that_is_missing_is_asked_for_where_sequences_are_read() -> None:
    call = Call.of((X[None],), {})
    real = RealTokens(Net(), None, missing="no mask")
    assert real.of("one", X, call).real is None
    with pytest.raises(ObservationError, match="no mask"):
        real.of("one", X[None], call)


def test_a_decoder_reads_its_own_tokens_and_those_of_its_encoder() -> None:
    own, encoded = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    call = Call.of((own,), {"encoder_hidden_states": encoded})
    real = RealTokens(Net(), torch.tensor([[1, 0]]), torch.tensor([[1, 1, 0]]))
    found = [real.of("one", x, call).real for x in (own, encoded)]
    assert [None if x is None else x.tolist() for x in found] == [[0, 1], [0]]
