"""The whole method on bare modules: what it does, what it promises, and what it leaves alone."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from transformers.pytorch_utils import Conv1D

import lrcompress.engine.compress
from lrcompress.engine.compress import compress, factor_, preview
from lrcompress.engine.observation import observe
from lrcompress.engine.settings import Settings
from lrcompress.errors import (
    LayerError,
    NoMatchError,
    NotFiniteError,
    ObservationError,
    SettingError,
)
from lrcompress.nn import LowRankLinear
from lrcompress.objective import LOW_RANK, METHODS, metric_of
from lrcompress.report import PointRecord
from lrcompress.solvers.truncation import truncate
from lrcompress.statistics.moments import KINDS, Statistics
from lrcompress.structure.plan import Plan

F = nn.functional
WIDTH, CLASSES = 10, 3
each_method = pytest.mark.parametrize("method", LOW_RANK)  # others: test_kronecker_shapes.py


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A residual block on sequences, with linear layers of two kinds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(WIDTH, 16), "drop": nn.Dropout(0.5), "down": Conv1D(WIDTH, 16)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](block["drop"](block["up"](x).tanh()))
        real = mask[..., None].to(x)
        return self.head((x * real).sum(1) / real.sum(1))


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
Batch = dict[str, Tensor]


def a_batch(size: int = 8, length: int = 5, dtype: torch.dtype = torch.float32) -> Batch:
    lengths = torch.randint(1, length + 1, (size,))
    return {
        "x": torch.randn(size, length, WIDTH, dtype=dtype) + torch.arange(WIDTH) / 5,
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "labels": torch.randint(CLASSES, (size,)),
    }


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["x"].to(next(model.parameters()).dtype), batch["attention_mask"])
    return F.cross_entropy(logits.float(), batch["labels"])


def batches(count: int = 3) -> list[Batch]:
    return [a_batch() for _ in range(count)]


def observed(model: nn.Module, data: list[Batch], **settings: Any) -> Statistics:
    with observe(model, kinds=KINDS, **settings) as recorder:
        for batch in data:
            with recorder.step(batch["attention_mask"]):
                loss = loss_of(model, batch)
                recorder.commit(len(batch["labels"]))
                loss.backward()
    model.zero_grad()
    return recorder.statistics


def read_by(model: nn.Module, name: str, data: list[Batch]) -> Tensor:
    """The real tokens that a layer reads, in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, __: seen.append(args[0].detach())
    )
    for batch in data:
        loss_of(model, batch)
    handle.remove()
    pairs = zip(seen, data, strict=True)
    return torch.cat([x[b["attention_mask"].bool()] for x, b in pairs]).double()


# What is done


@pytest.mark.parametrize("method", ["row_fisher", "kfac", "weighted_kfac"])
def test_gradients_may_be_those_of_labels_as_the_model_predicts_them(method: str) -> None:
    """Whatever the labels say, and however surely the model has learnt them."""
    dense, data = Net(), batches()
    others = [batch | {"labels": (batch["labels"] + 1) % CLASSES} for batch in data]
    found: dict[str, list[float | None]] = {"labels": [], "model": []}
    for fisher, losses in found.items():
        for given in (data, others):
            model, options = copy.deepcopy(dense), {"fisher": fisher, "logits": "head"}
            record = compress(model, given, loss_of, method=method, keep=0.4, align=1, **options)
            losses.append(record.predicted_loss)
    assert found["model"][0] == found["model"][1] != found["labels"][0] != found["labels"][1]

    # the increase of the loss on average over the labels that the model predicts: KL
    record = compress(
        model := copy.deepcopy(dense), data, loss_of, method="kfac", keep=0.2, align=1,
        allocation="global", fisher="model", logits="head", refit_bias=False, shrink=(0, 0),
    )  # fmt: skip
    with torch.no_grad():
        pairs = [[m.eval()(b["x"], b["attention_mask"]) for b in data] for m in (dense, model)]
        before, after = (torch.cat(one).log_softmax(-1) for one in pairs)
    lost = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
    assert record.predicted_loss is not None
    assert 0.3 * lost < record.predicted_loss < 3 * lost

    with pytest.raises(SettingError, match="fisher must be 'labels' or 'model', got 'expected'"):
        compress(model, data, loss_of, method=method, keep=0.4, fisher="expected")
    with pytest.raises(NoMatchError, match="logits='haed' names no submodule; nearest: head"):
        compress(model, data, loss_of, method=method, keep=0.4, fisher="model", logits="haed")
    with pytest.raises(ObservationError, match="fisher='model' found no logits: no module's outp"):
        compress(model, data, loss_of, method=method, keep=0.4, fisher="model")


