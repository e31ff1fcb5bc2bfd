"""Every formula against a slow loop over examples, heads and positions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lrcompress.distill import functional
from lrcompress.distill.functional import (
    relation_kl_divergence,
    relative_squared_error,
    soft_kl_divergence,
)
from lrcompress.errors import ShapeError

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def kl(first: list[float], second: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))


def padded(tensor: Tensor) -> Tensor:
    """The same with three more positions of something that must not count."""
    more = 9 * random(tensor.shape[0], 3, *tensor.shape[2:], seed=int(tensor.sum().abs() * 99))
    return torch.cat([tensor, more], 1)


def longer(mask: Tensor) -> Tensor:
    return torch.cat([mask, torch.zeros(len(mask), 3, dtype=mask.dtype)], 1)


def test_soft_divergence_is_that_of_the_definition() -> None:
    student, teacher = random(4, 3), random(4, 3, seed=1)
    slow = [
        9.0 * kl(softmax((t / 3).tolist()), softmax((s / 3).tolist()))
        for s, t in zip(student, teacher, strict=True)
    ]
    found = soft_kl_divergence(student, teacher, temperature=3.0)
    assert float(found) == pytest.approx(sum(slow) / 4, rel=1e-4)


def test_of_tokens_only_the_real_ones_count() -> None:
    student, teacher = random(3, 5, 4), random(3, 5, 4, seed=1)
    rows = MASK.bool()
    alone = soft_kl_divergence(student[rows], teacher[rows], 2.0)
    assert torch.allclose(soft_kl_divergence(student, teacher, 2.0, MASK), alone)


@pytest.mark.parametrize("size", [(4,), (4, 1)])
def test_of_single_logits_it_is_the_mean_squared_error(size: tuple[int, ...]) -> None:
    student, teacher = random(*size), random(*size, seed=1)
    slow = sum((float(s) - float(t)) ** 2 for s, t in zip(student, teacher, strict=True)) / 4
    assert float(soft_kl_divergence(student, teacher, 2.0)) == pytest.approx(slow, rel=1e-5)


def test_the_relative_gap_is_a_ratio_of_sums_over_real_positions() -> None:
    student, teacher = random(3, 5, 2), random(3, 5, 2, seed=1)
    gap = size = 0.0
    for i in range(3):
        for j in range(5):
            for k in range(2):
                if MASK[i, j]:
                    gap += (float(student[i, j, k]) - float(teacher[i, j, k])) ** 2
                    size += float(teacher[i, j, k]) ** 2
    assert float(relative_squared_error(student, teacher, MASK)) == pytest.approx(
        gap / size, rel=1e-4
    )
    more = relative_squared_error(padded(student), padded(teacher), longer(MASK))
    assert torch.allclose(more, relative_squared_error(student, teacher, MASK))


def test_the_relative_gap_knows_no_scale() -> None:
    student, teacher = random(3, 5, 2), random(3, 5, 2, seed=1)
    scaled = relative_squared_error(1000 * student, 1000 * teacher)
    assert torch.allclose(scaled, relative_squared_error(student, teacher))


@pytest.mark.parametrize(("heads", "widths"), [((2, 2), (4, 4)), ((4, 2), (8, 4))])
def test_relations_are_those_of_the_definition(
    heads: tuple[int, int], widths: tuple[int, int]
) -> None:
    student, teacher = (
        tuple(random(3, 5, width, seed=seed + 5 * side) for side, width in enumerate(widths))
        for seed in (0, 1)
    )
    size = widths[0] // heads[0]
    slow = []
    for i in range(3):
        real = [j for j in range(5) if MASK[i, j]]
        for head in range(heads[0]):
            other = head // (heads[0] // heads[1])
            for row in real:
                relations = []
                for first, second in (teacher, student):
                    query = first[i, row, head * size : (head + 1) * size]
                    keys = [second[i, j, other * size : (other + 1) * size] for j in real]
                    relations.append(softmax([float(query @ k) / math.sqrt(size) for k in keys]))
                slow.append(kl(*relations))
    found = relation_kl_divergence(student, teacher, heads, MASK)
    assert float(found) == pytest.approx(sum(slow) / len(slow), rel=1e-4)
    more = relation_kl_divergence(
        tuple(map(padded, student)), tuple(map(padded, teacher)), heads, longer(MASK)
    )
    assert torch.allclose(more, found, rtol=1e-4)


def test_nothing_is_lost_between_a_thing_and_itself() -> None:
    features = random(3, 5, 4)
    assert float(soft_kl_divergence(features[:, 0], features[:, 0], 2.0)) == 0
    assert float(relative_squared_error(features, features, MASK)) == 0
    assert (
        float(relation_kl_divergence((features, features), (features, features), (2, 2), MASK)) == 0
    )


def test_gradients_are_finite_where_there_is_padding() -> None:
    student = random(3, 5, 4).requires_grad_()
    mask = MASK * torch.tensor([[1], [1], [0]])  # an example of nothing but padding
    relation_kl_divergence(
        (student, student), (random(3, 5, 4), random(3, 5, 4)), (2, 2), mask
    ).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[0, 3:].abs().sum()) == 0


def test_a_mask_of_another_shape_is_refused() -> None:
    features = random(3, 4, 2)
    with pytest.raises(ShapeError, match=r"mask is \(3, 5\), which does not fit .*\(3, 4, 2\)"):
        relative_squared_error(features, features, MASK)
    with pytest.raises(ShapeError, match=r"mask is \(3, 5\), which does not fit .*\(3, 4\)"):
        relation_kl_divergence((features, features), (features, features), (1, 1), MASK)


Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LOSSES: dict[str, Loss] = {
    "logits": lambda s, t, mask: soft_kl_divergence(s, t, 2.0, mask),
    "scores": lambda s, t, mask: soft_kl_divergence(s[..., :1], t[..., :1], 2.0, mask),
    "hidden_states": relative_squared_error,
    "images": lambda s, t, mask: relative_squared_error(
        s.unflatten(-1, (2, 2)), t.unflatten(-1, (2, 2)), mask
    ),
    "relations": lambda s, t, mask: relation_kl_divergence((s, s), (t, t), (2, 2), mask),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(params=["whole", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "chunks":  # two rows of logits each, the last of fewer
        monkeypatch.setattr(functional, "CHUNK", 8)


@each_loss
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.float()])
def test_nothing_waits_for_the_device(loss: Loss, mask: Tensor | None, no_waits: Any) -> None:
    student = random(3, 5, 4).requires_grad_()
    with no_waits():
        loss(student, random(3, 5, 4, seed=1), mask).backward()
    assert student.grad is not None


@each_loss
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_at_padding_leaks_nowhere(loss: Loss, bad: float) -> None:
    padding = ~MASK.bool()[..., None]
    found = []
    for value in (0.0, bad):
        student = random(3, 5, 4).masked_fill(padding, value).requires_grad_()
        teacher = random(3, 5, 4, seed=1).masked_fill(padding, value)
        one = loss(student, teacher, MASK)
        one.backward()
        assert student.grad is not None
        found.append((one.detach(), student.grad))
    (clean, expected), (value, gradient) = found
    assert value == clean
    assert torch.equal(gradient, expected)
    assert float(gradient[padding.expand_as(gradient)].abs().sum()) == 0


@each_loss
@pytest.mark.usefixtures("chunked")
def test_where_nothing_is_real_nothing_is_lost(loss: Loss) -> None:
    student = random(3, 5, 4).requires_grad_()
    value = loss(student, random(3, 5, 4, seed=1), torch.zeros_like(MASK))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert float(student.grad.abs().sum()) == 0


@each_loss
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_of_any_size_give_the_same(
    loss: Loss, mask: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (2**23, 1, 8, 31):
        monkeypatch.setattr(functional, "CHUNK", chunk)
        student = random(3, 5, 4).to(dtype).requires_grad_()
        value = loss(student, random(3, 5, 4, seed=1).to(dtype), mask)
        (1024 * value).backward()  # as a scaled loss: it must not be lost in half precision
        assert value.dtype == torch.float32
        assert student.grad is not None
        assert student.grad.dtype == dtype
        found.append((value.detach(), student.grad))
    for value, gradient in found[1:]:
        assert torch.allclose(value, found[0][0])
        assert torch.allclose(gradient, found[0][1])


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = list(record.profiler.kineto_results.experimental_event_tree())
    steps = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            steps.append((event.start_time_ns, event.typed[1].alloc_size))
    assert steps
    now = peak = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["logits", "hidden_states"])
def test_memory_is_that_of_the_gradient_and_of_a_chunk(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "CHUNK", 2**14)
    student, teacher = (random(4, 64, 2048, seed=seed).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    mask = torch.ones(4, 64, dtype=torch.int64)
    loss = LOSSES[name]
    peak = peak_memory(lambda: loss(student, teacher, mask).backward())
    assert peak <= student.nbytes + 10 * 4 * functional.CHUNK
