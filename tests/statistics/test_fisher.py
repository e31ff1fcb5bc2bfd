"""Labels drawn from the model: the mean over draws is the Fisher information itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lrcompress.errors import NoMatchError, ObservationError, SettingError
from lrcompress.statistics import fisher
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import (
    MOST_CLASSES,
    LogitsCapture,
    add_fisher,
    check_fisher,
    drawn_loss,
    fisher_losses,
)

DRAWS = 20_000


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_mean_of_drawn_gradients_is_the_exact_fisher(generator: torch.Generator) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(3)
    recorder = Recorder(model, ["0"], ("output_moment", "input_fisher", "output_fisher"))
    with recorder.step(keep_outputs=True):
        logits = model(x.expand(DRAWS, 3))
        recorder.commit(DRAWS)
        torch.autograd.grad(drawn_loss(logits, generator), recorder.outputs)
    sums = recorder.statistics.of("0", recorder.kinds)

    chances = model(x).softmax(-1).detach()
    exact = chances.diag() - torch.outer(chances, chances)  # E (p − e_y)(p − e_y)ᵀ, over y from p
    squares = torch.outer(exact.diagonal(), x.square())
    for kind, expected in (
        ("output_moment", exact),
        ("input_fisher", squares.sum(0)),
        ("output_fisher", squares.sum(1)),
    ):
        torch.testing.assert_close(sums.moment(kind) / DRAWS, expected, rtol=0.05, atol=0.01)


def exact_fisher(model: nn.Module, x: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Every label of every example in its own backward pass, weighted by its chance."""
    sums: dict[str, Tensor] = {}
    for one in x:
        chances = model(one[None]).detach().softmax(-1)[0]
        for label, chance in enumerate(chances):
            recorder = Recorder(model, ["0"], kinds)
            with recorder.step(keep_outputs=True):
                loss = nn.functional.cross_entropy(model(one[None]), torch.tensor([label]))
                recorder.commit(1.0, terms=1)
                torch.autograd.grad(loss, recorder.outputs)
            for kind in kinds:
                found = recorder.statistics.of("0", [kind]).moment(kind) * chance
                sums[kind] = sums.get(kind, 0) + found
    return sums


@pytest.mark.parametrize("classes", [2, 3, MOST_CLASSES])
def test_few_classes_give_the_fisher_itself(classes: int, generator: torch.Generator) -> None:
    """Also where the model is sure: with what is drawn, nothing would be seen there."""
    kinds = ("output_moment", "input_fisher", "output_fisher", "weighted_moment")
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    x[0] *= 30
    before = generator.get_state()
    recorder = Recorder(model, ["0"], kinds)
    with recorder.step(keep_outputs=True):
        logits = model(x)
        recorder.commit(len(x), terms=len(x))
        add_fisher(recorder, logits, generator)
    assert generator.get_state().equal(before), "nothing is drawn"
    assert len(fisher_losses(logits, generator)) == classes - 1
    expected = exact_fisher(model, x, kinds)
    for kind in kinds:
        found = recorder.statistics.of("0", [kind])
        torch.testing.assert_close(found.moment(kind), expected[kind], rtol=1e-4, atol=1e-7)
        assert found.examples == len(x)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sure", [0.0, 1e2, 1e4])