@each_method
def test_every_method_factors_what_is_targeted_and_says_what_it_did(method: str) -> None:
    model, data = Net(), batches()
    size = sum(p.numel() for p in model.parameters())
    record = compress(model, data, loss_of, method=method, keep=0.5, align=1)

    assert record.method == method
    assert [layer.name for layer in record.layers] == NAMES
    targeted, kept = 4 * 16 * WIDTH, 0
    for layer in record.layers:
        module = model.get_submodule(layer.name)
        if layer.rank is None:
            assert not isinstance(module, LowRankLinear)
            assert layer.error == 0
        else:
            assert isinstance(module, LowRankLinear)
            assert module.rank == layer.rank
            assert 0 < layer.error < 1
        assert (layer.predicted_loss is not None) == METHODS[method].comparable
        kept += layer.after
    assert 0.5 - 26 / targeted < record.keep == kept / targeted <= 0.5
    assert record.model_before == size
    assert record.model_after == sum(p.numel() for p in model.parameters())
    assert size - record.model_after == targeted - kept
    assert record.step is None
    if METHODS[method].kinds:
        assert record.observed["steps"] == 3
        assert record.observed["tokens"] == sum(int(b["attention_mask"].sum()) for b in data)
    assert loss_of(model, data[0]).isfinite()


@each_method
def test_layers_are_truncated_in_the_method_s_own_metric(method: str) -> None:
    model, data = Net(), batches()
    before = copy.deepcopy(model).eval()
    statistics = observed(copy.deepcopy(model).eval(), data)
    compress(model, data, loss_of, method=method, ranks={"*": 3}, shrink=(0.1, 0.2))
    for name in NAMES:
        old, new = before.get_submodule(name), model.get_submodule(name)
        weight = old.weight.mT if isinstance(old, Conv1D) else old.weight
        metric = metric_of(method, statistics, name, refit_bias=True, shrink=(0.1, 0.2))
        expected = truncate(weight.detach(), metric.output, metric.input).factors(3)
        torch.testing.assert_close(new.weight, expected.left @ expected.right, rtol=1e-3, atol=1e-4)
        if metric.mean is not None:
            shift = (weight.double() - new.weight.double()) @ metric.mean
            torch.testing.assert_close(
                new.bias, (old.bias.double() + shift).float(), rtol=1e-3, atol=1e-4
            )


@each_method
def test_no_further_loss_is_predicted_for_layers_that_lose_nothing(method: str) -> None:
    model, data = Net(), batches()
    expected = loss_of(model.eval(), data[0])
    record = compress(model, data, loss_of, method=method, keep=1.0)
    assert all(layer.rank is None and layer.error == 0 for layer in record.layers)
    assert record.keep == 1
    assert record.predicted_loss == 0
    assert loss_of(model, data[0]).equal(expected)


def test_a_record_says_how_much_the_layer_s_output_changes() -> None:
    """For ``drone`` the error is the relative error of what the layer gives, about its mean."""
    model, data = Net().eval(), batches()
    x, old = read_by(model, "blocks.0.up", data), copy.deepcopy(model.blocks[0]["up"]).double()
    record = compress(model, data, loss_of, method="drone", ranks={"*": 4})
    new = copy.deepcopy(model.blocks[0]["up"]).double()
    exact = old(x)
    measured = (new(x) - exact).norm() / (exact - exact.mean(0)).norm()
    assert record.layers[0].error == pytest.approx(measured.item(), rel=1e-3)


