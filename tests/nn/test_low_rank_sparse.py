"""A low-rank layer with rows of its own behaves as the linear layer it replaces, pruned or not."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError, SettingError, ShapeError
from lrcompress.nn import LowRankLinear, LowRankSparseLinear
from lrcompress.statistics.views import view

IN, OUT, RANK = 6, 4, 2
MANY = 300  # tokens for which other forms of the product are faster than for a few
each_number_of_tokens = pytest.mark.parametrize("tokens", [3, 40, MANY])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def layer() -> LowRankSparseLinear:
    return LowRankSparseLinear(IN, OUT, RANK, OUT)


def mask(*alive: int, size: int = RANK + OUT) -> Tensor:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[list(alive)] = True
    return kept


def some_rows(num_rows: int, **options: Any) -> LowRankSparseLinear:
    """A layer whose rows stand at random outputs."""
    layer = LowRankSparseLinear(IN, OUT, RANK, num_rows, **options)
    layer.index.copy_(torch.randperm(OUT)[:num_rows].sort().values)
    return layer


def textbook(layer: LowRankSparseLinear, x: Tensor) -> Tensor:
    """``left (mask · right x) + scatter(mask · rows x) + bias``, written out."""
    y = (x @ layer.right.mT * layer.kept[: layer.rank]) @ layer.left.weight.mT
    for i, output in enumerate(layer.index.tolist()):
        added = nn.functional.one_hot(torch.tensor(output), layer.out_features)
        y = y + (x @ layer.rows[i] * layer.kept[layer.rank + i])[..., None] * added
    return y if layer.bias is None else y + layer.bias


def split(weight: Tensor, layer: LowRankSparseLinear) -> LowRankSparseLinear:
    """``W = left right + S``."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    with torch.no_grad():
        layer.left.weight.copy_(u[:, : layer.rank] * s[: layer.rank])
        layer.right.copy_(vh[: layer.rank])
        layer.rows.copy_(weight - layer.left.weight @ layer.right)
    return layer


# what it computes


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3), (0, 5), (2, 1, 3), (4, 80)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 3, OUT])
def test_computes_what_its_weight_and_bias_say_for_any_batch(
    batch: tuple[int, ...], bias: bool, num_rows: int
) -> None:
    layer = some_rows(num_rows, bias=bias)
    x = torch.randn(*batch, IN)
    assert layer(x).shape == (*batch, OUT)
    torch.testing.assert_close(layer(x), textbook(layer, x))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert (layer.bias is None) == (not bias)
    assert layer.weight.shape == (OUT, IN)


@pytest.mark.parametrize("old", [nn.Linear(IN, OUT), Conv1D(OUT, IN), nn.Linear(IN, OUT, False)])
@each_number_of_tokens
def test_a_dense_weight_split_into_two_parts_computes_the_same(old: nn.Module, tokens: int) -> None:
    new = split(view(old).weight, LowRankSparseLinear.in_place_of(old, RANK))
    x = torch.randn(tokens, IN)
    torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.weight, view(old).weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [IN - 1, 2 * IN])
def test_another_number_of_features_is_refused_as_by_a_linear_layer(
    layer: LowRankSparseLinear, features: int
) -> None:
    for tokens in (2, MANY):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
            layer(torch.zeros(tokens, features))


def test_gradients_are_those_of_the_product() -> None:
    for layer in (some_rows(3), some_rows(OUT), some_rows(0)):
        for tokens in (5, MANY):
            layer.zero_grad()
            x = torch.randn(tokens, IN, requires_grad=True)
            layer(x).square().sum().backward()
            got = [x.grad, *(p.grad for p in layer.parameters())]
            expected = torch.autograd.grad(
                textbook(layer, x).square().sum(), [x, *layer.parameters()]
            )
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_parts_are_views_of_one_matrix(layer: LowRankSparseLinear) -> None:
    with torch.no_grad():
        layer.right.fill_(1)
        layer.rows.fill_(2)
    assert layer.inner.weight.equal(torch.tensor([[1.0] * IN] * RANK + [[2.0] * IN] * OUT))
    assert view(layer).parameters == (layer.inner.weight, layer.left.weight)
    assert view(layer).shape == (OUT, IN)
    torch.testing.assert_close(view(layer).weight, layer.weight)


def test_state_keys_say_what_they_are() -> None:
    shapes = {key: tuple(value.shape) for key, value in some_rows(3).state_dict().items()}
    assert shapes == {
        "inner.weight": (RANK + 3, IN),
        "left.weight": (OUT, RANK),
        "left.bias": (OUT,),
        "index": (3,),
        "kept": (RANK + 3,),
    }


def test_says_its_sizes() -> None:
    assert f"in_features={IN}, out_features={OUT}, rank={RANK}, num_rows=3" in repr(some_rows(3))


