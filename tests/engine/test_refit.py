"""Layers are refitted for what the compressed model gives them, as least squares would."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lrcompress.engine.refit
from lrcompress.distributed import Processes
from lrcompress.engine.compress import compress, factor_
from lrcompress.engine.observation import observe
from lrcompress.engine.refit import Refit
from lrcompress.engine.settings import Settings
from lrcompress.errors import NotFiniteError, ObservationError, SettingError
from lrcompress.nn import LowRankLinear, PivotedLinear, PrunedLinear
from lrcompress.statistics.views import view
from tests.solvers.test_left_factor import by_halves

WIDTH, INNER = 8, 20
Batch = tuple[Tensor, Tensor]


class Part(nn.Module):
    """A gated feed-forward block behind a layer of its own, which may be called in other ways."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.gate = nn.Linear(WIDTH, INNER, bias=bias)
        self.up = nn.Linear(WIDTH, INNER, bias=bias)
        self.down = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).tanh()
        return x + self.down(self.gate(x).sigmoid() * self.up(x))


class Net(nn.Module):
    def __init__(self, bias: bool = True, chained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Part(bias) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.chained = chained
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.chained else block(x) * 1.0
        return self.head(x)


def data(count: int = 4) -> list[Batch]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(48, WIDTH, generator=made).double(), torch.randint(3, (48,), generator=made))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def read_by(model: nn.Module, name: str) -> Tensor:
    """What a layer reads when the model runs on all batches."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for x, _ in data():
        model(x)
    handle.remove()
    return torch.cat(found)


def parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the left factor, and what it multiplies."""
    if isinstance(layer, PivotedLinear):
        return layer.left.detach(), layer.right.detach()
    if isinstance(layer, LowRankLinear):
        return layer.left.weight.detach(), layer.right.weight.detach()
    assert isinstance(layer, PrunedLinear)
    return layer.weight.detach(), torch.eye(len(layer.columns)).double()[layer.columns]


@torch.no_grad()
def set_(layer: nn.Module, left: Tensor, bias: Tensor | None) -> None:
    old = view(layer).bias
    if old is not None and bias is not None:
        old.copy_(bias)
    if isinstance(layer, PivotedLinear):
        layer.set_(left, layer.right)
    else:
        (layer.left.weight if isinstance(layer, LowRankLinear) else layer.weight).copy_(left)  # type: ignore[operator, union-attr]