# The bias


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("name", NAMES[:2])
def test_weight_and_bias_together_are_the_best_affine_map_of_that_rank(
    name: str, rank: int
) -> None:
    """Eckart and Young on the layer's centred outputs bound every map of that rank and bias."""
    model, data = Net().eval(), batches()
    x = read_by(model, name, data)
    outputs = copy.deepcopy(model.get_submodule(name)).double()(x)
    compress(model, data, loss_of, method="drone", ranks={name: rank}, targets=[name])
    new = copy.deepcopy(model.get_submodule(name)).double()
    least = torch.linalg.svdvals(outputs - outputs.mean(0))[rank:].square().sum()
    torch.testing.assert_close((new(x) - outputs).square().sum(), least, rtol=1e-4, atol=1e-6)
    # and given the weight, no bias does better: lstsq of what is left over
    rest = outputs - x @ new.weight.mT
    bias = torch.linalg.lstsq(torch.ones(len(x), 1).double(), rest).solution[0]
    torch.testing.assert_close(new.bias, bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["drone", "row_fisher", "kfac"])
def test_refitting_the_bias_is_never_worse_in_the_method_s_metric(method: str) -> None:
    model, data = Net().eval(), batches()
    statistics = observed(model, data)
    for name, rank in itertools.product(NAMES[:2], (1, 2, 4, 6)):
        x = read_by(model, name, data)
        exact = copy.deepcopy(model.get_submodule(name)).double()(x)
        metric = metric_of(method, statistics, name, refit_bias=False)
        g = torch.eye(exact.shape[1]).double() if metric.output is None else metric.output
        g = g.diag() if g.ndim == 1 else g
        lost = {}
        for refit in (True, False):
            one = copy.deepcopy(model)
            settings = Settings(
                method=method, ranks={"*": rank}, targets=[name], refit_bias=refit, shrink=(0, 0)
            )
            factor_(one, statistics, settings)
            change = copy.deepcopy(one.get_submodule(name)).double()(x) - exact
            lost[refit] = (change @ g * change).sum().item()
        assert lost[True] <= lost[False] * (1 + 1e-4)


def test_a_layer_without_bias_is_fitted_about_zero() -> None:
    model, data = nn.ModuleList([nn.Linear(WIDTH, 16, bias=False)]), [torch.randn(20, WIDTH) + 1]
    x, weight = data[0].double(), model[0].weight.detach().double()
    compress(model, data, lambda m, b: m[0](b).square().mean(), method="drone", ranks={"*": 2})
    assert model[0].bias is None
    least = torch.linalg.svdvals(x @ weight.mT)[2:].square().sum()
    lost = (x @ (weight - model[0].weight.double()).mT).square().sum()
    torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-6)


# Predicted and measured loss