def test_what_is_certain_has_no_fisher_and_no_nan(sure: float, generator: torch.Generator) -> None:
    for place in range(4):
        logits = torch.zeros(1, 4)
        logits[0, place] = sure
        logits.requires_grad_()
        found = torch.zeros(4, 4)
        for loss in fisher_losses(logits, generator):
            (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
            found += slope.mT @ slope
        chances = logits.detach().softmax(-1)[0]
        torch.testing.assert_close(found, chances.diag() - torch.outer(chances, chances))


def test_tokens_and_many_classes_are_drawn(generator: torch.Generator) -> None:
    for shape in ((3, 4, 2), (3, MOST_CLASSES + 1)):
        logits = torch.randn(shape, requires_grad=True)
        (loss,) = fisher_losses(logits, generator.manual_seed(0))
        assert loss == drawn_loss(logits, generator.manual_seed(0))


def test_labels_are_drawn_as_often_as_the_model_says(generator: torch.Generator) -> None:
    logits = torch.tensor([1.0, 0.0, -2.0]).expand(DRAWS, 3).clone().requires_grad_()
    (slope,) = torch.autograd.grad(drawn_loss(logits, generator), logits)
    drawn = (slope < 0).float().mean(0)  # p − e_y is negative at the label alone
    torch.testing.assert_close(drawn, logits[0].softmax(-1), rtol=0, atol=0.02)


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The labels that a loss was taken of."""
    logits = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(drawn_loss(logits, generator), logits)
    return slope.argmin(-1)  # p − e_y is negative at the label alone


@pytest.mark.parametrize("classes", [2, 3, 7, 64, 1000])
def test_counts_of_labels_pass_a_chi_square_test(classes: int, generator: torch.Generator) -> None:
    logits = 1.5 * torch.randn(classes)
    logits[classes // 2] = -float("inf")
    labels = drawn(logits.expand(DRAWS, classes), generator)
    counts = torch.bincount(labels, minlength=classes).double()
    expected = DRAWS * logits.double().softmax(-1)
    assert counts[classes // 2] == 0
    order = expected.argsort(descending=True)
    groups = (expected[order].cumsum(0) / 20).long()  # of rare classes together: 20 or more each
    groups = groups.unique(return_inverse=True)[1]
    seen, due = (
        torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, x[order])
        for x in (counts, expected)
    )
    square, freedom = float(((seen - due).square() / due.clamp_min(1)).sum()), len(seen) - 1
    assert abs(square - freedom) < 4 * (2 * freedom) ** 0.5 + 4


def test_over_a_vocabulary_labels_are_those_of_exact_sums(generator: torch.Generator) -> None:
    chances = torch.cat([torch.randn(8, 128_256), 12 * torch.randn(8, 128_256)]).softmax(-1)
    sums = chances.double().cumsum(1)
    numbers = torch.rand(16, generator=generator, dtype=torch.float64)
    numbers[:2] = torch.tensor([0, 1 - 2**-53])
    expected = torch.searchsorted(sums, (numbers * sums[:, -1])[:, None], right=True).squeeze(1)
    expected = expected.clamp(max=128_255)
    labels = fisher._labels(chances, numbers)
    assert torch.equal(labels, expected)
    assert bool((chances.gather(1, labels[:, None]) > 0).all())


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_classes_without_a_chance_are_never_drawn(number: float) -> None:
    chances = torch.tensor([[0, 0.5, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0, 0]])
    labels = fisher._labels(chances, torch.full((3,), number, dtype=torch.float64))
    assert labels.tolist() == [1 if number < 0.5 else 4, 5, 0]


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, found = torch.randn(50, 40), []
    for chunk in (2**23, 1, 120):
        monkeypatch.setattr(fisher, "_CHUNK", chunk)
        found.append(drawn(logits, torch.Generator().manual_seed(0)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_draw_waits_for_no_device_and_is_deterministic(
    generator: torch.Generator, no_waits: Any
) -> None:
    logits = torch.randn(5, 40, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with no_waits():
            drawn_loss(logits, generator).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.grad is not None


def test_logits_that_are_no_numbers_give_a_loss_that_is_none(generator: torch.Generator) -> None:
    loss = drawn_loss(torch.full((2, 5), float("nan")), generator)
    assert loss.isnan()


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
def test_the_loss_is_the_mean_over_all_that_is_labelled(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    loss = drawn_loss(logits, generator)
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    (slope,) = torch.autograd.grad(loss, logits)
    rows = slope.reshape(-1, 3) * 6
    assert (rows.sort().values - torch.tensor([-2 / 3, 1 / 3, 1 / 3])).abs().max() < 1e-6


def test_draws_follow_their_own_generator_only() -> None:
    logits, state = torch.randn(50, 4), torch.get_rng_state()
    one, same, other = (drawn_loss(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one == same != other
    assert torch.get_rng_state().equal(state)


def test_half_precision_logits_are_drawn_from_in_float32(generator: torch.Generator) -> None:
    loss = drawn_loss(torch.randn(5, 4, dtype=torch.bfloat16), generator)
    assert loss.dtype == torch.float32


def test_regression_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(SettingError, match=r"needs two logits or more, got 1; .*fisher='labels'"):
        drawn_loss(torch.randn(5, 1), generator)


class Inner(nn.Module):
    def __init__(self, *, named: bool = True) -> None:
        super().__init__()
        self.layer, self.named = nn.Linear(2, 3), named

    def forward(self, x: Tensor) -> Any:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits) if self.named else logits


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def test_logits_are_found_by_their_name_in_the_output_of_a_submodule() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        output = model(torch.randn(4, 2))
    assert tap.take() is output.logits


def test_logits_of_a_transformers_model_are_found() -> None:
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = Outer(BertForSequenceClassification(config))
    tap = LogitsCapture(model)
    with tap.listening():
        output = model(torch.ones(2, 3, dtype=torch.long))
    assert tap.take() is output.logits


def test_logits_are_the_output_of_the_submodule_that_is_named() -> None:
    model = Outer(Inner(named=False))
    tap = LogitsCapture(model, "inner.layer")
    with tap.listening():
        output = model(torch.randn(4, 2))
    assert tap.take() is output


def test_a_submodule_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(NoMatchError, match=r"logits='inner.leyer' names no .*nearest: inner.layer"):
        LogitsCapture(Outer(Inner()), "inner.leyer")


def test_a_model_without_logits_is_told_what_to_name() -> None:
    model = Outer(Inner(named=False))
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"no module's output has \.logits; name the .*="):
        tap.take()


def test_a_named_submodule_that_gave_none_is_named() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model, "inner")  # its output is no tensor
    with tap.listening():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"'inner' returned no tensor with a gradient"):
        tap.take()


def test_passes_without_gradients_and_earlier_steps_are_not_heard() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    with tap.listening(), torch.no_grad():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"found no logits"):
        tap.take()


def test_logits_are_taken_once() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    tap.take()
    with pytest.raises(ObservationError, match=r"found no logits"):
        tap.take()


def test_hooks_are_gone_when_the_block_raises() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with pytest.raises(KeyboardInterrupt), tap.listening():
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())


def test_whose_gradients_is_one_of_two() -> None:
    check_fisher("labels")
    check_fisher("model")
    with pytest.raises(SettingError, match=r"^fisher must be 'labels' or 'model', got 'modell'$"):
        check_fisher("modell")


def test_nothing_is_heard_before_it_listens() -> None:
    with pytest.raises(ObservationError, match="found no logits"):
        LogitsCapture(Outer(Inner())).take()


def test_a_label_is_drawn_for_every_token_however_they_lie() -> None:
    logits = torch.randn(2, 5, 3)
    whole, flat = (
        drawn_loss(x, torch.Generator().manual_seed(1)) for x in (logits, logits.view(10, 3))
    )
    assert whole.equal(flat)


@pytest.mark.parametrize("classes", [3, MOST_CLASSES + 1])
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_scaled_and_the_graph_is_kept_for_whom_it_is_asked(
    classes: int, keep: bool
) -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, classes), "aside": nn.Linear(5, 2)})
    found = []
    for scale in (1.0, 3.0):
        recorder = Recorder(model, ["used", "aside"], ["output_moment"])
        torch.manual_seed(0)
        x = torch.randn(6, 5)
        with recorder.step(keep_outputs=True):
            logits, _ = model["used"](x).tanh(), model["aside"](x)
            recorder.commit(len(x), terms=len(x))
            own = torch.Generator().manual_seed(2)
            before = own.get_state()
            add_fisher(recorder, logits, own, scale, **({"keep_graph": True} if keep else {}))
            assert own.get_state().equal(before) == (classes <= MOST_CLASSES)
            loss = logits.square().sum()
        if keep:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
        found.append(recorder.statistics.of("used", ["output_moment"]).moment("output_moment"))
    torch.testing.assert_close(found[1], 9 * found[0])