def solved(wanted: Tensor, z: Tensor, left: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Every other batch is one half."""
    parts = [torch.cat(x.chunk(4)[i::2]) for x in (wanted, z) for i in (0, 1)]
    found, offset = by_halves(parts[:2], parts[2:], left, bias)
    return found, offset if bias else None


def by_definition(dense: nn.Module, factored: nn.Module, anchor: float, bias: bool) -> nn.Module:
    """Refit one layer after the other, each from passes of the whole model."""
    model = copy.deepcopy(factored)
    for i in range(2):
        for name in (f"blocks.{i}.{key}" for key in ("mix", "gate", "up", "down")):
            layer = model.get_submodule(name)
            whole = dense.get_submodule(name)
            if isinstance(layer, nn.Linear) or layer.in_features == 0:  # type: ignore[operator]
                continue
            if isinstance(layer, PrunedLinear) and layer.columns.all():
                continue
            own_model = copy.deepcopy(model)
            if isinstance(layer, PrunedLinear):  # the block before it is dense until then
                for key in ("gate", "up", "down"):
                    setattr(own_model.blocks[i], key, getattr(dense.blocks[i], key))  # type: ignore[index]
            x, own = read_by(dense, name), read_by(own_model, name)
            left, right = parts(layer)
            target = whole((1 - anchor) * own + anchor * x).detach()
            set_(layer, *solved(target, own @ right.mT, left, bias))
    return model


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("storage", ["balanced", "pivoted"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_layers_are_solved_by_least_squares_one_after_the_other(
    anchor: float, storage: str, narrow: bool, bias: bool, chained: bool
) -> None:
    dense = Net(bias, chained)
    given: dict[str, Any] = {"keep": 0.5, "align": 1, "storage": storage, "narrow_blocks": narrow}
    factored, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(factored, data(), loss_of, **given)
    record = compress(refitted, data(), loss_of, refit=anchor, **given)

    wanted = by_definition(dense, factored, anchor, bias)
    assert any(isinstance(x, PrunedLinear) for x in refitted.modules()) == narrow
    assert f"refitted at {anchor:g} of the dense inputs on 192 tokens" in record.note
    assert not any("not refitted" in layer.note for layer in record.layers)
    for name in (layer.name for layer in record.layers):
        one, other = (view(model.get_submodule(name)) for model in (refitted, wanted))
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-5, atol=1e-7)
        if one.bias is not None:
            torch.testing.assert_close(one.bias, other.bias, rtol=1e-5, atol=1e-7)


def test_factors_are_not_what_they_were() -> None:
    factored, refitted = Net(), Net()
    compress(factored, data(), loss_of, keep=0.4, align=1)
    compress(refitted, data(), loss_of, keep=0.4, align=1, refit=1)
    moved = [
        name
        for name, layer in refitted.named_modules()
        if isinstance(layer, LowRankLinear)
        and not torch.allclose(layer.weight, view(factored.get_submodule(name)).weight)
    ]
    assert moved


def test_without_bias_refit_biases_stay() -> None:
    dense, model = Net(), Net()
    compress(model, data(), loss_of, keep=0.5, refit=0.5, refit_bias=False, align=1)
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            assert torch.equal(layer.bias, dense.get_submodule(name).bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["svd", "fwsvd", "drone"])
def test_any_low_rank_method_is_refitted(method: str) -> None:
    dense, plain, refitted = Net(), Net(), Net()
    given: dict[str, Any] = {"method": method, "keep": 0.4, "align": 1}
    compress(plain, data(), loss_of, **given)
    compress(refitted, data(), loss_of, refit=0.5, **given)
    wanted = by_definition(dense, plain, 0.5, True)
    x = torch.cat([x for x, _ in data()])
    torch.testing.assert_close(refitted(x), wanted(x))


def test_a_second_point_is_refitted_for_the_layers_as_they_were() -> None:
    first, again = Net(), Net()
    for model in (first, again):
        compress(model, data(), loss_of, keep=0.7, align=1)
    before = copy.deepcopy(first)
    compress(first, data(), loss_of, keep=0.4, align=1)
    compress(again, data(), loss_of, keep=0.4, align=1, refit=1)
    x = torch.cat([x for x, _ in data()])
    errors = [(before(x) - model(x)).norm() for model in (first, again)]
    assert errors[1] < errors[0]


def test_a_block_that_is_narrowed_further_is_solved_for_what_it_read_before() -> None:
    model = Net()
    compress(model, data(), loss_of, keep=0.7, align=1, narrow_blocks=True)
    before, narrow_only = copy.deepcopy(model), copy.deepcopy(model)
    compress(narrow_only, data(), loss_of, keep=0.4, align=1, narrow_blocks=True)
    compress(model, data(), loss_of, keep=0.4, align=1, narrow_blocks=True, refit=0.5)
    was, now = (one.get_submodule("blocks.0.down") for one in (before, model))
    assert isinstance(was, PrunedLinear)
    assert isinstance(now, PrunedLinear)
    assert now.in_features < was.in_features
    features = read_by(before, "blocks.0.down")
    kept = now.columns[was.columns]
    start = narrow_only.get_submodule("blocks.0.down").weight.detach()
    weight, bias = solved(was(features).detach(), features[:, kept], start, True)
    torch.testing.assert_close(now.weight.detach(), weight)
    torch.testing.assert_close(now.bias.detach() if now.bias is not None else None, bias)


# Architectures, and what cannot be followed


def texts(decoder: bool = False) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(2)
    found = []
    for _ in range(3):
        ids = torch.randint(3, 40, (4, 9), generator=made)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100) if decoder else torch.tensor([0, 1, 0, 1])
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def text_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def t5() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    )


@pytest.mark.parametrize(("make", "decoder"), [(bert, False), (llama, True), (t5, True)])
def test_architectures_come_nearer_to_the_dense_model(
    make: Callable[[], nn.Module], decoder: bool
) -> None:
    torch.manual_seed(0)
    dense = make().eval()
    plain, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = texts(decoder)
    compress(plain, batches, text_loss, keep=0.4, align=1, method="drone")
    record = compress(refitted, batches, text_loss, keep=0.4, align=1, method="drone", refit=1)
    assert not [layer.name for layer in record.layers if "not refitted" in layer.note]

    errors = []
    for model in (plain, refitted):
        outs = [(dense(**b).logits.detach(), model(**b).logits.detach(), b) for b in batches]
        real = [b["attention_mask"].bool() if decoder else slice(None) for *_, b in outs]
        errors.append(
            sum(float((a - c)[m].norm()) for (a, c, _), m in zip(outs, real, strict=True))
        )
    assert errors[1] < errors[0]


def test_padding_takes_no_part() -> None:
    torch.manual_seed(0)
    dense, found = bert().eval(), []
    for filler in (3, 17):
        batches = texts()
        for batch in batches:
            batch["input_ids"] = batch["input_ids"].masked_fill(
                batch["attention_mask"] == 0, filler
            )
        model = copy.deepcopy(dense)
        compress(model, batches, text_loss, keep=0.4, align=1, method="svd", refit=0.5)
        found.append(model(**texts()[0]).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_layers_that_are_called_several_times_are_named_and_left_alone() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "embedding_size": 8}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes)).eval()
    plain = copy.deepcopy(model)
    given: dict[str, Any] = {"keep": 0.4, "align": 1, "method": "drone", "shared": True}
    compress(plain, texts(), text_loss, **given)
    record = compress(model, texts(), text_loss, refit=0.5, **given)
    notes = [layer.note for layer in record.layers if layer.rank is not None]
    assert notes
    assert all("not refitted: it is called 2 times" in note for note in notes)
    assert f"{len(notes)} layers left alone" in record.note
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


class Routed(nn.Module):
    """Layers of which the second reads some of the tokens only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return x.index_add(0, (chosen := x[:, 0] > 0).nonzero()[:, 0], self.blocks[1](x[chosen]))


def test_layers_that_read_other_tokens_are_named_and_left_alone() -> None:
    model = Routed()
    batches = [(torch.randn(30, 8), torch.randint(3, (30,))) for _ in range(3)]
    record = compress(model, batches, loss_of, keep=0.4, align=1, refit=0.5)
    notes = {layer.name: layer.note for layer in record.layers}
    assert "not refitted" not in notes["blocks.0"]
    assert "not refitted: it does not read the tokens" in notes["blocks.1"]


# What stays as it is


def test_a_model_is_left_as_it_ran_before() -> None:
    model = Net().train()
    model.blocks[0].eval()
    compress(model, data(), loss_of, keep=0.5, refit=0.5)
    assert model.training
    assert model.blocks[1].down.training  # type: ignore[union-attr]
    assert not model.blocks[0].training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("narrow", [False, True])
def test_an_error_leaves_everything_as_it_was(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, solve = Net(), lrcompress.engine.refit.Normal.solve
    before, layers = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    left = [2]

    def fails_late(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise NotFiniteError("late")
        return solve(*args)

    monkeypatch.setattr(lrcompress.engine.refit.Normal, "solve", fails_late)
    with pytest.raises(NotFiniteError, match="late"):
        compress(model, data(), loss_of, keep=0.4, refit=0.5, align=1, narrow_blocks=narrow)
    assert dict(model.named_modules()) == layers
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda: iter(data()), SettingError, "an iterator and can be gone through once"),
        (list, ObservationError, "no batches to refit on"),
    ],
)
def test_nothing_is_changed_without_batches_to_refit_on(
    batches: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compress(model, batches(), loss_of, method="svd", keep=0.5, refit=0.5)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_factors_need_passes_to_be_refitted() -> None:
    model = Net()
    with observe(model, method="svd") as recorder:
        pass
    with pytest.raises(SettingError, match="there are none"):
        factor_(model, recorder.statistics, Settings(method="svd", keep=0.5, refit=0.5))


class Sharded(Processes):
    sharded = True


def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(SettingError, match="under FSDP2; leave it out"):
        Refit.before(Net(), (), Settings(keep=0.5, refit=0.5), None, Sharded(0, 1))
