"""The guide's table of architectures and methods is what runs give."""

import pytest
import torch

import lrcompress
from lrcompress.errors import LayerError, ObservationError
from lrcompress.nn import LowRankLinear
from lrcompress.statistics.capture import Recorder
from lrcompress.structure.plan import Plan
from lrcompress.structure.selection import select

from .matrix import METHODS, cell, in_guide, table
from .models import MODELS, batch_for, made

FOUND: dict[tuple[str, str], tuple[str, str]] = {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", MODELS)
def test_each_method_trains_compresses_saves_and_reloads(architecture: str, method: str) -> None:
    FOUND[architecture, method] = cell(architecture, method)
    heads = tuple(f"| {architecture}{end} |" for end in ("", ", in part"))
    row = next(line for line in in_guide().splitlines() if line.startswith(heads))
    told = row.strip("| ").split(" | ")[1:][list(METHODS).index(method)]
    assert FOUND[architecture, method][0] == told, FOUND[architecture, method][1]


def test_the_table_in_the_guide_is_what_was_found() -> None:
    every = {(one, method) for one in MODELS for method in METHODS}
    if every > FOUND.keys():
        pytest.skip("only some of the cells were run")
    assert in_guide() == table(FOUND), "python -m tests.architectures.matrix"


@pytest.mark.parametrize("part", ["", ".down_proj"])
@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3-MoE"])
def test_experts_are_left_alone_and_refused_by_name(architecture: str, part: str) -> None:
    model = made(architecture)
    left = select(model).left_alone
    assert [*left] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    refused = (
        r"mlp.experts\S*' cannot be .* in 3-D parameters \(gate_up_proj, down_proj\), not in l"
    )
    for pattern in (f"model.layers.1.mlp.experts{part}", f"*.experts{part}"):
        with pytest.raises(LayerError, match=refused):
            select(model, [pattern])
    experts = "model.layers.0.mlp.experts"
    assert select(model, ["model.layers.0.*"]).left_alone.keys() == {experts}
    parts = {f"{experts}.{key}" for key in ("gate_up_proj", "down_proj")}
    assert select(model, ["model.layers.0.*_proj"]).left_alone.keys() == parts


def test_albert_is_factored_once_for_all_its_uses() -> None:
    model = made("ALBERT")
    batch = batch_for(model)
    with pytest.raises(ObservationError, match=r"query' was called twice in one .*shared=True"):
        lrcompress.compress(model, [batch], lambda m, b: m(**b).loss, keep=0.5)
    lrcompress.compress(model, [batch], lambda m, b: m(**b).loss, keep=0.5, shared=True, align=1)
    assert 4 <= len(Plan.of(model)) <= 6
    assert model.config.num_hidden_layers == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_torchs_fast_path_calls_factored_layers() -> None:
    model = made("`nn.TransformerEncoder`").eval()
    batch = batch_for(model)
    lrcompress.compress(model, [batch], lambda m, b: m(**b).loss, keep=0.4, align=1)
    factored = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    called: list[int] = []
    for layer in factored:  # not by hooks, with which torch takes the slow path anyway
        layer.right.forward = lambda x, f=layer.right.forward: called.append(1) or f(x)
    slow = model(**batch).logits
    assert len(called) == len(factored) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, slow, rtol=1e-4, atol=1e-5)
    assert len(called) == 2 * len(factored), "torch multiplied by their weights itself"


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fast_path_is_off_while_it_is_observed_without_gradients(padded: bool) -> None:
    """Its nested tensors have no lengths; the moments are those of the path with gradients."""
    model = made("`nn.TransformerEncoder`").eval()
    batch = batch_for(model)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    name, moments = "encoder.layers.1.linear2", []
    for grad in (True, False):
        recorder = Recorder(model, [name], ("input_moment",), forward_only=True)
        with torch.set_grad_enabled(grad), recorder.step(batch["attention_mask"]):
            model(**batch)
        assert torch.backends.mha.get_fastpath_enabled()
        assert recorder.statistics.tokens == int(batch["attention_mask"].sum())
        moments.append(recorder.statistics.of(name, ["input_moment"]).moment("input_moment"))
    torch.testing.assert_close(*moments)
    lrcompress.compress(model, [batch], lambda m, b: m(**b).loss, method="drone", keep=0.4, align=1)
