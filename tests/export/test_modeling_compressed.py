"""The layers that are written beside the weights compute what this package's do."""

import pytest
import torch
from torch import nn

from lrcompress.export.modeling_compressed import LAYERS
from lrcompress.nn import LowRankLinear, PivotedLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["low_rank", "pivoted"])
def test_a_layer_computes_what_ours_does(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    ours: nn.Module = LowRankLinear(6, 5, rank=2, bias=bias)
    if kind == "pivoted":
        ours = PivotedLinear.of(ours)  # type: ignore[arg-type]
    written = LAYERS[kind]({"in": 6, "out": 5, "rank": 2}, bias)
    written.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 6)
    assert written(x).allclose(ours(x), atol=1e-6)
    assert written.weight.allclose(ours.weight, atol=1e-6)


def test_a_narrowed_layer_is_a_smaller_linear_one() -> None:
    sizes = {"in": 6, "out": 5, "rows": 3, "columns": 4}
    assert LAYERS["narrow"](sizes, True)(torch.zeros(2, 4)).shape == (2, 3)
