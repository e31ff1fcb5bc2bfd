"""Heads over a vocabulary: the diagonal of their output moment, in memory of their own order."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lrcompress
from lrcompress.objective import LOW_RANK, METHODS, metric_of
from lrcompress.solvers.truncation import Factors, truncate
from lrcompress.statistics import moments
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import KINDS, Statistics

HIDDEN, WORDS = 12, 300


class Head(nn.Module):
    """Predicts words of which few are frequent, as those of a language are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, WORDS)
        with torch.no_grad():
            self.head.bias.copy_(-1.2 * torch.arange(1, WORDS + 1).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def a_batch(model: nn.Module, tokens: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN) * torch.linspace(1.5, 0.3, HIDDEN)
    with torch.no_grad():
        return x, torch.multinomial(model(x).softmax(-1), 1).squeeze(1)


def observed(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> Statistics:
    recorder = Recorder(model, ["head"], KINDS)
    for x, labels in batches:
        with recorder.step():
            loss = F.cross_entropy(model(x), labels)
            recorder.commit(len(x))
            loss.backward()
    return recorder.statistics


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small head count as a large one."""
    monkeypatch.setattr(moments, "LARGE", 40)


def test_a_head_is_factored_nearly_as_well_as_from_its_whole_moment(
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(0)
    model = Head()
    batch = a_batch(model, 2000)
    weight = model.head.weight.detach()
    exact = metric_of("kfac", observed(model, batch), "head", refit_bias=True)
    request.getfixturevalue("large")
    cheap = metric_of("kfac", observed(model, batch), "head", refit_bias=True)
    g, c = exact.output, exact.input
    assert g is not None
    assert c is not None
    assert cheap.output is not None
    torch.testing.assert_close(cheap.output, g.diagonal(), rtol=1e-5, atol=1e-9)
    best, found = (truncate(weight, metric.output, metric.input) for metric in (exact, cheap))

    def lost(factors: Factors) -> float:
        rest = (weight - factors.left @ factors.right).double()
        return float(((g @ rest @ c) * rest).sum())

    for rank in (2, 4, 8):
        assert lost(found.factors(rank)) < 1.02 * lost(best.factors(rank))
        predicted = float(found.energies[rank:].sum())
        assert predicted == pytest.approx(lost(found.factors(rank)), rel=0.1)


@pytest.mark.usefixtures("large")
def test_parts_of_a_large_head_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    model = Head()
    x, labels = a_batch(model, 60)
    whole = observed(model, (x, labels)).of("head", KINDS)
    first, second = Statistics(), observed(model, (x[20:], labels[20:]))
    first.load_state_dict(observed(model, (x[:20], labels[:20])).state_dict(), "cpu")
    first.merge_(second)
    parts = first.of("head", KINDS)
    for kind in (*KINDS, "weighted_sum", "weight"):
        torch.testing.assert_close(parts.moment(kind), whole.moment(kind), msg=kind)
    assert parts.examples == whole.examples == 60
    assert whole.values["output_moment"].shape == (WORDS,)


def test_a_run_that_kept_the_whole_moment_goes_on_with_it(request: pytest.FixtureRequest) -> None:
    model = Head()
    batch = a_batch(model, 10)
    before = observed(model, batch)
    request.getfixturevalue("large")
    recorder = Recorder(model, ["head"], KINDS, statistics=before)
    with recorder.step():
        loss = F.cross_entropy(model(batch[0]), batch[1])
        recorder.commit(10)
        loss.backward()
    assert before.of("head", KINDS).moment("output_moment").shape == (WORDS, WORDS)
    assert before.of("head", KINDS).examples == 20


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_head_over_32_000_words_takes_memory_of_its_own_order(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32_000))
    batches = [(torch.randn(10, 8), torch.randint(32_000, (10,))) for _ in range(2)]
    assert Recorder(model, ["1"], METHODS[method].kinds).nbytes < 4 * 32_000 + 4_000
    dense, largest = copy.deepcopy(model), Largest()
    with largest:
        record = lrcompress.compress(
            model,
            batches,
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            method=method,
            targets=["1"],
            keep=0.5,
            mask=None,
        )
    assert record.layers[0].rank == 7  # 7.996 would be half
    assert largest.numel <= 32_000 * 16
    x = batches[0][0]
    assert (model(x) - dense(x)).norm() < 0.9 * dense(x).norm()


@pytest.mark.usefixtures("large")
def test_a_tied_head_is_untied_and_factored() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.randint(50, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    table = model.model.embed_tokens.weight.clone()
    record = lrcompress.compress(
        model, [batch], lambda m, b: m(**b).loss, targets=["lm_head"], keep=0.6, shared=True
    )
    assert record.layers[0].rank == 7
    assert model.model.embed_tokens.weight.equal(table)
    assert record.layers[0].predicted_loss is not None
