"""Layers are exchanged; what an optimizer remembers goes on as if it had been so."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.errors import NoMatchError
from lrcompress.nn import LowRankLinear, LowRankSparseLinear
from lrcompress.statistics.views import view
from lrcompress.structure.surgery import (
    carry_dense,
    carry_factors,
    carry_kept,
    carry_sparse,
    replace_,
    swap_parameters_,
    unknown_state,
)

from .test_selection import Model

OUT, IN, RANK = 5, 7, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# replace_


def test_a_layer_is_replaced_wherever_it_stands() -> None:
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    model.again = model.blocks[0]
    model.blocks[1].twice = model.blocks[0].up
    old, new = model.blocks[0].up, nn.Linear(4, 6)
    replace_(model, "blocks.0.up", new)
    assert model.again.up is model.blocks[1].up is model.blocks[1].twice is new
    assert old not in list(model.modules())


def test_replacing_what_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(NoMatchError, match=r"no layer 'blocks.0.upp'; nearest names: blocks.0.up"):
        replace_(Model(), "blocks.0.upp", nn.Linear(4, 6))


# Optimizer state

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, dampening=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-6),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-6, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-6, initial_accumulator_value=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-6, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-6),
}
UNKNOWN: dict[str, Callable[[Any], Optimizer]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-6),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-6),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-6),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-6),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def stepped(optimizer: Optimizer, gradients: Sequence[dict[nn.Parameter, Tensor]]) -> Optimizer:
    for step in gradients:
        for p, grad in step.items():
            p.grad = grad.to(p)
        optimizer.step()
    return optimizer


def first_moments(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    linear = ("exp_avg", "momentum_buffer", "grad_avg")
    return {k: v for k, v in optimizer.state[p].items() if k in linear}


@each_optimizer
@pytest.mark.parametrize("transposed", [False, True])
def test_first_moments_are_those_the_factors_would_have_gathered(
    make: Any, transposed: bool
) -> None:
    left, right = parameter(OUT, RANK), parameter(RANK, IN)
    weight = parameter(*((IN, OUT) if transposed else (OUT, IN)))
    grads = [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(4)]
    l0, r0 = left.detach().clone(), right.detach().clone()

    dense = stepped(make([weight]), [{weight: g.mT if transposed else g} for g in grads])
    swap_parameters_([dense], [weight], [right, left], carry_dense(l0, r0, transposed))
    apart = stepped(make([right, left]), [{right: l0.mT @ g, left: g @ r0.mT} for g in grads])

    for p in (left, right):
        carried, gathered = first_moments(dense, p), first_moments(apart, p)
        assert carried.keys() == gathered.keys()
        for key in carried:
            if (key, make) != ("momentum_buffer", OPTIMIZERS["rmsprop"]):
                torch.testing.assert_close(carried[key], gathered[key])
        assert dense.state[p].keys() == apart.state[p].keys()
        if "step" in dense.state[p]:
            assert dense.state[p]["step"] == 4


@each_optimizer
def test_second_moments_are_exact_for_gradients_that_meet_one_entry_at_a_time(make: Any) -> None:
    left, right, weight = parameter(OUT, RANK), parameter(RANK, IN), parameter(OUT, IN)
    l0, r0 = left.detach().clone(), right.detach().clone()
    grads = []
    for _ in range(4):
        grad = torch.zeros(OUT, IN, dtype=torch.float64)
        grad[torch.randint(OUT, ()), torch.randint(IN, ())] = torch.randn(())
        grads.append(grad)
    dense = stepped(make([weight]), [{weight: g} for g in grads])
    swap_parameters_([dense], [weight], [right, left], carry_dense(l0, r0, False))
    apart = stepped(make([right, left]), [{right: l0.mT @ g, left: g @ r0.mT} for g in grads])
    for p in (left, right):
        for key in ("exp_avg_sq", "square_avg", "sum"):
            if key in dense.state[p]:
                torch.testing.assert_close(dense.state[p][key], apart.state[p][key])
                assert (dense.state[p][key] >= 0).all()


@each_optimizer
def test_first_moments_of_factors_go_over_to_a_truncation_of_them(make: Any) -> None:
    left, right = parameter(OUT, RANK), parameter(RANK, IN)
    l0, r0 = left.detach().clone(), right.detach().clone()
    t, s = (torch.randn(a, b, dtype=torch.float64) for a, b in ((RANK, 2), (2, RANK)))
    less = [parameter(2, IN), parameter(OUT, 2)]
    new = (l0 @ t, s @ r0)
    grads = [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(4)]

    held = stepped(make([right, left]), [{right: l0.mT @ g, left: g @ r0.mT} for g in grads])
    swap_parameters_([held], [right, left], less, carry_factors((l0, r0), new))
    apart = stepped(make(less), [{less[0]: new[0].mT @ g, less[1]: g @ new[1].mT} for g in grads])
    for p in less:
        carried, gathered = first_moments(held, p), first_moments(apart, p)
        assert carried.keys() == gathered.keys()
        for key in carried:
            if (key, make) != ("momentum_buffer", OPTIMIZERS["rmsprop"]):
                torch.testing.assert_close(carried[key], gathered[key])
        for key in ("exp_avg_sq", "square_avg", "sum"):
            if key in held.state[p]:
                assert (held.state[p][key] >= 0).all()


@each_optimizer
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sparse_part_remembers_all_that_the_weight_did(make: Any, transposed: bool) -> None:
    left, right = parameter(OUT, RANK), parameter(RANK, IN)
    weight = parameter(*((IN, OUT) if transposed else (OUT, IN)))
    split, alone, factors = (
        [parameter(n, IN), parameter(OUT, RANK)] for n in (RANK + OUT, RANK, RANK)
    )
    grads = [torch.randn(weight.shape, dtype=torch.float64) for _ in range(4)]
    made = [stepped(make([weight]), [{weight: g} for g in grads]) for _ in range(3)]
    before = dict(made[0].state[weight])
    swap_parameters_([made[0]], [weight], split, carry_sparse(left, right, transposed))
    swap_parameters_([made[1]], [weight], alone, carry_sparse(left, right, transposed, rows=False))
    swap_parameters_([made[2]], [weight], factors, carry_dense(left, right, transposed))
    for key, value in before.items():
        inner, low, plain = (
            o.state[new[0]][key] for o, new in zip(made, (split, alone, factors), strict=True)
        )
        if isinstance(value, Tensor) and value.ndim:
            assert inner[RANK:].equal(value.mT if transposed else value)
            assert inner[:RANK].equal(low)
        assert torch.as_tensor(low).equal(torch.as_tensor(plain))
        assert torch.as_tensor(made[0].state[split[1]][key]).equal(
            torch.as_tensor(made[2].state[factors[1]][key])
        )


@each_optimizer
@pytest.mark.parametrize("alive", [[0, 2, 4, 6], [1, 3], [0, 1]])
def test_a_compacted_layer_trains_as_the_pruned_one_would_have(make: Any, alive: Any) -> None:
    layer = LowRankSparseLinear(IN, OUT, RANK, OUT, dtype=torch.float64)
    optimizer = make(list(layer.parameters()))

    def train(layer: nn.Module, optimizer: Optimizer) -> None:
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, IN, generator=torch.manual_seed(step), dtype=torch.float64)
            layer(x).square().sum().backward()
            optimizer.step()

    train(layer, optimizer)
    layer.prune_(torch.isin(torch.arange(RANK + OUT), torch.tensor(alive)))
    train(layer, optimizer)
    pruned, going_on = copy.deepcopy((layer, optimizer))
    before = layer.weight.detach()
    new = layer.compacted()
    assert isinstance(new, LowRankLinear) == (max(alive) < RANK)
    old = view(layer).parameters
    swap_parameters_([optimizer], old, view(new).parameters, carry_kept(layer))
    assert all(p in optimizer.state for p in view(new).parameters)
    train(pruned, going_on)
    train(new, optimizer)
    torch.testing.assert_close(new.weight - before, pruned.weight - before, rtol=1e-6, atol=1e-12)


class Trained:
    """A small model in the hands of an optimizer and a scheduler, some steps in."""

    def __init__(self, make: Any = OPTIMIZERS["adam"], *, named: bool = False) -> None:
        self.model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT), nn.Linear(OUT, 2))
        named_parameters = list(self.model.named_parameters())
        split = [
            [(n, p) for n, p in named_parameters if (p.ndim > 1) == matrix] for matrix in (1, 0)
        ]
        groups = [
            {"params": held if named else [p for _, p in held], "lr": lr}
            for held, lr in zip(split, (1e-3, 1e-2), strict=True)
        ]
        self.optimizer = make(groups)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.train(3)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, IN)).square().sum().backward()
            self.optimizer.step()
        self.scheduler.step()

    def factor(self, index: int = 1, rank: int = 2) -> LowRankLinear:
        old = self.model[index]
        new = LowRankLinear.in_place_of(old, rank)
        before = [new.left.weight.detach(), new.right.weight.detach()]
        held = [old.right.weight, old.left.weight] if hasattr(old, "left") else [old.weight]
        carry = carry_dense(*before, False)
        if len(held) > 1:
            carry = carry_factors((held[1].detach(), held[0].detach()), (before[0], before[1]))
        replace_(self.model, str(index), new)
        swap_parameters_([self.optimizer], held, [new.right.weight, new.left.weight], carry)
        return new


@pytest.mark.parametrize("make", (OPTIMIZERS | UNKNOWN).values(), ids=OPTIMIZERS | UNKNOWN)
def test_training_goes_on_with_the_factors_where_the_weight_stood(make: Any) -> None:
    run = Trained(make)
    optimizer, groups, rates = run.optimizer, run.optimizer.param_groups, [5e-4, 5e-3]
    new = run.factor()
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    assert run.optimizer.param_groups is groups
    matrices = [run.model[0].weight, new.right.weight, new.left.weight, run.model[2].weight]
    assert all(a is b for a, b in zip(groups[0]["params"], matrices, strict=True))
    assert len(groups[1]["params"]) == 3

    before = copy.deepcopy(run.model.state_dict())
    run.train(2)
    assert [group["lr"] for group in groups] == pytest.approx([rate / 2 for rate in rates])
    assert all(not value.equal(before[key]) for key, value in run.model.state_dict().items())
    fresh = make([{"params": list(g["params"])} for g in groups])
    fresh.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 7


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_state_of_an_unknown_kind_is_dropped(make: Any) -> None:
    run = Trained(make)
    new = run.factor()
    assert new.left.weight not in run.optimizer.state
    assert run.model[0].weight in run.optimizer.state


@pytest.mark.parametrize("make", (OPTIMIZERS | UNKNOWN).values(), ids=OPTIMIZERS | UNKNOWN)
def test_state_that_will_be_dropped_is_named(make: Any) -> None:
    run = Trained(make)
    assert unknown_state(make(run.model.parameters()), run.model.parameters()) == []
    named, held = unknown_state(run.optimizer, [run.model[1].weight]), len(run.optimizer.state)
    assert set(named) <= run.optimizer.state[run.model[1].weight].keys()
    new = run.factor()
    assert bool(named) == (held > 0 and new.left.weight not in run.optimizer.state)


class Strange(torch.optim.SGD):
    """Keeps a list, a tensor of one entry and a word, beside what is known."""

    extra: Any = None

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"exp_avg": p.grad.clone(), "count": torch.ones(1)} | self.extra
        return result


@pytest.mark.parametrize(
    ("extra", "carried"),
    [({"word": "a", "none": None}, True), ({"list": [1]}, False), ({"rows": torch.ones(5)}, False)],
)
def test_plain_values_are_copied_and_others_dropped(extra: Any, carried: bool) -> None:
    Strange.extra = extra
    run = Trained(lambda groups: Strange(groups, lr=0.1))
    named = unknown_state(run.optimizer, [run.model[1].weight])
    assert named == ([] if carried else list(extra))
    new = run.factor()
    assert (new.left.weight in run.optimizer.state) == carried
    if carried:
        state = run.optimizer.state[new.left.weight]
        assert state.keys() >= {"exp_avg", "count", "word", "none"}
        assert state["count"] is not run.optimizer.state[new.right.weight]["count"]


def test_factors_of_which_one_has_no_state_start_afresh() -> None:
    run = Trained()
    new = run.factor()
    del run.optimizer.state[new.left.weight]
    lower = run.factor(rank=1)
    assert lower.left.weight not in run.optimizer.state
    assert lower.right.weight not in run.optimizer.state
    run.train(1)


def test_an_optimizer_that_has_taken_no_step_has_nothing_to_carry() -> None:
    weight, right, left = parameter(OUT, IN), parameter(RANK, IN), parameter(OUT, RANK)
    optimizer = torch.optim.Adam([weight])
    swap_parameters_([optimizer], [weight], [right, left], carry_dense(left, right, False))
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"] == [right, left]


def test_names_of_parameters_follow() -> None:
    run = Trained(named=True)
    run.factor()
    names = ["0.weight", "1.right.weight", "1.left.weight", "2.weight"]
    assert run.optimizer.param_groups[0]["param_names"] == names
    run.factor(rank=1)
    assert run.optimizer.param_groups[0]["param_names"] == names
    assert run.optimizer.param_groups[1]["param_names"] == ["0.bias", "1.left.bias", "2.bias"]
    parameters = dict(run.model.named_parameters())
    for group in run.optimizer.param_groups:
        for p, name in zip(group["params"], group["param_names"], strict=True):
            assert parameters[name] is p
    run.train(1)


def test_names_of_parameters_follow_to_a_sparse_part_and_back() -> None:
    run = Trained(named=True)
    inner, right = ["inner.weight", "left.weight"], ["right.weight", "left.weight"]
    for make, names in (
        (lambda old: LowRankSparseLinear.in_place_of(old, 2), inner),
        (lambda old: LowRankSparseLinear.in_place_of(old, 1, 3), inner),
        (lambda old: LowRankLinear.in_place_of(old, 1), right),
        (lambda old: old.to_dense(), ["weight"]),
        (lambda old: LowRankSparseLinear.in_place_of(old, 1), inner),
        (lambda old: old.to_dense(), None),
    ):
        old = run.model[1]
        new = make(old)
        replace_(run.model, "1", new)
        now = view(new).parameters
        swap_parameters_([run.optimizer], view(old).parameters, now, None, names=names)
        assert not any(p in run.optimizer.state for p in now)
        matrices, biases = run.optimizer.param_groups
        wanted = ["0.weight", *[f"1.{name}" for name in names or ["weight"]], "2.weight"]
        assert matrices["param_names"] == wanted
        assert biases["param_names"][1] == ("1.left.bias" if len(now) > 1 else "1.bias")
        parameters = dict(run.model.named_parameters())
        for group in (matrices, biases):
            for p, name in zip(group["params"], group["param_names"], strict=True):
                assert parameters[name] is p
        run.train(1)
        assert all(p in run.optimizer.state for p in now)


@pytest.mark.parametrize("fits", [True, False])
def test_a_weight_takes_the_place_of_factors_with_the_state_that_fits_it(fits: bool) -> None:
    layer = LowRankSparseLinear(IN, OUT, RANK, OUT)
    weight = nn.Parameter(layer.weight.detach())
    optimizer = torch.optim.Adam([*layer.parameters()])
    layer(torch.randn(4, IN)).square().sum().backward()
    optimizer.step()
    rows = optimizer.state[layer.inner.weight]["exp_avg"][RANK:].clone()

    def carry(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
        return [state[0][RANK:]]

    old = view(layer).parameters
    swap_parameters_([optimizer], old, [weight], carry if fits else carry_kept(layer))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(weight), id(layer.bias)}
    assert len(optimizer.state) == 1 + fits
    if fits:
        assert optimizer.state[weight]["exp_avg"].equal(rows)
        assert optimizer.state[weight]["step"] == 1


def test_factors_in_different_groups_stay_there() -> None:
    left, right, less = (
        parameter(OUT, RANK),
        parameter(RANK, IN),
        [parameter(2, IN), parameter(OUT, 2)],
    )
    optimizer = torch.optim.SGD([{"params": [left], "lr": 1.0}, {"params": [right], "lr": 2.0}])
    carry = carry_factors((left.detach(), right.detach()), (less[1].detach(), less[0].detach()))
    swap_parameters_([optimizer], [right, left], less, carry)
    assert [group["params"] for group in optimizer.param_groups] == [[less[1]], [less[0]]]


def test_every_optimizer_that_holds_the_weight_follows_and_others_are_left_alone() -> None:
    weight, right, left, other = (
        parameter(*s) for s in ((OUT, IN), (RANK, IN), (OUT, RANK), (2, 2))
    )
    holding = [torch.optim.SGD([other, weight], momentum=0.9, lr=1e-3) for _ in range(2)]
    without = torch.optim.Adam([other])
    for optimizer in (*holding, without):
        stepped(optimizer, [{weight: torch.randn(OUT, IN), other: torch.randn(2, 2)}])
    swap_parameters_([*holding, without], [weight], [right, left], carry_dense(left, right, False))
    for optimizer in holding:
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(other),
            id(right),
            id(left),
        ]
        assert optimizer.state.keys() == {other, right, left}
    assert without.param_groups[0]["params"] == [other]


def test_a_weight_that_others_still_use_stays_beside_its_factors() -> None:
    weight, right, left = parameter(OUT, IN), parameter(RANK, IN), parameter(OUT, RANK)
    optimizer = stepped(torch.optim.Adam([("tied", weight)]), [{weight: torch.randn(OUT, IN)}])
    swap_parameters_(
        [optimizer], [weight], [right, left], carry_dense(left, right, False), staying=True
    )
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(weight), id(right), id(left)]
    assert group["param_names"][0] == "tied"
    assert optimizer.state.keys() == {weight, right, left}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(OUT, IN, dtype=dtype))
    right, left = (nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((RANK, IN), (OUT, RANK)))
    optimizer = stepped(torch.optim.Adam([weight]), [{weight: torch.randn(OUT, IN).to(dtype)}])
    carry = carry_dense(left.detach(), right.detach(), False)
    swap_parameters_([optimizer], [weight], [right, left], carry)
    assert optimizer.state[left]["exp_avg"].dtype == dtype
    assert optimizer.state[left]["exp_avg"].is_contiguous()


def test_hooks_go_along_and_their_handles_still_remove_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen: list[str] = []
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    new = LowRankLinear.in_place_of(layer, 2)
    replace_(model, "0", new)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "forward", "backward"]
    replace_(model, "0", layer)  # and back again
    model(torch.randn(2, 4))
    assert seen[3:] == ["before", "forward"]
    replace_(model, "0", new)
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 4))
    assert len(seen) == 5
    assert not new._forward_hooks
    assert not new._forward_pre_hooks_with_kwargs


def test_what_cannot_go_along_is_warned_of_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_state_dict_post_hook(lambda *_: None)
    model[0].temperature = 3.0
    model[1].weight.register_hook(lambda gradient: gradient)
    model[2].weight.register_post_accumulate_grad_hook(lambda _: None)
    told = (
        "layer '0' is replaced, and its attribute 'temperature', hooks of its state dict with it",
        "layer '1' is replaced, and hooks of its weight's gradient with it",
        "layer '2' is replaced, and hooks of its weight's gradient with it",
    )
    for number, message in enumerate(told):
        old = model[number]
        with pytest.warns(UserWarning, match=f"^{message}$"):
            replace_(model, str(number), LowRankLinear.in_place_of(old, 2))
        replace_(model, str(number), old)  # what it was before says nothing


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-3),
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
        lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.9),
    ],
    ids=["AdamW", "amsgrad", "centered RMSprop", "with momentum"],
)
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_carried_second_moments_fit_the_first_ones(
    make: Callable[[Any], torch.optim.Optimizer], steps: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=False)
    optimizer = make(layer.parameters())
    x, direction = torch.randn(8, 24), torch.randn(16)
    for _ in range(steps):  # gradients that agree, so that first moments are large
        optimizer.zero_grad()
        (layer(x + 0.01 * torch.randn(8, 24)) @ direction).sum().backward()
        optimizer.step()
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    new = LowRankLinear.in_place_of(layer, 4)
    with torch.no_grad():
        new.left.weight.copy_(u[:, :4] * s[:4].sqrt())
        new.right.weight.copy_(s[:4, None].sqrt() * vh[:4])
    carry = carry_dense(new.left.weight.detach(), new.right.weight.detach(), False)
    swap_parameters_([optimizer], [layer.weight], new.factors, carry)
    before = [p.detach().clone() for p in new.factors]
    for parameter in new.factors:  # one step with the gradient of the average itself
        state = optimizer.state[parameter]
        mean = state["exp_avg"] / 0.1 if "exp_avg" in state else state["grad_avg"] / 0.01
        parameter.grad = mean / max(1, steps)
    optimizer.step()
    for parameter, old in zip(new.factors, before, strict=True):
        assert parameter.isfinite().all()
        if "betas" in optimizer.param_groups[0]:
            moved = (parameter - old * (1 - 1e-5)).abs().max()
            assert moved <= 1.5e-3, "no entry moves by much more than the rate"


IMPLEMENTATIONS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    f"{kind.__name__}{options}": (kind, options)
    for kind, options in (
        *((torch.optim.SGD, {"momentum": 0.9, way: True}) for way in ("fused", "foreach")),
        *((torch.optim.SGD, {"momentum": m, "fused": True}) for m in (0.0, 0.5)),
        *((torch.optim.Adam, {"amsgrad": True, way: True}) for way in ("fused", "foreach")),
        *((torch.optim.AdamW, {way: True}) for way in ("fused", "foreach")),
        *((torch.optim.Adagrad, {way: True}) for way in ("fused", "foreach")),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.25}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "foreach": True}),
    )
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("kind", "options"), IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
def test_new_parameters_without_state_are_trained_beside_others(
    kind: Any, options: dict[str, Any], steps: int
) -> None:
    stays, old, new, alone = (parameter(4, 3) for _ in range(4))
    start = new.detach().clone()
    alone.data.copy_(new)
    gradient = torch.randn(4, 3)
    optimizer = stepped(
        kind([stays, old], lr=0.01, **options), [{stays: gradient, old: gradient}] * steps
    )
    swap_parameters_([optimizer], [old], [new], None)
    if "initial_accumulator_value" in options:
        assert optimizer.state[new]["sum"].eq(0.25).all()
    stepped(optimizer, [{stays: gradient, new: gradient}] * 2)
    stepped(kind([alone], lr=0.01, **options), [{alone: gradient}] * 2)
    assert new.equal(alone)
    assert not new.equal(start)
