"""Statistics of real forward and backward passes, against one example at a time."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
)

from lrcompress.errors import LayerError, ObservationError, ShapeError
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.masks import batch_decoder_mask
from lrcompress.statistics.moments import INPUT_KINDS, KINDS, OUTPUT_KINDS, Statistics

F = nn.functional
WIDTH = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Query, key and value read one tensor; the rest reads its own; the head reads vectors."""

    def __init__(self, run: Callable[..., Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.head = nn.Linear(WIDTH, 3)
        self.run = run

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if mask is None else mask
        scores = self.query(x) @ self.key(x).mT
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(-1)
        x = x + weights @ self.value(x)
        x = x + self.run(self.block, x)
        real = mask[..., None].to(x)
        return self.head((x * real).sum(1) / real.sum(1))


LAYERS = ["query", "key", "value", "block.0", "block.2", "head"]
Batch = tuple[Tensor, Tensor, Tensor]


def a_batch(size: int = 4, length: int = 5, *, padded: bool = True) -> Batch:
    lengths = torch.randint(1, length + 1, (size,)) if padded else torch.full((size,), length)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return torch.randn(size, length, WIDTH), mask, torch.randint(3, (size,))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, mask, labels = batch
    return F.cross_entropy(model(x, mask).float(), labels)


def watch(
    recorder: Recorder,
    model: nn.Module,
    batch: Batch,
    *,
    masked: bool = True,
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
) -> None:
    """One training step of the mean loss over a batch, as a caller writes it."""
    with recorder.step(batch[1] if masked else None):
        value = loss(model, batch)
        recorder.commit(len(batch[0]), finite=bool(value.isfinite()))
        value.backward()
    model.zero_grad()


def observed(
    model: nn.Module, batches: list[Batch], kinds: tuple[str, ...] = KINDS, **settings: Any
) -> Statistics:
    recorder = Recorder(model, settings.pop("names", LAYERS), kinds, **settings)
    for batch in batches:
        watch(recorder, model, batch)
    return recorder.statistics


def definition(model: nn.Module, batch: Batch, names: list[str] = LAYERS) -> dict[str, Any]:
    """Every sum, one unpadded example at a time, with autograd's own ``.grad``."""
    sums: dict[str, Any] = {}
    for x, mask, label in zip(*batch, strict=True):
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, x: Tensor, y: Tensor, seen: dict[str, Any] = seen) -> None:
            y.retain_grad()
            seen[name] = (x.detach(), y)

        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, y, name=name, keep=keep: keep(name, args[0], y)
            )
            for name in names
        ]
        real = int(mask.sum())
        loss_of(model, (x[None, :real], mask[None, :real], label[None])).backward()
        for handle in handles:
            handle.remove()
        for name, (read, gave) in seen.items():
            assert gave.grad is not None
            xs, gs = read.flatten(0, -2), gave.grad.flatten(0, -2)
            squares = model.get_submodule(name).weight.grad.square()  # type: ignore[union-attr, operator]
            parts = {
                "input_moment": xs.mT @ xs,
                "input_abs": xs.abs().sum(0),
                "input_sum": xs.sum(0),
                "output_moment": gs.mT @ gs,
                "weighted_moment": xs.mT @ (gs.square().sum(1, keepdim=True) * xs),
                "weighted_sum": gs.square().sum(1) @ xs,
                "weight": gs.square().sum(),
                "input_fisher": squares.sum(0),
                "output_fisher": squares.sum(1),
                "tokens": len(xs),
                "examples": 1,
            }
            for kind, part in parts.items():
                sums[f"{name} {kind}"] = sums.get(f"{name} {kind}", 0) + part
        model.zero_grad()
    return sums


def flat(statistics: Statistics, names: list[str] = LAYERS) -> dict[str, Any]:
    result = {}
    for name in names:
        sums = statistics.of(name, ())
        for kind in sums.values:
            result[f"{name} {kind}"] = sums.moment(kind)
        result |= {f"{name} tokens": int(sums.tokens), f"{name} examples": int(sums.examples)}
    return result