def trained(steps: int = 120) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A classifier of overlapping clusters near convergence, and labels drawn from itself.

    With such labels the expected Hessian is the Fisher that the statistics estimate.
    """
    centres = torch.randn(9, WIDTH)

    def some(count: int) -> tuple[Tensor, Tensor]:
        cluster = torch.randint(9, (count,))
        x = centres[cluster] + torch.randn(count, WIDTH) * torch.logspace(0, -1, WIDTH)
        noisy = torch.rand(count) < 0.3
        return x, torch.where(noisy, torch.randint(3, (count,)), cluster % 3)

    sizes = [WIDTH, 16, 16, 16]
    blocks = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        x, y = some(256)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x = some(4096)[0]
    labels = torch.multinomial(model(x).softmax(-1).detach(), 1).squeeze(1)
    return model, list(zip(x.split(512), labels.split(512), strict=True))


def increase(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """By how much the loss rises, over all labels that the model might have drawn."""
    with torch.no_grad():
        one, two = model(inputs).log_softmax(-1), other(inputs).log_softmax(-1)
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize("method", ["kfac", "weighted_kfac"])
def test_the_predicted_loss_tracks_the_measured_loss(method: str) -> None:
    """Within a factor of two over four orders of magnitude, and in the right order."""
    model, data = trained()
    inputs = torch.cat([x for x, _ in data])
    predicted, measured = [], []
    for targets, rank in [
        *itertools.product((["0"], ["2"], ["4"]), (5, 4)),
        (["0", "2", "4"], 5),
        (["0", "2", "4"], 4),
    ]:
        other = copy.deepcopy(model)
        record = compress(
            other,
            data,
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            method=method,
            targets=targets,
            ranks={"*": rank},
            shrink=(0, 0),
        )
        assert record.predicted_loss is not None
        predicted.append(record.predicted_loss)
        measured.append(increase(model, other, inputs))
    assert max(measured) > 1e-4
    for expected, found in zip(predicted, measured, strict=True):
        assert expected / 2 < found < 2 * expected
    # whatever differs by more than the factor is ranked as measured
    for (p, m), (q, n) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        assert (p < q) == (m < n) or max(p / q, q / p) < 4


# What is left alone


@each_method
@pytest.mark.parametrize("training", [True, False])
def test_modes_gradients_and_flags_are_as_before(method: str, training: bool) -> None:
    model, data = Net().train(training), batches()
    model.blocks[0]["drop"].eval()
    loss_of(model, data[0]).backward()
    model.head.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    compress(model, data, loss_of, method=method, keep=0.5)
    for name, module in model.named_modules():
        assert module.training == modes.get(name, training)
        assert not module._forward_hooks
    after = dict(model.named_parameters())
    for name, grad in grads.items():
        if name in after:
            assert after[name].grad is not None
            assert after[name].grad.equal(grad)
    assert [n for n, p in after.items() if not p.requires_grad] == ["head.weight"]


@each_method
def test_a_frozen_model_is_factored_as_any_other_and_stays_frozen(method: str) -> None:
    model, data = Net().eval(), batches()
    frozen = copy.deepcopy(model).requires_grad_(False)
    compress(model, data, loss_of, method=method, ranks={"*": 3})
    with torch.no_grad():
        compress(frozen, data, loss_of, method=method, ranks={"*": 3})
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    for one, other in zip(frozen.parameters(), model.parameters(), strict=True):
        assert one.equal(other)


def test_statistics_are_those_of_the_model_without_dropout() -> None:
    model, data = Net().train(), batches()
    other = copy.deepcopy(model).eval()
    compress(model, data, loss_of, ranks={"*": 3})
    compress(other, data, loss_of, ranks={"*": 3})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.equal(two)


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    one, other = model.state_dict(), before.state_dict()
    modes = [m.training for m in model.modules()] == [m.training for m in before.modules()]
    same = all(torch.equal(one[k].nan_to_num(), other[k].nan_to_num()) for k in other)
    return one.keys() == other.keys() and same and modes


def spoil_last_weight(model: Net) -> None:
    model.blocks[1]["down"].weight.data[0, 0] = torch.nan


def nothing(model: Net) -> None:
    pass


@pytest.mark.parametrize("method", ["kfac", "weighted_kfac"])
def test_a_loss_over_tokens_is_predicted_in_its_own_unit(method: str) -> None:
    """Sentences of tokens lose what the same tokens lose as examples of their own."""
    torch.manual_seed(0)
    table, labels = torch.randn(6, 9, 10), torch.randint(4, (6, 9))
    labels[0, 5:] = -100
    real = labels != -100
    sentences = {"x": table, "labels": labels, "attention_mask": real.long()}
    alone = {"x": table[real], "labels": labels[real]}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(
            model(batch["x"]).flatten(0, -2), batch["labels"].flatten()
        )

    predicted = []
    for batch in (sentences, alone):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))
        settings = {"method": method, "targets": ["*"], "ranks": {"*": 3}, "mask": "attention_mask"}
        if batch is alone:
            settings["mask"] = None
        predicted.append(compress(model, [batch], loss, **settings).predicted_loss)
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-4)


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (
            spoil_last_weight,
            {"keep": 0.5, "method": "svd"},
            NotFiniteError,
            r"^layer 'blocks.1.down': weight holds 1 non-finite",
        ),
        (spoil_last_weight, {"keep": 0.5}, ObservationError, r"nothing to learn from: 3 batches"),
        (nothing, {"keep": 0.5, "data": []}, ObservationError, r"nothing to learn from: 0 batches"),
        (nothing, {"keep": 0.5, "targets": ["*.upp"]}, NoMatchError, r"targets: pattern '\*.upp'"),
        (nothing, {"keep": 0.5, "exclude": ["x"]}, NoMatchError, r"exclude: pattern 'x' matches"),
        (
            nothing,
            {"keep": 0.5, "ranks": {"*.downn": 2}},
            NoMatchError,
            r"ranks: pattern '\*.downn' matches none of the 4 .* names: blocks.\d.down",
        ),
        (
            nothing,
            {"keep": 0.5, "keeps": {"head": 0.2}},
            NoMatchError,
            "keeps: pattern 'head' matches none of the 4 targeted layers",
        ),
        (
            nothing,
            {"keep": 0.5, "ranks": {"*.up": 2}, "keeps": {"blocks.0.*": 0.2}},
            SettingError,
            r"'blocks.0.up' is given both a rank and a keep",
        ),
        (nothing, {"keep": 0.01}, SettingError, r"keep=0.01 leaves 6 of 640 .* least keep is 0.16"),
        (nothing, {"ranks": {"*": 11}}, SettingError, "must be from 1 to 10, got 11"),
        (nothing, {"ranks": {"*.up": 1}}, SettingError, "keep is missing: 2 of 4 layers"),
        (nothing, {}, SettingError, "keep is missing: give keep=, or ranks or keeps"),
        (nothing, {"keep": 0.5, "targets": ["head"], "shared": 3, "typo": 1}, TypeError, "typo"),
        (nothing, {"kep": 0.5}, TypeError, "compress has no option 'kep'; nearest: keep"),
    ],
)
def test_nothing_is_changed_when_anything_is_wrong(
    prepare: Callable[[Net], None], arguments: Any, error: type[Exception], message: str
) -> None:
    model = Net()
    prepare(model)
    before = copy.deepcopy(model)
    data = arguments.pop("data", None)
    with pytest.raises(error, match=message):
        compress(model, batches() if data is None else data, loss_of, **arguments)
    assert unchanged(model, before)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_loss_that_raises_leaves_the_model_as_it_was() -> None:
    model = Net().train()
    before = copy.deepcopy(model)

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        loss_of(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, batches(), fails, keep=0.5)
    assert unchanged(model, before)
    assert not any(m._forward_hooks for m in model.modules())


class Aside(nn.Module):
    """Calls a second layer whose output nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        self.layers[1](x)
        return self.layers[0](x)


