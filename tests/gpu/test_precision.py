"""Statistics and points under TF32 and real autocast are those of exact products."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.linalg import _sums_in_float32, add_gram_, for_gram, packed_shape, symmetric
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder

TOKENS, WIDTH = 4096, 512
# Sums over so many tokens in float32, relative to √(diagonal · diagonal); TF32 has 1e-4 and more.
CLOSE = 1e-5


def tokens(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Tokens as those of language models: one feature is massive, another constant."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 300 + x[:, 0]
    x[:, 1] = 1.1
    return x.to(device, dtype)


def gap(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error of a symmetric sum, each entry in units of its own."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    size = wanted.diagonal().clamp(min=1e-30).sqrt()
    return float(((found - wanted).abs() / (size[:, None] * size)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_outer_products_are_exact_whatever_precision_is_allowed(
    card: Any, dtype: torch.dtype
) -> None:
    torch.set_float32_matmul_precision("high")
    x = tokens(card.device, dtype)
    total = torch.zeros(packed_shape(WIDTH), device=card.device)
    add_gram_(total, for_gram(x), 0.5)
    exact = x.double().cpu()
    assert gap(symmetric(total), 0.25 * exact.mT @ exact) < CLOSE
    assert torch.get_float32_matmul_precision() == "high"


def test_tf32_is_seen_by_these_tests(card: Any) -> None:
    card.needs("cuda", why="only GPUs have TF32")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("GPUs have TF32 from compute capability 8.0 on")
    torch.set_float32_matmul_precision("high")
    x = tokens(card.device, torch.float32)
    assert gap(x.mT @ x, x.double().mT @ x.double()) > CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_as_it_is_where_sums_are_in_float32(
    card: Any, dtype: torch.dtype
) -> None:
    takes = card.real and hasattr(torch.ops.aten.addmm, "dtype")  # torch 2.8
    assert _sums_in_float32(card.device, dtype) is takes
    assert for_gram(tokens(card.device, dtype)).dtype == (dtype if takes else torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_statistics_of_a_step_are_the_sums_over_what_its_layers_read(
    card: Any, dtype: torch.dtype | None
) -> None:
    """The backward pass too runs within autocast, as under manual optimization."""
    torch.set_float32_matmul_precision("high")
    model = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, 64)).to(card.device)
    kinds = ("input_moment", "output_moment", "weighted_moment")
    recorder = Recorder(model, ["0", "2"], kinds)
    read, gave = {}, {}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            read[name] = args[0].detach()
            output.register_hook(lambda g: gave.__setitem__(name, g))

        return hook

    for name in ("0", "2"):
        model.get_submodule(name).register_forward_hook(see(name))
    x = tokens(card.device, torch.float32)
    with recorder.step(), torch.autocast(card.type, dtype, enabled=dtype is not None):
        (1e-3 * model(x).square().mean()).mul(1024).backward()
    for name in ("0", "2"):
        a, g = read[name].double().cpu(), gave[name].double().cpu()
        norm = g.norm(dim=1, keepdim=True)
        inputs = recorder.statistics.inputs[name]
        outputs = recorder.statistics.outputs[name]
        assert gap(inputs.moment("input_moment"), a.mT @ a) < CLOSE
        assert gap(outputs.moment("output_moment"), g.mT @ g) < CLOSE
        assert gap(outputs.moment("weighted_moment"), (norm * a).mT @ (norm * a)) < CLOSE
        rate = outputs.values["weight"].double().cpu() / norm.square().sum()
        assert float(rate) == pytest.approx(1, abs=CLOSE)


@pytest.mark.parametrize("method", ["kfac", "drone", "row_fisher", "kronecker"])
def test_a_point_is_the_same_whether_tf32_is_allowed_or_not(card: Any, method: str) -> None:
    model = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)]).to(card.device)
    recorder = Recorder(model, ["0", "1"], METHODS[method].kinds)
    with recorder.step():
        x = torch.randn(32, 16, 64, device=card.device)
        model[1](model[0](x).relu()).square().mean().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    ends = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        # together, so that the optimizer's parameters are those of the copied model
        one, trained = copy.deepcopy((model, optimizer))
        settings = Settings(method=method, keep=0.5, targets=["*"])
        factor_(one, copy.deepcopy(recorder.statistics), settings, optimizers=[trained])
        state = [x for held in trained.state.values() for x in held.values()]
        ends.append((one.state_dict(), state))
    assert ends[0][0].keys() == ends[1][0].keys() != model.state_dict().keys()
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)