def assert_same(
    one: dict[str, Any], other: dict[str, Any], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(
            value, other[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


# Sequences of 2 take the short way to the Fisher of every layer, sequences of 12 the long one.
@pytest.mark.parametrize("length", [2, 5, 12])
@pytest.mark.parametrize("padded", [True, False])
def test_a_batch_gives_what_its_examples_give_one_by_one(length: int, padded: bool) -> None:
    model, batch = Net(), a_batch(length=length, padded=padded)
    assert_same(flat(observed(model, [batch])), definition(model, batch))


@pytest.mark.parametrize("split", [[4, 4], [1, 7], [3, 3, 2], [1] * 8])
def test_any_split_into_batches_gives_the_whole(split: list[int]) -> None:
    model, batch = Net(), a_batch(8)
    parts = list(zip(*(part.split(split) for part in batch), strict=True))
    statistics = observed(model, parts)
    assert statistics.steps == len(split)
    assert statistics.tokens == batch[1].sum()
    assert_same(flat(statistics), flat(observed(model, [batch])))


@pytest.mark.parametrize("split", [[4, 4], [7, 1]])
def test_parts_observed_apart_and_merged_give_the_whole(split: list[int]) -> None:
    model, batch = Net(), a_batch(8)
    merged = Statistics()
    for part in zip(*(part.split(split) for part in batch), strict=True):
        merged.merge_(observed(model, [part]))  # type: ignore[list-item]
    whole = observed(model, [batch])
    assert_same(flat(merged), flat(whole))
    assert merged.tokens == whole.tokens


def test_observation_goes_on_from_a_loaded_state() -> None:
    model, first, second = Net(), a_batch(), a_batch()
    loaded = Statistics()
    loaded.load_state_dict(observed(model, [first]).state_dict(), "cpu")
    resumed = observed(model, [second], statistics=loaded)
    straight = observed(model, [first, second])
    for (key, one), other in zip(flat(resumed).items(), flat(straight).values(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), key
    assert (resumed.steps, resumed.tokens) == (straight.steps, straight.tokens)


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def bert_loss(model: nn.Module, batch: Batch) -> Tensor:
    ids, mask, labels = batch
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss  # type: ignore[no-any-return]


def bert_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer." in n]


def test_a_padded_batch_of_a_transformer_gives_what_its_texts_give_one_by_one() -> None:
    model = tiny_bert()
    names = bert_layers(model)
    _, mask, labels = a_batch(4, 7)
    ids = torch.randint(1, 30, mask.shape) * mask
    together, apart = Recorder(model, names, KINDS), Recorder(model, names, KINDS)
    watch(together, model, (ids, mask, labels), loss=bert_loss)
    for i, real in enumerate(mask.sum(1).tolist()):
        part = (ids[i : i + 1, :real], mask[i : i + 1, :real], labels[i : i + 1])
        watch(apart, model, part, loss=bert_loss)
    assert_same(flat(together.statistics, names), flat(apart.statistics, names), atol=1e-6)
    # per block: one for query, key and value, and one each for the other three
    assert len(names) == 12
    assert len(together.statistics.inputs) == 8
    block = "bert.encoder.layer.0.attention.self."
    assert {together.statistics.source[block + n] for n in ("query", "key", "value")} == {
        block + "query"
    }


def tiny_bart() -> BartForConditionalGeneration:
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{key}": n for side in sides for key, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {f"{side}_attention_heads": 2 for side in sides}
    config = BartConfig(
        vocab_size=30, d_model=16, max_position_embeddings=16, **sizes, **heads, pad_token_id=0
    )
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("written", [5, 7])
def test_what_a_decoder_reads_loses_its_own_padding_and_that_of_its_encoder(written: int) -> None:
    model = tiny_bart()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    _, mask, _ = a_batch(4, 7)
    _, kept, _ = a_batch(4, written)
    ids = torch.randint(4, 30, mask.shape) * mask
    labels = torch.randint(4, 30, kept.shape).masked_fill(kept == 0, -100)

    def watch(recorder: Recorder, rows: slice, read: int, wrote: int) -> None:
        source, goal = mask[rows, :read], labels[rows, :wrote]
        decoder_mask = batch_decoder_mask({"labels": goal}, "test")
        with recorder.step(source, decoder_mask=decoder_mask):
            output = model(input_ids=ids[rows, :read], attention_mask=source, labels=goal)
            loss = F.cross_entropy(output.logits.mT, goal, reduction="sum") / len(goal)
            recorder.commit(len(goal))
            loss.backward()

    together, apart = Recorder(model, names, KINDS), Recorder(model, names, KINDS)
    watch(together, slice(4), 7, written)
    for i, lengths in enumerate(zip(mask.sum(1).tolist(), kept.sum(1).tolist(), strict=True)):
        watch(apart, slice(i, i + 1), *lengths)
    assert_same(flat(together.statistics, names), flat(apart.statistics, names), atol=1e-5)
    counted = {n: int(together.statistics.of(n, ()).tokens) for n in names}
    of_encoder, of_decoder = int(mask.sum()), int(kept.sum())
    assert counted["model.encoder.layers.0.fc1"] == of_encoder
    assert counted["model.decoder.layers.0.encoder_attn.k_proj"] == of_encoder
    assert counted["model.decoder.layers.0.encoder_attn.q_proj"] == of_decoder
    assert counted["model.decoder.layers.0.fc1"] == counted["lm_head"] == of_decoder
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_step_that_is_broken_off_adds_nothing() -> None:
    model = Net()
    recorder = Recorder(model, LAYERS, KINDS)
    step = recorder.step()
    step.__enter__()
    model(a_batch()[0])
    recorder.drop()
    step.__exit__(None, None, None)
    recorder.drop()  # and outside of a step there is nothing to drop
    assert not recorder.observing
    assert (recorder.statistics.steps, recorder.statistics.inputs) == (0, {})


@pytest.mark.parametrize("length", [2, 9])
def test_gradients_at_padding_are_left_out(length: int) -> None:
    """A loss over every position, as of a model that does not mask its mean."""
    model, (x, mask, labels) = Fork(lambda x: x), a_batch(length=length)
    statistics = observed(model, [(x, mask, labels)], names=["one", "two"])
    expected: dict[str, Any] = {}
    for i, real in enumerate(mask.sum(1).tolist()):
        one, two = model.one(x[i]), model.two(x[i])
        one.retain_grad()
        F.cross_entropy((one + two).mean(0), labels[i]).backward()
        assert one.grad is not None
        g, read = one.grad[:real], x[i, :real]
        squares = (g.mT @ read).square()
        parts = {
            "output_moment": g.mT @ g,
            "weighted_sum": g.square().sum(1) @ read,
            "input_fisher": squares.sum(0),
            "output_fisher": squares.sum(1),
        }
        for kind, part in parts.items():
            expected[kind] = expected.get(kind, 0) + part
    sums = statistics.of("one", KINDS)
    assert_same({kind: sums.moment(kind) for kind in expected}, expected)


def test_layers_that_read_one_tensor_share_its_moment() -> None:
    statistics = observed(Net(), [a_batch(), a_batch()])
    assert set(statistics.inputs) == {"query", "block.0", "block.2", "head"}
    assert set(statistics.outputs) == set(LAYERS)
    assert statistics.source["value"] == "query"


class Fork(nn.Module):
    """Two layers that read equal numbers: the same tensor, a copy, or one changed in place."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.between = between

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.clone()
        return self.one(x).mean(1) + self.two(self.between(x)).mean(1)


@pytest.mark.parametrize(
    ("between", "entries"),
    [
        (lambda x: x, 1),
        (lambda x: x.view(x.shape), 1),
        (lambda x: x.clone(), 2),
        (lambda x: x.flip(1), 2),
        (lambda x: x.add_(1), 2),
        (lambda x: x[:, :3], 2),
        (lambda x: x.unsqueeze(0).squeeze(0), 1),
    ],
    ids=["itself", "view", "copy", "flipped", "in place", "narrowed", "there and back"],
)
def test_only_readers_of_the_very_same_tensor_share(
    between: Callable[[Tensor], Tensor], entries: int
) -> None:
    model = Fork(between)
    batch = a_batch(padded=False)
    recorder = Recorder(model, ["one", "two"], ("input_moment",), forward_only=True)
    with torch.no_grad(), recorder.step():  # nothing is padded, and lengths differ
        loss_of(model, batch)
    assert len(recorder.statistics.inputs) == entries


def test_memory_that_is_used_again_is_not_taken_for_the_same_tensor() -> None:
    """The first reader's input is gone before the second's is made, often at its address."""

    def forward(self: Fork, x: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            one = self.one(x * 2)
            two = self.two(x * 3)
        return one.mean(1) + two.mean(1)

    model = Fork(lambda x: x)
    recorder = Recorder(model, ["one", "two"], ("input_moment",), forward_only=True)
    x, mask, _ = a_batch()
    with recorder.step(mask):
        forward(model, x, mask)
        recorder.commit()
    real = x[mask.bool()]
    for name, factor in (("one", 4), ("two", 9)):
        torch.testing.assert_close(
            recorder.statistics.of(name, ["input_moment"]).moment("input_moment"),
            factor * real.mT @ real,
        )


def test_readers_that_part_later_are_refused() -> None:
    model = Fork(lambda x: x)
    recorder = Recorder(model, ["one", "two"], ("input_moment",))
    watch(recorder, model, a_batch())
    model.between = torch.clone
    with pytest.raises(ObservationError, match=r"'two' reads the tensor of 'one' .*of 'two' in an"):
        watch(recorder, model, a_batch())


@pytest.mark.parametrize("scale", [1024.0, 2.0**-20])
def test_commit_undoes_whatever_the_loss_was_scaled_by(scale: float) -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1]):
        loss = loss_of(model, batch)
        recorder.commit(len(batch[0]) / scale)
        (loss * scale).backward()
    assert_same(flat(recorder.statistics), flat(observed(model, [batch])))


def test_a_loss_that_is_not_finite_adds_nothing_and_is_counted() -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    watch(recorder, model, (batch[0] * torch.nan, *batch[1:]))
    assert not recorder.statistics.inputs
    assert not recorder.statistics.outputs
    watch(recorder, model, batch)
    statistics = recorder.statistics
    assert (statistics.steps, statistics.skipped, statistics.num_skipped) == (1, 1, 1)
    assert statistics.tokens == batch[1].sum()
    assert_same(flat(statistics), flat(observed(model, [batch])))


def test_gradients_that_overflow_add_nothing_and_are_counted() -> None:
    """What a loss scaler meets: the loss is finite, a gradient is not."""
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1]):
        loss = loss_of(model, batch)
        recorder.commit(len(batch[0]))
        (loss * torch.inf).backward()
    watch(recorder, model, batch)
    statistics = recorder.statistics
    assert (statistics.steps, statistics.skipped, statistics.num_skipped) == (2, 0, 1)
    whole, once = flat(statistics), flat(observed(model, [batch]))
    outputs = [key for key in whole if key.split()[1] in (*OUTPUT_KINDS, "examples")]
    assert_same({k: whole[k] for k in outputs}, {k: once[k] for k in outputs})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_under_autocast_are_near_those_in_float32(dtype: torch.dtype) -> None:
    model, batch = Net(), a_batch(16)
    with torch.autocast("cpu", dtype):
        low = observed(model, [batch])
    exact = flat(observed(model, [batch]))
    for key, value in flat(low).items():
        if isinstance(value, Tensor):
            assert value.dtype == torch.float32
            assert (value - exact[key]).norm() < 0.05 * exact[key].norm(), key
        else:
            assert value == exact[key]


def test_sums_of_a_bfloat16_model_are_in_float32_and_near_the_exact() -> None:
    model, (x, mask, labels) = Net(), a_batch(64)
    low = flat(observed(copy.deepcopy(model).bfloat16(), [(x.bfloat16(), mask, labels)]))
    exact = flat(observed(model, [(x, mask, labels)]))
    for key, value in low.items():
        if isinstance(value, Tensor):
            assert value.dtype == torch.float32
            assert (value - exact[key]).norm() < 0.1 * exact[key].norm(), key


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    def run(block: nn.Module, x: Tensor) -> Any:
        return checkpoint(block, x, use_reentrant=reentrant)

    model, batches = Net(run), [a_batch(), a_batch()]
    plain = copy.deepcopy(model)
    plain.run = lambda block, x: block(x)
    statistics = observed(model, batches)
    assert_same(flat(statistics), flat(observed(plain, batches)))
    assert statistics.tokens == sum(batch[1].sum() for batch in batches)


@pytest.mark.parametrize("kinds", [KINDS, ("input_fisher",)])
def test_tokens_are_counted_even_where_every_layer_is_checkpointed(kinds: tuple[str, ...]) -> None:
    model, data = Net(lambda block, x: checkpoint(block, x, use_reentrant=True)), [a_batch()] * 2
    statistics = observed(model, data, kinds, names=["block.0", "block.2"])
    assert statistics.tokens == 2 * data[0][1].sum()


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_call_hidden_by_reentrant_checkpointing_is_refused(shared: bool) -> None:
    def run(block: nn.Module, x: Tensor) -> Any:
        x = checkpoint(block, x, use_reentrant=True)
        return checkpoint(block, x, use_reentrant=True)

    with pytest.raises(ObservationError, match=r"'block.\d' was called twice in one step"):
        observed(Net(run), [a_batch()], shared=shared)


def test_checkpointing_without_reentrance_may_call_a_shared_layer_twice() -> None:
    def run(block: nn.Module, x: Tensor) -> Any:
        x = checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False)

    model, batch = Net(run), a_batch()
    plain = copy.deepcopy(model)
    plain.run = lambda block, x: block(block(x))
    assert_same(
        flat(observed(model, [batch], shared=True)), flat(observed(plain, [batch], shared=True))
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_observed_when_asked_and_runs_compiled_otherwise(backend: str) -> None:
    calls = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal calls
        compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)

        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return compiled(*args)

        return run

    torch._dynamo.reset()
    model, batch = Net(), a_batch()
    expected = flat(observed(model, [batch]))
    model.compile(backend=counting)
    loss_of(model, batch)
    assert calls == 1
    recorder = Recorder(model, LAYERS, KINDS)
    watch(recorder, model, batch)
    assert calls == 1, "an observed step runs eagerly"
    assert_same(flat(recorder.statistics), expected)
    loss_of(model, batch)
    assert calls == 2, "the next step is compiled again"
    watch(recorder, model, batch)
    assert recorder.statistics.steps == 2
    assert no_hooks(model)


def test_recorders_that_leave_a_step_in_the_order_they_came_leave_compiled_code_on() -> None:
    model = Net()
    first, second = (Recorder(model, LAYERS, KINDS) for _ in range(2))
    mask = a_batch()[1]
    with torch.compiler.set_stance("eager_on_recompile"):
        one, two = first.step(mask), second.step(mask)
        for entered in (one, two):
            entered.__enter__()
        one.__exit__(None, None, None)
        assert _stance() == "force_eager", "the second still watches"
        two.__exit__(None, None, None)
        assert _stance() == "eager_on_recompile"


def _stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_there_during_the_step_and_gone_after_it() -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    assert no_hooks(model)
    with recorder.step(batch[1]):
        assert recorder.observing
        assert not no_hooks(model)
    assert no_hooks(model)
    assert not recorder.observing


@pytest.mark.parametrize("when", ["before", "forward", "backward"])
def test_hooks_are_gone_and_nothing_is_added_when_the_step_raises(when: str) -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def step() -> None:
        with recorder.step(batch[1]):
            if when == "before":
                fail()
            if when == "forward":
                handles.append(model.block[2].register_forward_hook(fail))
            loss = loss_of(model, batch)
            loss.register_hook(fail)
            loss.backward()

    handles: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        step()
    for handle in handles:
        handle.remove()
    assert no_hooks(model)
    assert not recorder.observing
    if when != "backward":
        assert recorder.statistics.steps == 0
        assert not recorder.statistics.inputs
    watch(recorder, model, batch)
    assert recorder.statistics.outputs["head"].examples == len(batch[0])


def test_hooks_of_others_stay() -> None:
    model, heard = Net(), []
    model.query.register_forward_hook(lambda *_: heard.append(1))
    observed(model, [a_batch()])
    assert len(heard) == 1
    assert len(model.query._forward_hooks) == 1


def test_steps_that_are_not_watched_leave_no_trace() -> None:
    model, recorder = Net(), None
    recorder = Recorder(model, LAYERS, KINDS)
    loss_of(model, a_batch()).backward()
    assert not recorder.statistics.inputs
    assert recorder.statistics.steps == 0


def test_nothing_is_written_on_the_model() -> None:
    model = Net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    observed(model, [a_batch()])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_gradients_are_those_of_an_unwatched_step() -> None:
    model, batch = Net(), a_batch()
    loss_of(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1]):
        loss = loss_of(model, batch)
        recorder.commit(len(batch[0]))
        loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.equal(grad)


def test_passes_without_gradients_are_not_watched() -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1]):
        with torch.no_grad():
            loss_of(model, a_batch())  # a teacher's or a metric's own pass
        loss = loss_of(model, batch)
        recorder.commit(len(batch[0]))
        loss.backward()
        with torch.no_grad():
            loss_of(model, a_batch())
    assert_same(flat(recorder.statistics), flat(observed(model, [batch])))


def test_forward_only_watches_passes_without_gradients() -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, INPUT_KINDS, forward_only=True)
    with recorder.step(batch[1]), torch.no_grad():
        loss_of(model, batch)
    assert recorder.statistics.steps == 1, "leaving the step commits it"
    expected = observed(model, [batch], INPUT_KINDS)
    assert_same(flat(recorder.statistics), flat(expected))


def test_a_step_without_commit_counts_gradients_as_they_arrive() -> None:
    model, batch = Net(), a_batch(3)
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1]):
        (loss_of(model, batch) * len(batch[0])).backward()
    assert_same(flat(recorder.statistics), flat(observed(model, [batch])))


def test_gradients_count_only_while_armed() -> None:
    """Labels drawn from the model in place of those of the data: the latter go by."""
    model, batch = Net(), a_batch()
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step(batch[1], keep_outputs=True):
        loss = loss_of(model, batch)
        recorder.commit(len(batch[0]), armed=False)
        (7 * loss).backward(retain_graph=True)
        recorder.arm()
        asked = torch.autograd.grad(loss, recorder.outputs, retain_graph=True)
        recorder.arm(False)
        (7 * loss).backward()
    assert len(asked) == len(LAYERS)
    assert_same(flat(recorder.statistics), flat(observed(model, [batch])))


def test_two_forward_and_backward_passes_in_a_step_are_both_counted() -> None:
    """Manual optimization: one training step, two losses."""
    model, first, second = Net(), a_batch(padded=False), a_batch(padded=False)
    recorder = Recorder(model, LAYERS, KINDS)
    with recorder.step():
        for batch in (first, second):
            loss = loss_of(model, batch)
            recorder.commit(len(batch[0]))
            loss.backward()
    assert_same(flat(recorder.statistics), flat(observed(model, [first, second])))


class Twice(nn.Module):
    """One layer used twice, and another that reads what the first use read."""

    def __init__(self, *, second: bool = True) -> None:
        super().__init__()
        self.layer, self.beside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.second = nn.Linear(WIDTH, 3), second

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if mask is None else mask
        h = self.layer(x).tanh()
        again = self.layer(h)
        h = h + again if self.second else h
        h = h * mask[..., None]
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))


def test_a_layer_that_is_called_twice_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ObservationError, match=r"'layer' was called twice in one step: Me expects.*shared=True"
    ):
        observed(Twice(), [a_batch()], names=["layer"], name="Me")


@pytest.mark.parametrize("length", [2, 9])
def test_a_shared_layer_adds_up_its_uses_and_squares_their_common_gradient(length: int) -> None:
    model, batch = Twice(), a_batch(length=length)
    sums = observed(model, [batch], names=["layer"], shared=True).of("layer", KINDS)
    squares, moment = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    for x, mask, label in zip(*batch, strict=True):
        x = x[None, : mask.sum()]
        loss_of(model, (x, mask[None, : mask.sum()], label[None])).backward()
        assert model.layer.weight.grad is not None
        squares += model.layer.weight.grad.square()
        for read in (x[0], model.layer(x[0]).tanh()):
            moment += (read.mT @ read).detach()
        model.zero_grad()
    torch.testing.assert_close(sums.moment("input_fisher"), squares.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.moment("output_fisher"), squares.sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.moment("input_moment"), moment, rtol=1e-4, atol=1e-6)
    assert sums.tokens == 2 * batch[1].sum()
    assert sums.examples == len(batch[0])


def test_a_shared_layer_of_which_one_use_gets_no_gradient_still_counts_the_other() -> None:
    unused, batch = Twice(second=False), a_batch()
    kinds = ("output_moment", "input_fisher")
    sums = observed(unused, [batch, batch], kinds, names=["layer"], shared=True).of("layer", kinds)
    squares = torch.zeros(WIDTH)
    for x, mask, label in zip(*batch, strict=True):
        loss_of(unused, (x[None], mask[None], label[None])).backward()
        assert unused.layer.weight.grad is not None
        squares += unused.layer.weight.grad.square().sum(0)
        unused.zero_grad()
    torch.testing.assert_close(sums.moment("input_fisher"), 2 * squares, rtol=1e-4, atol=1e-6)
    assert sums.examples == 2 * len(batch[0])


class Recurrent(Net):
    """A whole block with query, key and value used several times, as ALBERT does."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if mask is None else mask
        for _ in range(2):
            weights = (self.query(x) @ self.key(x).mT).masked_fill(mask[:, None] == 0, -1e4)
            x = (x + weights.softmax(-1) @ self.value(x)).tanh()
        real = mask[..., None].to(x)
        return self.head((x * real).sum(1) / real.sum(1))


def test_shared_layers_that_read_one_tensor_in_every_use_share_its_moment() -> None:
    model, batch, names = Recurrent(), a_batch(), ["query", "key", "value"]
    statistics = observed(model, [batch, batch], names=names, shared=True)
    assert set(statistics.inputs) == {"query"}
    alone = [observed(model, [batch, batch], names=[n], shared=True) for n in names]
    for name, one in zip(names, alone, strict=True):
        assert_same(flat(statistics, [name]), flat(one, [name]))


class Uneven(Twice):
    """As DeBERTa: one layer reads positions too, which are the same for all examples."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        positions = self.layer(torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH))
        return super().forward(x, mask) + (positions.sum(1) + self.beside(x).mean(1))[:, :3]


def test_shared_layers_that_read_one_tensor_in_some_uses_only_have_their_own_moments() -> None:
    model, batch, names = Uneven(), a_batch(), ["layer", "beside"]
    statistics = observed(model, [batch, batch], names=names, shared=True)
    assert statistics.source == {name: name for name in names}
    for name in names:
        alone = observed(model, [batch, batch], names=[name], shared=True)
        assert_same(flat(statistics, [name]), flat(alone, [name]))
    assert statistics.of("layer", KINDS).examples == 2 * len(batch[0])
    assert statistics.of("layer", KINDS).tokens == 2 * (2 * batch[1].sum() + 3)


def test_a_layer_that_is_never_called_is_missed_when_it_is_asked_for() -> None:
    model = Twice()
    statistics = observed(model, [a_batch()], names=["layer", "beside"], shared=True)
    with pytest.raises(
        ObservationError, match=r"'beside' needs input_moment, output_moment, which"
    ):
        statistics.of("beside", ["input_moment", "output_moment"])


def test_offloaded_sums_are_the_same() -> None:
    model, batch = Net(), a_batch()
    here, there = observed(model, [batch]), observed(model, [batch], offload="cpu")
    assert_same(flat(here), flat(there))
    meta = observed(model, [batch], offload="meta")
    values = [v for s in meta.inputs.values() for v in s.values.values()]
    assert {v.device.type for v in values if v.ndim > 1} == {"meta"}
    assert {v.device.type for v in values if v.ndim < 2} == {"cpu"}  # beside the layers


def test_without_a_mask_every_token_counts() -> None:
    model, batch = Net(), a_batch(padded=True)
    recorder = Recorder(model, LAYERS, ("input_moment",))
    watch(recorder, model, batch, masked=False)
    assert recorder.statistics.of("query", []).tokens == batch[1].numel()
    assert recorder.statistics.of("head", []).tokens == len(batch[0])


def test_a_mask_that_is_missing_is_an_error_once_a_layer_reads_sequences() -> None:
    model, batch = Net(), a_batch()
    recorder = Recorder(model, ["head"], KINDS)
    with recorder.step(missing="give a mask"):
        loss_of(model, batch)
    recorder = Recorder(model, LAYERS, KINDS)
    with (
        pytest.raises(ObservationError, match=r"give a mask"),
        recorder.step(missing="give a mask"),
    ):
        loss_of(model, batch)


@pytest.mark.parametrize("shape", [(4,), (4, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    recorder = Recorder(Net(), LAYERS, KINDS)
    with (
        pytest.raises(ShapeError, match=r"mask must be \(examples, length\) or .*, got shape \(4,"),
        recorder.step(torch.ones(shape)),
    ):
        pass
    assert not recorder.observing


def test_a_layer_of_a_type_that_is_not_known_is_refused() -> None:
    with pytest.raises(LayerError, match=r"block.1 is a Tanh; known layer types are"):
        Recorder(Net(), ["block.1"], KINDS)


def test_bytes_are_told_beforehand_for_layers_that_share_nothing() -> None:
    model = Net()
    recorder = Recorder(model, ["block.0", "head"], KINDS)
    watch(recorder, model, a_batch())
    assert recorder.nbytes == recorder.statistics.nbytes
    assert Recorder(model, LAYERS, KINDS).nbytes > observed(model, [a_batch()]).nbytes


def test_a_layer_may_be_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(input=x).mean(1)

    x, mask, labels = a_batch()
    statistics = observed(Keyword(), [(x, mask, labels)], ("input_moment",), names=["layer"])
    real = x[mask.bool()]
    moment = statistics.of("layer", ["input_moment"]).moment("input_moment")
    torch.testing.assert_close(moment, real.mT @ real)


@contextmanager
def frozen(model: nn.Module, *names: str) -> Iterator[None]:
    parameters = [p for name in names for p in model.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)


def test_a_frozen_layer_in_the_middle_is_observed_through_its_output() -> None:
    model, batch = Net(), a_batch()
    expected = flat(observed(model, [batch]))
    with frozen(model, "block", "head"):
        assert_same(flat(observed(model, [batch])), expected)
