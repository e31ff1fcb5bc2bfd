"""Masks: where batches have them, and which tokens they leave of what layers read."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertForMultipleChoice

from lrcompress.engine.compress import compress
from lrcompress.engine.observation import observe
from lrcompress.errors import ObservationError, SettingError, ShapeError
from lrcompress.statistics.masks import (
    Mask,
    Tokens,
    batch_decoder_mask,
    batch_mask,
    check_mask,
    sequence_first,
)
from lrcompress.statistics.moments import KINDS, Statistics

FOUR = torch.zeros(4, 7)

MASK = torch.ones(4, 7)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_mask_is_found_by_its_key(kind: Any) -> None:
    batch = kind({"ids": FOUR, "real": MASK})
    assert batch_mask(batch, "real", "Owner") == (MASK, None)


def test_a_mask_may_be_a_function_of_the_batch() -> None:
    def of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[1]

    assert batch_mask((FOUR, MASK), of, "Owner") == (MASK, None)


def test_none_asks_for_no_mask() -> None:
    assert batch_mask({"attention_mask": MASK}, None, "Owner") == (None, None)


@pytest.mark.parametrize(
    ("batch", "has"),
    [
        ({"ids": FOUR, "y": FOUR}, "keys are ids, y"),
        ((FOUR, "x"), "a tuple of mask=0: float32 (4, 7), mask=1: str"),
        (FOUR, "Tensor"),
    ],
)
def test_a_missing_mask_says_what_there_is_and_how_to_go_on(batch: Any, has: str) -> None:
    mask, missing = batch_mask(batch, "attention_mask", "Owner")
    assert mask is None
    assert missing is not None
    assert missing.startswith("Owner leaves padding out by the batch's 'attention_mask'")
    assert f"({has}); name another with mask=, or pass mask=None if nothing is padded" in missing


def test_what_a_decoder_reads_is_told_by_its_mask_or_its_labels() -> None:
    labels, mask = torch.tensor([[3, -100], [4, 5]]), torch.tensor([[1, 1], [1, 0]])
    found = batch_decoder_mask({"labels": labels, "decoder_attention_mask": mask}, "Owner")
    assert found is mask
    by_labels = batch_decoder_mask(BatchEncoding({"labels": labels}), "Owner")
    assert by_labels is not None
    assert by_labels.tolist() == [[True, False], [True, True]]
    for batch in ({"labels": torch.zeros(4)}, {"labels": ["a"]}, {"x": FOUR}, FOUR):
        assert batch_decoder_mask(batch, "Owner") is None


def test_a_decoders_mask_of_other_values_is_refused_where_values_are_checked() -> None:
    batch = {"labels": torch.tensor([[3, 4]]), "decoder_attention_mask": torch.tensor([[1, 2]])}
    told = (
        r"Owner: a padding mask is 1 at tokens and 0 at padding, and mask='decoder_attention_mask' "
        r"gives int64 \(1, 2\) with 2; .* a decoder's mask goes by this name"
    )
    with pytest.raises(ObservationError, match=told):
        batch_decoder_mask(batch, "Owner")
    assert batch_decoder_mask(batch, "Owner", check_values=False) is not None


@pytest.mark.parametrize(
    ("batch", "source"),
    [
        ((FOUR, MASK), 1),
        ((FOUR, MASK), "1"),  # as a command line gives it
        ([FOUR, MASK], -1),
        ({"text": {"mask": MASK, "ids": FOUR}, "labels": FOUR}, "text.mask"),
        ({"a.b": MASK}, "a.b"),
        (({"ids": FOUR}, {"mask": MASK}), "1.mask"),
        ({"padding": MASK == 0}, "~padding"),
        ({"text": {"padding": MASK == 0}}, "~text.padding"),
    ],
)
def test_a_mask_is_found_in_tuples_within_mappings_and_inverted(batch: Any, source: Any) -> None:
    mask, missing = batch_mask(batch, source, "Owner")
    assert missing is None
    assert mask is not None
    assert torch.equal(mask != 0, MASK != 0)


@pytest.mark.parametrize(
    ("batch", "source"),
    [((FOUR,), 1), (FOUR, 1), ({"a": {"b": MASK}}, "a.c"), ({"a": MASK}, "a.b"), ("text", 0)],
)
def test_what_is_not_there_is_missing(batch: Any, source: Any) -> None:
    mask, missing = batch_mask(batch, source, "Owner")
    assert mask is None
    assert missing is not None
    assert f"the batch's {source!r}, which this batch does not have" in missing


def test_a_mask_is_a_tensor() -> None:
    told = r"expected a tensor as the padding mask \(mask='real'\), got list; .* keys are real"
    with pytest.raises(ObservationError, match=told):
        batch_mask({"real": [[1, 0]]}, "real", "Owner")


IDS = torch.tensor([[7, 12, 1], [30, 1, 0]])
REAL = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_token_ids_are_no_mask_though_padding_is_0() -> None:
    told = (
        r"Owner: a padding mask is 1 at tokens and 0 at padding, and mask=0 gives int64 \(2, 3\) "
        r"with 7, 12, 30; the batch has a tuple of mask=0: int64 \(2, 3\), mask=1: int64 \(2, 3\); "
        r"name another with mask=, or a function such as lambda batch: batch\[0\] != 0"
    )
    with pytest.raises(ObservationError, match=told):
        batch_mask((IDS, REAL), 0, "Owner")
    with pytest.raises(
        ObservationError, match=r"is 1 at padding and 0 at .*='~ids'.*\['input_ids'\] "
    ):
        batch_mask({"ids": IDS}, "~ids", "Owner")
    with pytest.raises(ObservationError, match=r"gives int64 \(2, 3\) with 7, 12, 30"):
        batch_mask({"ids": IDS}, lambda batch: batch["ids"], "Owner")
    with pytest.raises(ObservationError, match=r"gives float32 \(2, 3\) with 0\.5"):
        batch_mask({"weights": REAL / 2}, "weights", "Owner")


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "mask", "told"),
    [
        (
            (IDS, REAL, LABELS),
            2,
            r"mask=2 gives int64 \(2,\); the batch has a tuple of mask=0: int64 \(2, 3\), mask=1: "
            r"int64 \(2, 3\), mask=2: int64 \(2,\); nearest: mask=1",
        ),
        (
            {"ids": IDS, "real": REAL, "causal": REAL[:, None, None]},
            "causal",
            r"mask='causal' gives int64 \(2, 1, 1, 3\); the batch has keys are ids, real, causal; "
            "nearest: mask='real'",
        ),
        (
            (IDS, LABELS),
            "~1",
            r"mask='~1' gives .*; give a function such as lambda .*\[0\] != 0, or mask=None",
        ),
    ],
)
def test_a_mask_of_other_axes_is_told_with_the_nearest_entry(
    batch: Any, mask: Any, told: str
) -> None:
    axes = r"Owner: mask must be \(examples, length\) or \(examples, choices, length\), and "
    with pytest.raises(ShapeError, match=axes + told):
        batch_mask(batch, mask, "Owner")
    assert batch_mask(batch, mask, "Owner", check_values=False, check_shape=False)[0] is not None


def test_a_decoders_mask_of_other_axes_is_told_by_its_name() -> None:
    batch = {"labels": IDS, "decoder_attention_mask": LABELS}
    told = r"Owner: mask must be .*mask='decoder_attention_mask' gives int64 \(2,\); .*by this name"
    with pytest.raises(ShapeError, match=told):
        batch_decoder_mask(batch, "Owner", check_values=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_a_mask_of_zeros_and_ones_may_have_any_dtype(dtype: torch.dtype) -> None:
    for mask in (REAL, torch.ones_like(REAL), torch.zeros_like(REAL)):
        found, _ = batch_mask({"mask": mask.to(dtype)}, "mask", "Owner")
        assert found is not None
        assert torch.equal(found != 0, mask != 0)


@pytest.mark.parametrize("least", [-torch.inf, -10_000.0, torch.finfo(torch.float32).min])
def test_a_mask_that_is_added_to_scores_is_nonzero_at_padding(least: float) -> None:
    batch = {"mask": torch.where(REAL == 1, 0.0, least)}
    found, _ = batch_mask(batch, "~mask", "Owner")
    assert found is not None
    assert torch.equal(found, REAL == 1)
    with pytest.raises(ObservationError, match=r"added to scores.*: name it as mask='~key'"):
        batch_mask(batch, "mask", "Owner")


@pytest.mark.parametrize("mask", [True, False, 1.5, ["attention_mask"], MASK])
def test_a_mask_is_looked_up_by_a_key_an_index_or_a_function(mask: Any) -> None:
    for check in (check_mask, lambda x: batch_mask({}, x, "Owner")):
        with pytest.raises(SettingError, match=r"mask is a key of the batch .* got "):
            check(mask)


RAGGED = torch.arange(6) < torch.tensor([[6], [2], [3], [5]])


def kept(x: Tensor, tokens: Tokens) -> set[float]:
    return set(tokens.of(x)[:, 0].tolist())


def numbered(*leading: int) -> Tensor:
    """Every token has a number of its own."""
    count = torch.Size(leading).numel()
    return torch.arange(count, dtype=torch.float32).reshape(*leading, 1).expand(*leading, 2)


def test_tokens_are_found_in_either_order_of_axes_and_in_one() -> None:
    x, mask = numbered(4, 6), Mask(RAGGED)
    real = set(x[RAGGED][:, 0].tolist())
    assert len(real) == 16
    assert kept(x, mask.fit(x)) == real
    assert kept(x.reshape(24, 2), mask.fit(x.reshape(24, 2))) == real
    turned = x.transpose(0, 1)
    assert kept(turned, mask.fit(turned)) == real
    assert mask.fit(turned).sequence_first


def test_a_square_batch_is_turned_where_the_layer_is_known_to_read_so() -> None:
    grid = torch.arange(4) < torch.tensor([[4], [1], [2], [3]])
    x, mask = numbered(4, 4), Mask(grid)
    assert kept(x, mask.fit(x)) == set(x[grid][:, 0].tolist())
    assert kept(x, mask.fit(x, sequence_first=True)) == set(x[grid.mT][:, 0].tolist())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_mask_is_cut_as_the_batch_was(left: bool, turned: bool) -> None:
    wide = torch.zeros(4, 9, dtype=torch.bool)
    wide[:, 3:] = RAGGED.flip(1) if left else False
    if not left:
        wide[:, :6] = RAGGED
    short = RAGGED.flip(1) if left else RAGGED
    x = numbered(4, 6).transpose(0, 1) if turned else numbered(4, 6)
    expected = x[short.mT if turned else short][:, 0].tolist()
    assert kept(x, Mask(wide).fit(x)) == set(expected)


@pytest.mark.parametrize("leading", [(4, 3, 6), (4, 6, 3)])
def test_heads_may_stand_before_or_behind_the_length(leading: tuple[int, ...]) -> None:
    x = numbered(*leading)
    grid = RAGGED[:, None, :] if leading[1] == 3 else RAGGED[:, :, None]
    assert kept(x, Mask(RAGGED).fit(x)) == set(x[grid.expand(leading)][:, 0].tolist())


@pytest.mark.parametrize("leading", [(4,), (7,), (4, 1), (1, 6), (1, 9)])
def test_what_is_by_example_or_the_same_for_all_is_whole(leading: tuple[int, ...]) -> None:
    x = numbered(*leading)
    assert len(Mask(RAGGED).fit(x).of(x)) == torch.Size(leading).numel()


@pytest.mark.parametrize("leading", [(4, 5), (4, 7), (3, 6), (5, 4), (4, 2, 2), (2, 4, 6)])
def test_a_mask_that_does_not_fit_is_an_error_with_both_shapes(leading: tuple[int, ...]) -> None:
    x, shape = numbered(*leading), ", ".join(map(str, (*leading, 2)))
    told = rf"layer 'up' reads \({shape}\), and the padding mask is for \(4, 6\) tokens: Owner"
    with pytest.raises(ObservationError, match=told):
        Mask(RAGGED).fit(x, layer="up", owner="Owner")


def test_a_flat_input_has_its_tokens_in_the_order_of_its_layer() -> None:
    x, mask = numbered(4, 6), Mask(RAGGED)
    real = set(x[RAGGED][:, 0].tolist())
    turned = x.transpose(0, 1).reshape(24, 2)
    assert kept(turned, mask.fit(turned, sequence_first=True)) == real
    wide = nn.functional.pad(RAGGED, (0, 3))
    flat = x.reshape(24, 2)  # cut to the longest example before
    assert kept(flat, Mask(wide).fit(flat)) == real


def test_axes_that_only_could_be_a_cut_are_no_cut() -> None:
    wide = nn.functional.pad(RAGGED, (0, 10))  # of a text, beside an image of 9 patches
    with pytest.raises(ObservationError, match=r"reads \(4, 9, 2\), and the padding mask is for"):
        Mask(wide).fit(numbered(4, 9))
    eights = numbered(4, 8)
    assert len(Mask(wide).fit(eights).of(eights)) == 16  # batches are padded to multiples of 8


def test_of_two_axes_of_that_length_the_last_holds_tokens() -> None:
    x = numbered(4, 6, 6)
    expected = x[RAGGED[:, None, :].expand(4, 6, 6)][:, 0].tolist()
    assert kept(x, Mask(RAGGED).fit(x)) == set(expected)


def test_pooled_choices_are_whole() -> None:
    mask = Mask(RAGGED.view(2, 2, 6))
    assert len(mask.fit(numbered(2, 2)).of(numbered(2, 2))) == 4


def test_an_error_within_the_users_function_is_its_own() -> None:
    with pytest.raises(KeyError, match="idz"):
        batch_mask({"ids": FOUR}, lambda batch: batch["idz"], "Owner")


def test_numbers_that_are_no_tokens_read_whole_tables() -> None:
    positions = torch.arange(36).view(6, 6, 1)
    assert len(Mask(RAGGED).fit(positions).of(positions)) == 36


def test_a_mask_has_two_axes_or_three() -> None:
    with pytest.raises(ShapeError, match=r"\(examples, choices, length\), got shape \(4,\)"):
        Mask(torch.ones(4))
    with pytest.raises(ShapeError, match=r"got shape \(2, 1, 3, 3\)"):
        Mask(torch.ones(2, 1, 3, 3))


def test_by_example_padding_is_zero_and_choices_stay_together() -> None:
    mask = Mask(RAGGED.view(2, 2, 6))
    x = numbered(4, 6)
    found = mask.fit(x).by_example(x)
    assert found.shape == (2, 12, 2)
    assert torch.equal(found, torch.where(RAGGED[..., None], x, 0).reshape(2, 12, 2))
    apart = numbered(2, 2, 6)
    assert torch.equal(mask.fit(apart).by_example(apart), found)
    turned = x.transpose(0, 1)
    assert torch.equal(
        Mask(RAGGED).fit(turned).by_example(turned), torch.where(RAGGED[..., None], x, 0)
    )


def test_layers_of_a_transformer_with_the_length_first_are_known() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict(
        {"a": nn.TransformerEncoder(block, 2, enable_nested_tensor=False), "b": nn.Linear(8, 8)}
    )
    model["c"] = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert sequence_first(model) == ("a.layers.0.", "a.layers.1.")
    assert sequence_first(block) == ("",)


class Sequences(nn.Module):
    """Two transformer layers over padded sequences, the length first as is torch's default."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x, padding = self.embed(batch["ids"]), batch["mask"] == 0
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        x = x if self.batch_first else x.transpose(0, 1)
        real = batch["mask"].unsqueeze(-1)
        return self.head((x * real).sum(1) / real.sum(1))