@pytest.mark.parametrize(
    ("rank", "num_rows", "message"),
    [
        (0, 1, "rank must be at least 1, got 0"),
        (1, 5, "num_rows must be from 0 to 4 outputs, got 5"),
        (1, -1, "num_rows must be from 0 to 4 outputs, got -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(rank: int, num_rows: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        LowRankSparseLinear(IN, OUT, rank, num_rows)
    with pytest.raises(ShapeError, match=message):
        LowRankSparseLinear.in_place_of(nn.Linear(IN, OUT), rank, num_rows)


# what becomes of it


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("num_rows", [3, OUT])
@each_number_of_tokens
def test_moves_between_dtypes_as_a_whole(
    dtype: torch.dtype, pruned: bool, num_rows: int, tokens: int
) -> None:
    layer = some_rows(num_rows)
    if pruned:
        layer.prune_(mask(0, 1, 3, size=RANK + num_rows))
    x = torch.randn(tokens, IN)
    expected = layer(x)
    layer.to(dtype)
    assert layer.weight.dtype == layer(x.to(dtype)).dtype == dtype
    assert (layer.index.dtype, layer.kept.dtype) == (torch.int64, torch.bool)
    torch.testing.assert_close(layer(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("num_rows", [3, OUT])
@each_number_of_tokens
def test_follows_autocast(pruned: bool, num_rows: int, tokens: int) -> None:
    layer = some_rows(num_rows)
    if pruned:
        layer.prune_(mask(0, 1, 3, size=RANK + num_rows))
    x = torch.randn(tokens, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert layer.inner.weight.grad is not None
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pruned", [True, False])
def test_can_be_made_without_memory_and_filled_later(pruned: bool) -> None:
    layer = some_rows(3)
    if pruned:
        layer.prune_(mask(0, 3, size=RANK + 3))
    empty = LowRankSparseLinear(IN, OUT, RANK, 3, device="meta", dtype=torch.float16)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    assert {p.dtype for p in empty.parameters()} == {torch.float16}
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(MANY, IN)
    assert empty(x).equal(layer(x))
    again = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert again(x).equal(layer(x))


@each_number_of_tokens
def test_copies_pickles_and_state_dicts_are_as_pruned_as_it_is(tokens: int) -> None:
    layer = some_rows(3).prune_(mask(1, 2, 4, size=RANK + 3))
    x = torch.randn(tokens, IN)
    loaded = LowRankSparseLinear(IN, OUT, RANK, 3)
    loaded.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert again(x).equal(layer(x))
        with torch.no_grad():
            again.inner.weight.add_(1)  # were anything computed that is pruned, it would show
        torch.testing.assert_close(again(x), textbook(again, x), rtol=1e-5, atol=1e-5)
    whole = some_rows(3)
    loaded.load_state_dict(whole.state_dict())
    assert loaded(x).equal(whole(x))


@pytest.mark.parametrize("bias", [True, False])
def test_takes_the_place_of_a_linear_layer_with_its_bias_and_its_flags(bias: bool) -> None:
    old = nn.Linear(IN, OUT, bias=bias, dtype=torch.bfloat16).eval()
    old.weight.requires_grad_(False)
    new = LowRankSparseLinear.in_place_of(old, RANK)
    assert new.bias is old.bias
    assert not new.training
    assert not new.left.training
    assert {f.weight.dtype for f in (new.left, new.inner)} == {torch.bfloat16}
    assert not any(f.weight.requires_grad for f in (new.left, new.inner))
    assert (new.in_features, new.out_features, new.rank, new.num_rows) == (IN, OUT, RANK, OUT)
    assert new.index.equal(torch.arange(OUT))
    assert new.kept.all()
    assert LowRankSparseLinear.in_place_of(old, 1, 0).num_rows == 0


@pytest.mark.parametrize("sizes", [(IN, OUT), (IN, IN)])
def test_takes_the_place_of_a_conv1d_and_goes_back_to_one(sizes: tuple[int, int]) -> None:
    old = Conv1D(sizes[1], sizes[0])
    new = LowRankSparseLinear.in_place_of(old, RANK)
    x = torch.randn(2, 3, sizes[0])
    for layer in (
        new,
        LowRankSparseLinear.in_place_of(new, 1, 2),
        LowRankLinear.in_place_of(new, 1),
        LowRankSparseLinear.in_place_of(LowRankLinear.in_place_of(old, 1), 1),
        new.compacted(),
    ):
        assert (layer.in_features, layer.out_features) == sizes
        assert layer.bias is old.bias
        dense = layer.to_dense()
        assert isinstance(dense, Conv1D)
        torch.testing.assert_close(dense(x), layer(x))
        assert dense.weight.shape == old.weight.shape
        assert dense.weight.is_contiguous()


def test_refuses_the_place_of_what_is_not_linear() -> None:
    with pytest.raises(LayerError, match=r"layer is a Embedding; known .*LowRankSparseLinear"):
        LowRankSparseLinear.in_place_of(nn.Embedding(3, 2), 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_of_it_computes_the_same(bias: bool) -> None:
    layer = some_rows(3, bias=bias).eval().prune_(mask(0, 2, 4, size=RANK + 3))
    layer.left.weight.requires_grad_(False)
    dense = layer.to_dense()
    x = torch.randn(3, IN)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), layer(x))
    assert dense.bias is layer.bias
    assert not dense.training
    assert not dense.weight.requires_grad
    assert dense.weight.is_leaf
    empty = LowRankSparseLinear(IN, OUT, RANK, 3, device="meta").to_dense()
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize("where", ["linear1", "linear2", "self_attn.out_proj"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_a_torch_encoder_reads_it_as_a_dense_layer(where: str) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    parent, _, child = where.rpartition(".")
    layer = LowRankSparseLinear.in_place_of(model.get_submodule(where), RANK)
    setattr(model.get_submodule(parent), child, layer)
    x = torch.randn(2, 5, 8)
    slow = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)


# pruning


def each_mask() -> list[Tensor]:
    """Every choice of components that leaves a rank."""
    whole = torch.tensor(list(range(2 ** (RANK + OUT))))
    bits = (whole[:, None] >> torch.arange(RANK + OUT)) & 1
    return [row for row in bits.bool() if row[:RANK].any()]


def filled(layer: LowRankSparseLinear) -> LowRankSparseLinear:
    """The layer with weights where it is pruned, which must not matter."""
    with torch.no_grad():
        layer.inner.weight.masked_fill_(~layer.kept[:, None], 7)
    return layer


@each_number_of_tokens
def test_a_pruned_layer_its_weight_and_its_compacted_one_are_the_same_map(tokens: int) -> None:
    x = torch.randn(tokens, IN)
    for kept in each_mask():
        layer = LowRankSparseLinear(IN, OUT, RANK, OUT).prune_(kept)
        explicit = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), explicit)
        small = layer.compacted()
        torch.testing.assert_close(small(x), explicit)
        torch.testing.assert_close(small.weight, layer.weight)
        torch.testing.assert_close(filled(layer)(x), explicit)
        num_rows = int(kept[RANK:].sum())
        assert small.bias is layer.bias
        assert small.rank == int(kept[:RANK].sum())
        if num_rows:
            assert isinstance(small, LowRankSparseLinear)
            assert small.index.equal(kept[RANK:].nonzero().squeeze(1))
            assert small.kept.all()
        else:
            assert isinstance(small, LowRankLinear)


def test_compacting_again_keeps_track_of_the_outputs() -> None:
    layer = LowRankSparseLinear(IN, OUT, RANK, OUT).prune_(mask(0, 1, 3, 4, 5)).compacted()
    assert isinstance(layer, LowRankSparseLinear)
    layer.prune_(mask(0, 2, 4, size=RANK + 3))
    again = layer.compacted()
    assert isinstance(again, LowRankSparseLinear)
    assert again.index.tolist() == [1, 3]
    torch.testing.assert_close(again.weight, layer.weight)


@each_number_of_tokens
@pytest.mark.parametrize("num_rows", [3, OUT])
def test_gradients_are_zero_where_it_is_pruned_and_right_elsewhere(
    tokens: int, num_rows: int
) -> None:
    x = torch.randn(tokens, IN, requires_grad=True)
    for alive in ([0, 1, 2, 3], [1, 4], [0]):
        layer = filled(some_rows(num_rows).prune_(mask(*alive, size=RANK + num_rows)))
        expected = torch.autograd.grad(textbook(layer, x).square().sum(), [x, *layer.parameters()])
        got = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
        assert got[1][~layer.kept].eq(0).all()
        assert got[2][:, ~layer.kept[:RANK]].eq(0).all()


@each_number_of_tokens
def test_an_optimizer_that_has_forgotten_them_leaves_pruned_weights_at_zero(tokens: int) -> None:
    layer = LowRankSparseLinear(IN, OUT, RANK, OUT)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        layer(torch.randn(tokens, IN)).square().sum().backward()
        optimizer.step()

    step()
    kept = mask(1, 3, 4)
    layer.prune_(kept)
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[layer.inner.weight][key][~kept] = 0
        optimizer.state[layer.left.weight][key][:, ~kept[:RANK]] = 0
    before = layer.inner.weight.detach().clone()
    for _ in range(3):
        step()
    assert layer.inner.weight[~kept].eq(0).all()
    assert layer.left.weight[:, ~kept[:RANK]].eq(0).all()
    assert layer.inner.weight[kept].ne(before[kept]).all()


def test_what_is_pruned_stays_pruned_until_it_is_revived(layer: LowRankSparseLinear) -> None:
    kept = layer.kept
    assert layer.prune_(mask(0, 2, 3)) is layer
    layer.prune_(mask(0, 1, 2, 4))
    assert layer.kept.equal(mask(0, 2))
    assert layer.kept is kept
    assert layer.inner.weight[~layer.kept].eq(0).all()
    assert layer.left.weight[:, 1].eq(0).all()
    assert layer.revive_(mask(1, 4)) is layer
    assert layer.kept.equal(mask(0, 1, 2, 4))
    x = torch.randn(3, IN)
    before = layer(x)
    with torch.no_grad():
        layer.rows[2].fill_(1)
    torch.testing.assert_close(layer(x)[:, 2], before[:, 2] + x.sum(1))
    layer.revive_(torch.ones(RANK + OUT, dtype=torch.bool))
    torch.testing.assert_close(layer(x), textbook(layer, x))


def test_a_mask_that_does_not_fit_or_leaves_no_rank_changes_nothing(
    layer: LowRankSparseLinear,
) -> None:
    before = copy.deepcopy(layer.state_dict())
    message = r"bool tensor of 2 ranks and 4 rows, shape \(6,\); got torch.bool, \(5,\)"
    for change in (layer.prune_, layer.revive_):
        with pytest.raises(ShapeError, match=message):
            change(mask(0, size=5))
        with pytest.raises(ShapeError, match=r"got torch.float32, \(6,\)"):
            change(torch.ones(6))
    with pytest.raises(ShapeError, match=r"got torch.bool, \(5,\)"):
        layer.output_of(mask(0, size=5), torch.zeros(IN))
    with pytest.raises(SettingError, match="all 2 ranks would be pruned; keep at least one"):
        layer.prune_(mask(2, 3))
    layer.prune_(mask(0, 2))
    with pytest.raises(SettingError, match="all 2 ranks would be pruned"):
        layer.prune_(mask(1, 2))
    layer.revive_(mask(1, 3, 4, 5))
    assert layer.state_dict().keys() == before.keys()
    assert layer.kept.all()
    assert layer.left.weight[:, 0].equal(before["left.weight"][:, 0])


def test_outputs_of_components_add_up_to_the_whole() -> None:
    layer = some_rows(3)
    x = torch.randn(2, 5, IN)
    assert layer.bias is not None
    one, other = mask(0, 3, size=RANK + 3), mask(1, 2, 4, size=RANK + 3)
    total = layer.output_of(one, x) + layer.output_of(other, x) + layer.bias
    torch.testing.assert_close(total, layer(x))
    torch.testing.assert_close(layer.prune_(one)(x), layer.output_of(one, x) + layer.bias)


# compiled and exported


@pytest.fixture
def counters() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("num_rows", [0, 3, OUT])
def test_a_mask_that_changes_does_not_recompile(counters: Any, num_rows: int) -> None:
    layer = some_rows(num_rows)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(5, IN)
    for alive in ([*range(RANK + num_rows)], [0, 1], [1]):
        layer.prune_(mask(*alive, size=RANK + num_rows))
        filled(layer)
        layer.zero_grad()
        torch.testing.assert_close(compiled(x), textbook(layer, x))
        compiled(x).square().sum().backward()
        assert layer.inner.weight.grad is not None
        assert layer.left.weight.grad is not None
        assert layer.inner.weight.grad[~layer.kept].eq(0).all()
        assert layer.left.weight.grad[:, ~layer.kept[:RANK]].eq(0).all()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("num_rows", "pruned"), [(0, False), (3, False), (3, True), (OUT, False)])
def test_exports_for_any_batch_and_length(num_rows: int, pruned: bool) -> None:
    layer = some_rows(num_rows).eval()
    if pruned:
        layer.prune_(mask(0, RANK + num_rows - 1, size=RANK + num_rows))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (torch.randn(2, 5, IN),), dynamic_shapes=(dims,))
    for module in (exported.module(), exported.run_decompositions().module()):
        for batch in ((2, 5), (3, 200)):
            x = torch.randn(*batch, IN)
            torch.testing.assert_close(module(x), layer(x))


@pytest.mark.parametrize("num_rows", [0, 3, OUT])
@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx(num_rows: int) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="ONNX is not a dependency")
    layer = some_rows(num_rows).eval()
    x = torch.randn(2, 5, IN)
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=dims, verbose=False)
    assert program is not None
    pytest.importorskip("onnxruntime")
    for other in (x, torch.randn(3, 7, IN)):
        torch.testing.assert_close(program(other)[0], layer(other), rtol=1e-5, atol=1e-5)
