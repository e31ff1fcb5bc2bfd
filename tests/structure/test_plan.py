"""The structure of a model as data: read, written, applied, and found in a state dict."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import (
    CheckpointError,
    LayerError,
    LRCompressError,
    NoMatchError,
    ShapeError,
)
from lrcompress.nn import KINDS, LowRankLinear, LowRankSparseLinear
from lrcompress.structure.plan import LayerPlan, Plan, restore_structure

PLAN = Plan(
    (
        LayerPlan("0", "low_rank", {"in": 8, "out": 6, "rank": 2}),
        LayerPlan("2.inner", "low_rank", {"in": 6, "out": 6, "rank": 3}),
    )
)

SPARSE = Plan(
    (
        LayerPlan("0", "low_rank_sparse", {"in": 8, "out": 6, "rank": 2, "rows": 3}),
        LayerPlan("2.inner", "low_rank_sparse", {"in": 6, "out": 6, "rank": 3, "rows": 6}),
    )
)


def dense() -> nn.Sequential:
    inner = nn.ModuleDict({"inner": Conv1D(6, 6), "plain": nn.Linear(6, 6)})
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), inner, nn.LayerNorm(6))


def factored() -> nn.Module:
    return PLAN.apply_(dense())


def sparse() -> nn.Module:
    """One layer compacted, its rows at the last outputs; one in the middle of pruning."""
    model = SPARSE.apply_(dense())
    compacted, pruned = (model.get_submodule(layer.name) for layer in SPARSE)
    assert isinstance(compacted, LowRankSparseLinear)
    assert isinstance(pruned, LowRankSparseLinear)
    compacted.index.copy_(torch.tensor([3, 4, 5]))
    pruned.prune_(torch.tensor([True, False, True, *[False, True] * 3]))
    return model


def structure(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def test_a_plan_gives_the_structure_it_names_and_is_read_back_from_it() -> None:
    model = dense()
    assert PLAN.apply_(model) is model
    assert Plan.of(model) == PLAN
    assert isinstance(model[0], LowRankLinear)
    assert structure(model)["2.inner.left.weight"] == (6, 3)
    assert isinstance(model[2].plain, nn.Linear)  # type: ignore[union-attr]


def test_a_plan_of_layers_with_rows_is_read_back_too() -> None:
    model = SPARSE.apply_(dense())
    assert Plan.of(model) == SPARSE == Plan.from_dict(json.loads(json.dumps(SPARSE.to_dict())))
    layers = list(model.modules())
    assert list(SPARSE.apply_(model).modules()) == layers
    assert structure(model)["0.inner.weight"] == (5, 8)
    assert Plan.of(Plan(SPARSE.layers[1:]).apply_(factored())).layers == (
        PLAN.layers[0],
        SPARSE.layers[1],
    )


def test_a_dense_model_has_an_empty_plan() -> None:
    assert Plan.of(dense()) == Plan()
    assert len(Plan()) == 0
    assert [layer.name for layer in PLAN] == ["0", "2.inner"]


def test_a_plan_comes_back_from_json() -> None:
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert PLAN.to_dict()["version"] == 1


def test_applying_a_plan_again_leaves_every_layer_as_it_is() -> None:
    model = factored()
    layers = list(model.modules())
    PLAN.apply_(model)
    assert list(model.modules()) == layers


def test_a_plan_of_low_rank_makes_a_narrow_layer_whole_again() -> None:
    sides = {"in": 8, "out": 6}
    low_rank = LayerPlan("0", "low_rank", sides | {"rank": 2})
    for kind, own in (("narrow", {}), ("narrow_low_rank", {"rank": 1})):
        narrow = LayerPlan("0", kind, sides | {"rows": 3, "columns": 5} | own)
        model = Plan((low_rank,)).apply_(Plan((narrow,)).apply_(dense()))
        assert Plan.of(model).layers == (low_rank,)
        assert structure(model)["0.left.weight"] == (6, 2)


def test_a_plan_changes_the_rank_of_factors() -> None:
    model = factored()
    lower = Plan((LayerPlan("0", "low_rank", {"in": 8, "out": 6, "rank": 1}),))
    lower.apply_(model)
    assert Plan.of(model).layers == (*lower.layers, PLAN.layers[1])


@pytest.mark.parametrize(("plan", "made"), [(PLAN, factored), (SPARSE, sparse)])
def test_a_plan_works_without_memory(plan: Plan, made: Any) -> None:
    with torch.device("meta"):
        model = dense()
    plan.apply_(model)
    assert Plan.of(model) == plan
    assert {p.device.type for p in model.parameters()} == {"meta"}
    filled = made()
    model.load_state_dict(filled.state_dict(), assign=True)
    assert same(model, filled)


@pytest.mark.parametrize("made", [factored, sparse])
def test_a_plan_goes_back_to_layers_of_the_type_that_stood_there(made: Any) -> None:
    model = made()
    weight = model.get_submodule("2.inner").weight
    back = Plan(tuple(LayerPlan(x.name, "dense", x.sizes) for x in PLAN))
    back.apply_(model)
    assert structure(model) == structure(dense())
    assert isinstance(model.get_submodule("2.inner"), Conv1D)
    torch.testing.assert_close(model.get_submodule("2.inner").weight.mT, weight)
    layers = list(model.modules())
    back.apply_(model)
    assert list(model.modules()) == layers, "dense layers are dense already"


RIGHT = {"in": 6, "out": 6, "rank": 2}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (LayerPlan("2.iner", "low_rank", RIGHT), NoMatchError, r"'2.iner', .* nearest: 2.inner"),
        (
            LayerPlan("3", "low_rank", RIGHT),
            LayerError,
            "layer '3' is a LayerNorm; known layer types",
        ),
        (
            LayerPlan("2.plain", "low_rank", {"in": 6, "out": 5, "rank": 2}),
            ShapeError,
            r"'2.plain' has sizes {'in': 6, 'out': 6}, the plan gives it {'in': 6, 'out': 5",
        ),
        (
            LayerPlan("2.plain", "low_rank", RIGHT | {"rank": 7}),
            ShapeError,
            r"'2.plain' of sizes .* cannot have rank 7; from 1 to 6 it could",
        ),
        (LayerPlan("2.plain", "low_rank", RIGHT | {"rank": 0}), ShapeError, "cannot have rank 0"),
        (LayerPlan("2.plain", "low_rank", {"in": 6, "out": 6}), ShapeError, "have rank None"),
        (LayerPlan("2.plain", "low_rank", {}), ShapeError, "the plan gives it {}"),
        (
            LayerPlan("2.plain", "low_rank_sparse", RIGHT | {"rank": 7, "rows": 1}),
            ShapeError,
            "cannot have rank 7; from 1 to 6 it could",
        ),
        (
            LayerPlan("2.plain", "low_rank_sparse", RIGHT | {"rows": 7}),
            ShapeError,
            r"'2.plain' of sizes .* cannot have rows 7; from 0 to 6 it could",
        ),
        (LayerPlan("2.plain", "low_rank_sparse", RIGHT), ShapeError, "cannot have rows None"),
        (
            LayerPlan("2.plain", "sparse", RIGHT),
            CheckpointError,
            "'2.plain' is of kind 'sparse'; known: low_rank, low_rank_sparse, .*dense",
        ),
    ],
)
def test_a_plan_that_is_wrong_anywhere_changes_nothing(
    wrong: LayerPlan, error: type[Exception], message: str
) -> None:
    model = dense()
    before, layers = copy.deepcopy(model), list(model.modules())
    with pytest.raises(error, match=message):
        Plan((*PLAN.layers, wrong)).apply_(model)
    assert list(model.modules()) == layers
    assert same(model, before)


ENTRY = {"name": "a", "kind": "low_rank", "sizes": {"in": 8, "out": 6, "rank": 2}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected a plan of version 1, got version None"),
        ({"version": 2, "layers": []}, "expected a plan of version 1, got version 2"),
        ({"version": 1}, "this is no plan: expected a list of layers, got None"),
        ({"version": 1, "layers": {}}, "this is no plan: expected a list of layers, got {}"),
        (
            {"version": 1, "layers": [ENTRY, ENTRY]},
            "this is no plan: it names layer 'a' more than once",
        ),
        *(
            ({"version": 1, "layers": [ENTRY, wrong]}, "name, kind and sizes of layer 1, such as ")
            for wrong in (
                3,
                {"name": "a"},
                ENTRY | {"sizes": [1]},
                ENTRY | {"sizes": {"in": "x"}},
                ENTRY | {"sizes": {"in": 2.5}},
                ENTRY | {"sizes": {"in": True}},
                ENTRY | {"name": None},
                ENTRY | {"tied": 3},
            )
        ),
    ],
)
def test_what_is_no_plan_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Plan.from_dict(data)


@pytest.mark.parametrize("have", [dense, factored, sparse])
@pytest.mark.parametrize("want", [dense, factored, sparse])
def test_a_state_says_what_has_to_change_before_it_fits(have: Any, want: Any) -> None:
    model, other = have(), want()
    plan = Plan.matching(model, other.state_dict())
    assert len(plan) == (0 if have is want else 2)
    plan.apply_(model)
    model.load_state_dict(other.state_dict())
    assert same(model, other)
    x = torch.randn(3, 8)
    assert model[0](x).equal(other[0](x))
    h = torch.randn(3, 6)
    torch.testing.assert_close(model[2].inner(h), other[2].inner(h))


def test_a_state_of_a_part_is_found_by_its_prefix() -> None:
    state = {f"model.{key}": value for key, value in factored().state_dict().items()}
    assert Plan.matching(dense(), state, "model.") == PLAN
    assert Plan.matching(dense(), state) == Plan()


def test_a_state_of_another_rank_changes_the_rank() -> None:
    model, other = factored(), dense()
    lower = Plan((LayerPlan("0", "low_rank", {"in": 8, "out": 6, "rank": 1}),))
    lower.apply_(other)
    assert Plan.matching(model, other.state_dict()).layers[0] == lower.layers[0]


@pytest.mark.parametrize("wrapped", [True, False], ids=["Lightning checkpoint", "state dict"])
@pytest.mark.parametrize("in_file", [True, False], ids=["path", "loaded"])
@pytest.mark.parametrize(
    ("have", "want"), [(dense, factored), (factored, dense), (dense, sparse), (sparse, dense)]
)
def test_a_model_takes_the_structure_of_a_checkpoint(
    wrapped: bool, in_file: bool, have: Any, want: Any, tmp_path: Path
) -> None:
    model, other = have(), want()
    checkpoint: Any = other.state_dict()
    if wrapped:
        checkpoint = {"state_dict": checkpoint, "epoch": 3}
    if in_file:
        torch.save(checkpoint, tmp_path / "last.ckpt")
        checkpoint = tmp_path / "last.ckpt"
    assert restore_structure(model, checkpoint) is model
    assert Plan.of(model) == Plan.of(other)
    model.load_state_dict(other.state_dict())
    assert same(model, other)
    x = torch.randn(300, 8)
    torch.testing.assert_close(model[0](x), other[0](x))


def test_a_state_of_other_rows_changes_the_rows() -> None:
    fewer = Plan((LayerPlan("0", "low_rank_sparse", {"in": 8, "out": 6, "rank": 2, "rows": 1}),))
    other = fewer.apply_(sparse())
    assert Plan.matching(sparse(), other.state_dict()) == fewer


def test_a_checkpoint_of_another_width_is_refused() -> None:
    state = factored().state_dict()
    state["0.left.weight"] = torch.zeros(7, 2)
    model = dense()
    with pytest.raises(ShapeError, match=r"'0' has sizes"):
        restore_structure(model, state)
    assert Plan.of(model) == Plan()


@pytest.mark.parametrize(
    ("stored", "shape"), [(torch.zeros(6, 2, 1), r"\(6, 2, 1\)"), ([1.0], r"\(\)")]
)
def test_factors_that_are_not_of_their_form_are_refused(stored: Any, shape: str) -> None:
    state = factored().state_dict() | {"0.left.weight": stored}
    told = rf"^0\.left\.weight must be a tensor with 2 axes, got shape {shape}$"
    with pytest.raises(CheckpointError, match=told):
        restore_structure(dense(), state)


def test_a_checkpoint_whose_state_is_no_mapping_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^state_dict must be a mapping, got list$"):
        restore_structure(dense(), {"state_dict": []})


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_a_checkpoint_that_would_run_code_is_not_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": Runs()}, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt asks for __builtin__\.print; only tensors"
    ):
        restore_structure(dense(), tmp_path / "last.ckpt")
    assert capsys.readouterr().out == ""


def test_a_gpt2_whose_attention_is_square_comes_back_untransposed() -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(5)[None]
    expected = model(ids).logits
    name = "transformer.h.0.attn.c_proj"
    Plan((LayerPlan(name, "low_rank", {"in": 8, "out": 8, "rank": 2}),)).apply_(model)
    assert not torch.allclose(model(ids).logits, expected)
    restore_structure(model, before)
    model.load_state_dict(before)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_distributed_checkpoint_says_its_structure_beside_its_shards(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no distributed checkpoint: it has no meta\.pt"):
        restore_structure(dense(), tmp_path)
    model = dense()
    for held in ({}, {"callbacks": {"Other{}": [1]}}, {"callbacks": {"Other{}": {"plan": 3}}}):
        torch.save(held, tmp_path / "meta.pt")
        with pytest.raises(CheckpointError, match=r"holds no plan, .*dcp_to_torch"):
            restore_structure(model, tmp_path)
    assert len(Plan.of(model)) == 0
    state = {"param_names": [], "plan": PLAN.to_dict()}
    torch.save({"callbacks": {"Factorize{}": state}}, tmp_path / "meta.pt")
    assert Plan.of(restore_structure(model, str(tmp_path))) == PLAN


# Properties

NAMES = st.text(max_size=4)
SIZES = st.dictionaries(NAMES, st.integers(0, 10**12), max_size=3)
LAYERS = st.builds(LayerPlan, NAMES, NAMES, SIZES, NAMES)
PLANS = st.builds(Plan, st.lists(LAYERS, unique_by=lambda x: x.name, max_size=4).map(tuple))
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.none()),
)


@given(PLANS)
def test_any_plan_that_was_written_is_read_back(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(PLANS, LAYERS, WRONG, st.data())
def test_a_plan_that_was_damaged_is_refused(
    plan: Plan, layer: LayerPlan, wrong: object, data: st.DataObject
) -> None:
    written = json.loads(json.dumps(Plan((*plan.layers, layer)).to_dict()))
    entry = written["layers"][-1]
    inside = entry["sizes"] if data.draw(st.booleans()) and entry["sizes"] else entry
    key = data.draw(st.sampled_from([key for key in inside if key != "tied"]))
    if inside is entry and data.draw(st.booleans()):
        del inside[key]
    else:
        inside[key] = wrong
    with pytest.raises(CheckpointError, match=rf"this is no plan: .* layer {len(plan)}"):
        Plan.from_dict(written)


@st.composite
def fitting_plans(draw: st.DrawFn) -> Plan:
    """Layers of :func:`dense`, of any kind that a linear layer can become, sizes within limits."""
    layers = []
    for name, sides in (("0", {"in": 8, "out": 6}), ("2.inner", {"in": 6, "out": 6})):
        kind = draw(st.sampled_from([x for x in KINDS.values() if x.can_replace(nn.Linear(1, 1))]))
        limits = kind.size_limits(sides)
        own = {size: draw(st.integers(*ends)) for size, ends in limits.items()}
        layers.append(LayerPlan(name, kind.kind, sides | own))
    return Plan(tuple(layers))


@settings(max_examples=10)
@given(fitting_plans(), fitting_plans())
def test_any_plan_is_applied_over_any_other_and_found_in_a_state_or_changes_nothing(
    before: Plan, plan: Plan
) -> None:
    model = dense()
    for wanted in (before, plan):
        have, layers = Plan.of(model), list(model.modules())
        try:
            wanted.apply_(model)
        except LRCompressError:
            assert Plan.of(model) == have
            assert list(model.modules()) == layers
        else:
            assert Plan.of(model) == wanted
            assert Plan.matching(dense(), model.state_dict()) == wanted
            assert Plan.matching(model, dense().state_dict()).apply_(model) is model
            assert structure(model) == structure(dense())
            wanted.apply_(model)