def padded(size: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, 20, (size, length), generator=generator)
    mask = torch.arange(length) < torch.arange(1, size + 1).clamp(max=length)[:, None]
    return {"ids": ids, "mask": mask.long(), "labels": ids[:, 0] % 3}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch["labels"])


@pytest.mark.parametrize("length", [7, 4])  # of 4 examples: a square too
@pytest.mark.parametrize("kinds", [["input_moment", "output_moment"], ["output_fisher"]])
def test_statistics_are_the_same_whichever_axis_is_first(length: int, kinds: list[str]) -> None:
    torch.manual_seed(0)
    first, other = Sequences(), Sequences(batch_first=True)
    other.load_state_dict(first.state_dict())
    batch = padded(4, length)
    found = []
    for model in (first, other):
        names = ["*.linear1", "*.linear2"]
        with observe(model, kinds=kinds, targets=names) as seen, seen.step(batch["mask"]):
            loss = loss_of(model, batch)
            seen.commit(4.0, terms=4)
            loss.backward()
        assert seen.statistics.tokens == int(batch["mask"].sum())
        found.append(seen.statistics)
    for name in ("encoder.layers.0.linear1", "encoder.layers.1.linear2"):
        one, two = (x.of(name, kinds) for x in found)
        for kind in kinds:
            torch.testing.assert_close(one.moment(kind), two.moment(kind), rtol=1e-4, atol=1e-7)