def test_a_layer_that_the_loss_does_not_depend_on_is_missed_by_name() -> None:
    data = [torch.randn(6, 4)]
    with pytest.raises(ObservationError, match=r"'layers.1' needs output_moment, which was not"):
        compress(Aside(), data, lambda m, x: m(x).square().mean(), keep=0.5, align=1)
    with pytest.raises(ObservationError, match=r"'layers.0' needs output_moment, which was not"):
        compress(Aside(), data, lambda m, x: m(x).mean().detach(), keep=0.5, align=1)


def test_batches_whose_loss_is_not_finite_are_skipped_and_counted() -> None:
    model, data = Net(), batches()
    spoiled = a_batch()
    spoiled["x"][:] = torch.inf
    other = copy.deepcopy(model)
    record = compress(model, [data[0], spoiled, *data[1:]], loss_of, ranks={"*": 3})
    compress(other, data, loss_of, ranks={"*": 3})
    assert (record.observed["steps"], record.observed["skipped"]) == (3, 1)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.equal(two)


# Batches and masks


def tuple_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def test_batches_without_a_mask_must_say_so_where_layers_read_sequences() -> None:
    model, data = Net(), [tuple(batch.values()) for batch in batches()]
    before = copy.deepcopy(model)
    with pytest.raises(
        ObservationError,
        match=r"compress leaves padding out by .* mask=1: int64 \(8, 5\), .*; name another",
    ):
        compress(model, data, tuple_loss, keep=0.5)
    assert unchanged(model, before)
    record = compress(model, data, tuple_loss, keep=0.5, mask=None)
    assert record.observed["tokens"] == 3 * 8 * 5


def test_a_mask_and_the_examples_may_be_given_as_functions() -> None:
    model, data = Net(), batches()
    other, tuples = copy.deepcopy(model), [tuple(batch.values()) for batch in data]
    one = compress(model, data, loss_of, keep=0.5)
    two = compress(
        other, tuples, tuple_loss, keep=0.5, mask=lambda b: b[1], examples=lambda b: len(b[2])
    )
    assert one.layers == two.layers
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(q)


def test_vectors_need_no_mask() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    data = [(torch.randn(16, 8),) for _ in range(4)]
    record = compress(model, data, lambda m, b: m(b[0]).square().mean(), keep=0.5, align=1)
    assert record.keep <= 0.5


# Models


