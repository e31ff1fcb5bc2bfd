"""Which shapes Kronecker factors get, and what a wrong one is told."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.compress import compress, preview
from lrcompress.engine.kronecker_shapes import check_layers, term_parameters
from lrcompress.engine.loss_curves import loss_curves
from lrcompress.engine.settings import Settings
from lrcompress.errors import LayerError, NoMatchError, SettingError, ShapeError
from lrcompress.export import merge_dense
from lrcompress.nn import KroneckerLinear
from lrcompress.pruning.budget import LoSparseBudget
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.selection import select

NAMES = ("0", "2")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 18))


def settings(**options: object) -> Settings:
    return Settings(**({"method": "kronecker", "keep": 0.6} | options))  # type: ignore[arg-type]


def batches(num: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(12, 12) * torch.logspace(0, 1, 12)
    return [torch.randn(16, 12) @ mix for _ in range(num)]


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean(1).mean()


def test_compress_gives_terms_by_keep_and_shapes_as_asked() -> None:
    net = model()
    record = compress(
        net, batches(), loss, method="kronecker", keep=0.6, shapes={"0": [8, 12]}, ranks={"0": 1}
    )
    one, two = net[0], net[2]
    assert isinstance(one, KroneckerLinear)
    assert isinstance(two, KroneckerLinear)
    assert (one.rank, one.first.shape) == (1, (1, 8, 12))
    whole = 12 * 24 + 24 * 18
    left = whole * 0.6 - one.first.numel() - one.second.numel()
    assert left - record.layers[1].unit < sum(p.numel() for p in two.factors) <= left
    assert record.keep <= 0.6
    assert [x.first for x in record.layers] == [tuple(x.first.shape[1:]) for x in (one, two)]


def test_the_recorded_error_is_that_of_the_layer_and_weighs_what_the_layer_does() -> None:
    """Beside the plain nearest product, the weighted one changes the output less."""
    plain, weighted = model(), model()
    dense, x = model(), torch.cat(batches())
    options = {"method": "kronecker", "keep": 0.6, "targets": ["0"], "shapes": {"0": [12, 6]}}
    record = compress(weighted, batches(), loss, **options, shrink=(0.0, 0.0))
    (layer,) = record.layers
    assert layer.error is not None
    assert layer.predicted_loss is not None
    assert layer.predicted_loss > 0

    nothing = [torch.zeros(24, 12)]  # of which no metric can be made
    compress(plain, nothing, lambda net, x: net(x).sum() * 0, **options)
    change = [(net(x) - dense(x)).square().sum() for net in (weighted, plain)]
    assert change[0] < change[1]


def test_where_no_terms_are_smaller_a_layer_stays_dense() -> None:
    net = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5))  # 5 has no divisors
    record = compress(net, batches(), loss, method="kronecker", keep=0.9, keeps={"1": 0.05})
    assert isinstance(net[0], KroneckerLinear)
    assert type(net[1]) is nn.Linear
    assert record.layers[1].rank is record.layers[1].first is None
    assert record.layers[1].error == 0
    assert term_parameters(None, (5, 24)) == 120


def test_merging_gives_a_plain_model_back() -> None:
    net = model()
    compress(net, batches(), loss, method="kronecker", keep=0.6)
    x = batches()[0]
    merged = merge_dense(copy.deepcopy(net))
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in merged)
    torch.testing.assert_close(merged(x), net(x))


def test_a_preview_says_shapes_and_changes_nothing() -> None:
    net = model()
    records, _, _ = preview(net, settings(shapes={"2": [9, 24]}))
    assert records[1].first == (9, 24)
    assert records[0].first is not None
    assert sum(x.after for x in records) <= 0.6 * sum(x.before for x in records)
    assert type(net[0]) is nn.Linear


def test_odd_layers_are_a_pattern() -> None:
    blocks = nn.ModuleDict(
        {"h": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(12))}
    )
    names = select(nn.ModuleDict({"model": blocks}), ["*.h.*[13579].*"]).names
    assert names == tuple(f"model.h.{i}.fc" for i in range(1, 12, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"shapes": {"0": [5, 4]}},
            ShapeError,
            r"shapes: layer '0': .*nearest that does is \[4, 4\]",
        ),
        (
            {"shapes": {"0": [5]}},
            SettingError,
            r"shapes\['0'\] must be two whole sizes from 1, got \[5\]",
        ),
        (
            {"shapes": {"0": "2x2"}},
            SettingError,
            r"shapes\['0'\] must be two whole sizes from 1, got '2x2'",
        ),
        ({"shapes": [2, 2]}, SettingError, r"sizes by pattern .*'\*.query'.*, got \[2, 2\]"),
        (
            {"shapes": {"0": [1, 1]}},
            SettingError,
            r"layer '0': a term of first factors \[1, 1\] takes \d+ parameters, expected at most",
        ),
        (
            {"shapes": {"0": [2, 2]}, "ranks": {"0": 99}},
            SettingError,
            r"layer '0': a term .* takes \d+ parameters, expected at most \d+ for 99 of them",
        ),
        ({"shapes": {"9": [2, 2]}}, NoMatchError, r"shapes: pattern '9' matches none"),
        ({"keep": None, "ranks": {"*": 2}}, SettingError, r"terms layer '0' gets.*give shapes="),
        ({"method": "svd", "shapes": {"0": [2, 2]}}, SettingError, r"method 'svd' does not have"),
        ({"allocation": "global"}, SettingError, r"ranks, which method 'kronecker' does not know"),
        ({"keep_measured": True}, SettingError, r"keep_measured measures low-rank factors"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_layers(model(), NAMES, settings(**options))


def test_others_that_need_low_rank_factors_say_so() -> None:
    net = model()
    with pytest.raises(SettingError, match=r"loss curve takes low-rank methods, svd.*'kronecker'"):
        loss_curves(net, Statistics(), Settings(method="svd", keep=0.5), ["svd", "kronecker"])
    with pytest.raises(SettingError, match=r"LoSparse starts from a low-rank split.*'kronecker'"):
        LoSparseBudget(keep=0.3, low_rank_share=0.5).check_method("kronecker")
    compress(net, batches(), loss, method="kronecker", keep=0.6)
    for method in ("kronecker", "svd"):
        with pytest.raises(LayerError, match=r"layer '0' is a sum of Kronecker products already"):
            check_layers(net, NAMES, settings(method=method))