def test_a_mask_with_padding_and_tokens_the_wrong_way_is_told_by_gradients() -> None:
    model, batches = Sequences(True), [padded(4, 7)]
    batches[0]["padding"] = batches[0]["mask"] == 0
    options: dict[str, Any] = {"keep": 0.5, "targets": ["*.linear1"], "align": 1}
    told = r"all gradients lie where the mask says .* name such a one as mask='~key'"
    with pytest.raises(ObservationError, match=told):
        compress(model, batches, loss_of, mask="padding", **options)
    wrongly = r"at its tokens \(mask='~mask'\).* at tokens: leave the ~ out, mask='mask'"
    with pytest.raises(ObservationError, match=wrongly):
        compress(model, batches, loss_of, mask="~mask", **options)
    compress(model, batches, loss_of, mask="~padding", **options)


def test_choices_of_a_question_are_understood() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    model = BertForMultipleChoice(config).eval()
    mask = torch.arange(6) < torch.tensor([[6, 2, 3], [5, 4, 1]])[..., None]
    batch = {
        "input_ids": torch.randint(0, 20, (2, 3, 6)),
        "attention_mask": mask.long(),
        "labels": torch.tensor([0, 2]),
    }
    kinds = ["input_moment", "input_fisher"]
    with observe(model, kinds=kinds) as recorder, recorder.step(batch["attention_mask"]):
        loss = model(**batch).loss
        recorder.commit(2.0, terms=2)
        loss.backward()
    assert recorder.statistics.tokens == int(mask.sum())
    layer = model.bert.encoder.layer[0].intermediate.dense
    seen = recorder.statistics.of("bert.encoder.layer.0.intermediate.dense", kinds)
    expected = torch.zeros(16)
    for one in range(2):  # an example's gradient is that of all its choices together
        model.zero_grad()
        part = {key: value[one : one + 1] for key, value in batch.items()}
        model(**part).loss.backward()
        expected += layer.weight.grad.square().sum(0)
    torch.testing.assert_close(seen.moment("input_fisher"), expected, rtol=1e-3, atol=1e-8)