@each_method
def test_a_transformer_is_compressed_from_its_own_batches(method: str) -> None:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    model, data = BertForSequenceClassification(config), batches(2)
    for batch in data:
        del batch["x"]
        batch["input_ids"] = torch.randint(1, 30, batch["attention_mask"].shape)
    record = compress(
        model, data, lambda m, b: m(**b).loss, method=method, keep=0.4, align=1, allocation=None
    )
    assert len(record.layers) == 12
    assert record.keep <= 0.4
    assert model(**data[0]).loss.isfinite()
    assert len(Plan.of(model)) == sum(layer.rank is not None for layer in record.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_stays_in_it_and_is_factored_alike(dtype: torch.dtype) -> None:
    model, data = Net(), batches()
    other = copy.deepcopy(model).to(dtype)
    compress(model, data, loss_of, ranks={"*": 5})
    compress(other, data, loss_of, ranks={"*": 5})
    assert {p.dtype for p in other.parameters()} == {dtype}
    for name in NAMES:
        one, two = (m.get_submodule(name).weight.double() for m in (model, other))
        assert (one - two).norm() < 0.1 * one.norm()


def test_a_layer_used_in_two_places_is_factored_once_for_both() -> None:
    model, data = Net().eval(), batches()
    model.blocks[1]["up"] = model.blocks[0]["up"]
    record = compress(model, data, loss_of, ranks={"*": 3}, shared=True)
    assert [layer.name for layer in record.layers] == [NAMES[0], NAMES[1], NAMES[3]]
    assert model.blocks[1]["up"] is model.blocks[0]["up"]
    assert isinstance(model.blocks[0]["up"], LowRankLinear)


def test_a_head_tied_to_the_embedding_is_untied_and_both_go_on_training() -> None:
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    model, name = BertForMaskedLM(config).eval(), "cls.predictions.decoder"
    embedding = model.get_input_embeddings().weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ids = torch.randint(11, (2, 5))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    settings = Settings(method="svd", ranks={"*": 3}, targets=[name], shared=True)
    factor_(model, Statistics(), settings, optimizers=[optimizer])
    head = model.get_submodule(name)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in (embedding, head.left.weight, head.right.weight):
        assert id(p) in held
        assert p in optimizer.state
        before = p.detach().clone()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert not p.equal(before)


def test_a_model_whose_layers_are_all_square_keeps_its_outputs_at_a_high_rank() -> None:
    model = BertModel(
        BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    ).eval()
    ids = torch.randint(11, (4, 5))
    before = model(ids).last_hidden_state
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in name:
            module.weight.data = module.weight.data[:, :3] @ module.weight.data[:3]
    reference = model(ids).last_hidden_state
    compress(
        model, [ids], lambda m, b: m(b).last_hidden_state.square().mean(), ranks={"*": 3}, mask=None
    )
    torch.testing.assert_close(model(ids).last_hidden_state, reference, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(reference, before)


# Again


def test_factoring_again_truncates_the_product_of_the_factors() -> None:
    model, data = Net().eval(), batches()
    first = compress(model, data, loss_of, method="drone", ranks={"*": 6})
    plain = copy.deepcopy(model)
    for name in NAMES:
        module = plain.get_submodule(name)
        parent, _, child = name.rpartition(".")
        plain.get_submodule(parent)[child] = module.to_dense()
    record = compress(model, data, loss_of, method="drone", ranks={"*": 2})
    compress(plain, data, loss_of, method="drone", ranks={"*": 2})
    for name in NAMES:
        one, other = model.get_submodule(name), plain.get_submodule(name)
        assert one.rank == other.rank == 2
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-3, atol=1e-5)
    assert first.model_before == sum(p.numel() for p in Net().parameters())
    assert record.model_before == first.model_after != first.model_before
    assert [x.start for x in record.layers] == [x.after for x in first.layers]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_second_budget_never_raises_a_rank_and_is_used_up(allocation: str) -> None:
    model, data = Net().eval(), batches()
    compress(model, data, loss_of, ranks={"blocks.0.*": 1, "blocks.1.*": 6})
    record = compress(model, data, loss_of, keep=0.45, allocation=allocation, align=1)
    ranks = [layer.rank for layer in record.layers]
    assert ranks[:2] == [1, 1]
    assert sum(rank or 0 for rank in ranks) == int(0.45 * 640) // 26
    for more in ({"keep": 1.0}, {"ranks": {"*": 6}}, {"keeps": {"*": 1.0}}):
        again = compress(model, data, loss_of, allocation=allocation, **more)
        assert [layer.rank for layer in again.layers] == ranks


def test_optimizer_state_follows_the_second_time_as_defined() -> None:
    model, data = Net().eval(), batches()
    statistics = observed(model, data)
    names = ["blocks.0.up"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    moment = torch.zeros(16, WIDTH)
    for rank in (None, 5, 2):
        if rank is not None:
            settings = Settings(ranks={"*": rank}, targets=names, refit_bias=False)
            factor_(model, statistics, settings, optimizers=[optimizer])
            new = model.get_submodule(names[0])
            for p, expected in (
                (new.left.weight, moment @ new.right.weight.mT),
                (new.right.weight, new.left.weight.mT @ moment),
            ):
                found = optimizer.state[p]["momentum_buffer"]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        else:
            for batch in data:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
                moment = 0.9 * moment + model.get_submodule(names[0]).weight.grad  # type: ignore[operator]


@pytest.mark.parametrize(
    "failing", ["distributed_solve.broadcast_layers_", "factored_layers._set_factors_"]
)
def test_what_fails_in_the_middle_of_replacing_leaves_all_as_it_was(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name = failing.split(".")
    unit = getattr(lrcompress.engine, place)
    model, data = Net(), batches()
    named = [{"params": list(model.blocks.parameters()), "param_names": []}, model.head.weight]
    named[0]["param_names"] = [f"blocks.{name}" for name, _ in model.blocks.named_parameters()]
    optimizer = torch.optim.Adam([named[0], {"params": [named[1]], "param_names": ["head.weight"]}])
    loss_of(model, data[0]).backward()
    optimizer.step()
    before, held = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    parameters = dict(model.named_parameters())
    plain, calls = getattr(unit, name), itertools.count()

    def fails_late(*args: Any) -> Any:
        if name == "broadcast_layers_" or next(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(unit, name, fails_late)
    settings = Settings(keep=0.5, method="drone", targets=NAMES)
    statistics = observed(model, data, method="drone")
    with pytest.raises(KeyboardInterrupt):
        factor_(model, statistics, settings, optimizers=[optimizer])
    assert unchanged(model, before)
    assert dict(model.named_parameters()) == parameters
    assert str(optimizer.state_dict()) == str(held)
    assert set(optimizer.state) <= set(parameters.values())
    monkeypatch.undo()
    factor_(model, statistics, settings, optimizers=[optimizer])
    assert len(Plan.of(model)) == 4


def test_the_state_of_an_optimizer_that_trained_goes_on_training() -> None:
    model, data = Net(), batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    statistics = observed(model, data)
    losses = []
    for step in range(12):
        if step in (4, 8):
            settings = Settings(keep=0.6 if step == 4 else 0.4, align=1)
            factor_(model, statistics, settings, optimizers=[optimizer], step=step)
        optimizer.zero_grad()
        loss = loss_of(model.eval(), data[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert losses[-1] < losses[0]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "kfca"}, "method must be one of svd, .*; got 'kfca', nearest: kfac"),
        ({"keep": 30}, r"keep must be above 0 .* got 30; did you mean 0.3\?"),
        ({"keep": "0.3"}, r"keep must be above 0 .* got '0.3'"),
        ({"keeps": {"*.up": 0}}, r"keeps\['\*.up'\] must be above 0 and at most 1 .* got 0"),
        ({"ranks": {"*.up": 2.5}}, r"ranks\['\*.up'\] must be a whole number from 1, got 2.5"),
        ({"ranks": {"*.up": 0}}, r"ranks\['\*.up'\] must be a whole number from 1, got 0"),
        ({"ranks": {"*.up": True}}, r"ranks\['\*.up'\] must be a whole number from 1, got True"),
        ({"allocation": "even"}, "allocation must be one of uniform, global, got 'even'"),
        (
            {"method": "drone", "allocation": "global"},
            r"which method 'drone' does not know; use allocation='uniform', or one of row_fisher, "
            "kfac",
        ),
        ({"keep_range": (0.5, 0.1)}, r"keep_range must rise, got \(0.5, 0.1\)"),
        ({"keep_range": 0.5}, r"keep_range must be two shares from 0 to 1, got 0.5"),
        ({"keep_range": (0.1, 1.5)}, r"keep_range must be two shares from 0 to 1, got \(0.1, 1.5"),
        ({"keep_range": ("0", "1")}, r"keep_range must be two shares from 0 to 1, got \('0', '1'"),
        ({"shrink": (0.1,)}, r"shrink must be two shares from 0 to 1, got \(0.1,\)"),
        ({"shrink": (0.1, float("nan"))}, r"shrink must be two shares from 0 to 1, got \(0.1, nan"),
        ({"align": 0}, "align must be a whole number from 1, got 0"),
        ({"align": 2.0}, "align must be a whole number from 1, got 2.0"),
        ({"align": True}, "align must be a whole number from 1, got True"),
    ],
)
def test_a_setting_outside_what_it_may_be_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings(**settings)


def test_too_few_tokens_are_told_with_how_many_would_do() -> None:
    few, enough = ([torch.randn(one, 1, 8) for one in (count,)] for count in (31, 32))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    given: dict[str, Any] = {"keep": 0.5, "targets": ["*"], "mask": None, "align": 1}
    for method, told in (("kfac", True), ("drone", True), ("fwsvd", False)):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        note = compress(copy.deepcopy(model), few, loss, method=method, **given).note
        assert (note.startswith("31 tokens were observed of layers with up to 8 inputs")) == told
        assert (note.endswith("observe 64 or more")) == told
        assert compress(copy.deepcopy(model), enough, loss, method=method, **given).note == ""


@each_method
def test_ranks_are_shared_out_globally_where_the_metric_knows_the_loss(method: str) -> None:
    expected = "global" if METHODS[method].comparable else "uniform"
    assert Settings(method=method).spread == expected
    assert Settings(method=method, allocation="uniform").spread == "uniform"


def test_ranges_of_keep_bind_every_layer() -> None:
    record = compress(Net(), batches(), loss_of, keep=0.5, keep_range=(0.4, 0.6), align=1)
    for layer in record.layers:
        assert 0.4 <= layer.after / layer.before <= 0.6


# preview


@each_method
def test_a_preview_says_what_would_be_replaced_and_changes_nothing(method: str) -> None:
    model, data = Net(), batches()
    before = copy.deepcopy(model)
    settings = Settings(method=method, keep=0.5, allocation="uniform", exclude=["blocks.0.up"])
    layers, selection, nbytes = preview(model, settings)
    assert unchanged(model, before)
    assert selection.names == tuple(NAMES[1:])
    record = compress(
        model, data, loss_of, method=method, keep=0.5, allocation="uniform", exclude=["blocks.0.up"]
    )
    assert [(x.name, x.rank) for x in layers] == [(x.name, x.rank) for x in record.layers]
    if METHODS[method].kinds:
        assert nbytes == record.observed["bytes"]
    else:
        assert nbytes == 0


def test_a_preview_names_what_is_left_alone() -> None:
    model = Net()
    model.blocks[1]["up"] = model.blocks[0]["up"]
    _, selection, _ = preview(model, Settings(keep=0.5))
    assert "also used as 'blocks.1.up'" in selection.left_alone["blocks.0.up"]


def test_a_layer_that_cannot_be_factored_is_refused_by_name() -> None:
    with pytest.raises(LayerError, match=r"layer 'blocks.0.drop' is a Dropout; known layer types"):
        compress(Net(), batches(), loss_of, keep=0.5, targets=["blocks.0.drop"])


def test_notes_about_metrics_that_were_all_zero_are_in_the_record() -> None:
    model, data = Net(), batches()
    record: PointRecord = compress(
        model, data, lambda m, b: loss_of(m, b) * 0, ranks={"*": 3}, refit_bias=False
    )
    assert all(layer.note == "the output metric was all zero: identity" for layer in record.layers)
    assert record.predicted_loss == 0


@pytest.mark.parametrize("method", ["svd", "kfac", "kronecker"])
def test_a_solver_that_failed_at_first_is_told_in_the_record(
    method: str, fails_at_first: Callable[[str], list[Any]]
) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    batches = [torch.randn(40, 12)]
    fails_at_first("eigh")
    record = compress(
        model, batches, lambda model, x: model(x).square().mean(), method=method, keep=0.6,
        targets=["*"], mask=None, align=1, allocation="uniform",
    )  # fmt: skip
    first, second = record.layers
    assert "solved on the CPU, for the solver of its device failed" in first.note
    assert "failed" not in second.note