def test_labels_are_a_mask_of_what_is_predicted() -> None:
    batch = {"labels": torch.tensor([[-100, 0, 7], [3, -100, -100]])}
    found, missing = batch_mask(batch, "labels", "observe")
    assert missing is None
    assert found is not None
    assert found.tolist() == [[False, True, True], [True, False, False]]
    found, _ = batch_mask({"text": batch}, "text.labels", "observe")
    assert found is not None
    assert found.tolist() == [[False, True, True], [True, False, False]]
    _, missing = batch_mask({"input_ids": batch["labels"]}, "labels", "observe")
    assert missing is not None
    assert "leaves padding out by the batch's 'labels'" in missing


# Properties


def seen_in(model: nn.Module, batches: list[tuple[Tensor, Tensor | None]]) -> Statistics:
    """Of all batches; an example's loss depends on its tokens only, each by itself."""
    with observe(model, kinds=KINDS, targets=["*"]) as recorder:
        for x, mask in batches:
            with recorder.step(mask):
                out = model(x)
                recorder.commit(len(x), terms=len(x))
                real = torch.ones(x.shape[:2]) if mask is None else mask
                loss = out.square().sum(-1).where(real != 0, 0.0).sum() / len(x)
                loss.backward()
    return recorder.statistics


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_padding_and_the_order_of_examples_change_no_statistic(
    data: st.DataObject, lengths: list[int], more: int
) -> None:
    torch.manual_seed(sum(lengths) + more)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    examples = [torch.randn(length, 3) for length in lengths]
    order = data.draw(st.permutations(range(len(lengths))))
    longest = max(lengths) + more
    before = [data.draw(st.integers(0, longest - len(examples[i]))) for i in order]
    x, mask = torch.randn(len(lengths), longest, 3), torch.zeros(len(lengths), longest)
    for row, (i, start) in enumerate(zip(order, before, strict=True)):
        x[row, start : start + lengths[i]] = examples[i]
        mask[row, start : start + lengths[i]] = 1
    alone = seen_in(model, [(example[None], None) for example in examples])
    together = seen_in(model, [(x, mask)])
    assert together.tokens == alone.tokens == sum(lengths)
    for name in ("0", "2"):
        one, other = (found.of(name, KINDS) for found in (alone, together))
        assert (one.tokens, one.examples) == (other.tokens, other.examples)
        for kind in KINDS:
            torch.testing.assert_close(other.moment(kind), one.moment(kind), rtol=1e-4, atol=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_tokens_of_any_mask_are_those_it_marks_in_every_layout(rows: list[list[bool]]) -> None:
    grid = torch.tensor(rows)
    x = numbered(*grid.shape)
    real = set(x[grid][:, 0].tolist())
    mask = Mask(grid)
    for layout in (x, x.flatten(0, 1), x[:, None].expand(-1, 3, -1, -1)):
        assert kept(layout, mask.fit(layout)) == real
    turned = x.transpose(0, 1)
    assert kept(turned, mask.fit(turned, sequence_first=True)) == real
    found = mask.fit(x).by_example(x)
    assert torch.equal(found, torch.where(grid[..., None], x, 0))
