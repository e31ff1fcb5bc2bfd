"""What a batch says of itself."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from transformers import BatchEncoding

from lrcompress.errors import ObservationError
from lrcompress.statistics.batches import (
    batch_examples,
    batch_shape,
    batch_terms,
    loss_terms,
    resized_batch,
)

FOUR = torch.zeros(4, 7)


@pytest.mark.parametrize(
    "batch",
    [
        FOUR,
        (FOUR, torch.zeros(2)),
        [FOUR],
        {"x": FOUR, "y": torch.zeros(4)},
        BatchEncoding({"input_ids": FOUR}),
        ({"x": [FOUR]}, torch.zeros(2)),
        {"text": ["a", "b"], "ids": [7, 8], "x": FOUR},
        [[], {}, None, "text", 3, (FOUR,)],
        {"weight": torch.tensor(2.0), "x": FOUR},
    ],
    ids=["tensor", "tuple", "list", "dict", "encoding", "nested", "text", "empty", "scalar"],
)
def test_examples_are_the_leading_size_of_the_first_tensor_that_has_one(batch: Any) -> None:
    assert batch_examples(batch) == 4


def test_a_scalar_alone_is_one_example() -> None:
    assert batch_examples({"x": torch.tensor(3.0)}) == 1


@pytest.mark.parametrize("batch", [[], {}, "text", None, 3, ["text", {"a": None}]])
def test_a_batch_without_a_tensor_is_named_by_its_type(batch: Any) -> None:
    kind = type(batch).__name__
    with pytest.raises(ObservationError, match=f"no tensor in a batch of type {kind}"):
        batch_examples(batch)


def test_a_loss_is_the_mean_of_its_predicted_tokens_or_of_its_examples() -> None:
    tokens = torch.tensor([[3, -100, 4], [4, 5, -100]])
    assert batch_terms({"input_ids": tokens, "labels": tokens}) == 4
    assert batch_terms(BatchEncoding({"labels": torch.full((2, 3), -100)})) == 1
    for labels in (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)):
        assert batch_terms({"labels": labels}) == 2, "several labels an example, or one"
    assert batch_terms((FOUR,)) == 4


def test_without_labels_the_terms_are_those_that_the_cross_entropy_has_averaged() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :2] = -100
    tokens = torch.ones(2, 5, dtype=torch.int64)
    by_class = F.cross_entropy(logits.mT, labels)
    flat = F.cross_entropy(logits.view(-1, 7), labels.view(-1), label_smoothing=0.1)
    for loss in (by_class, by_class / 4, flat, flat + 0.01 * logits.square().mean()):
        assert loss_terms(loss) == batch_terms((tokens, labels), loss) == 8
    assert batch_terms({"labels": tokens}, by_class) == 10  # labels say it
    ends = F.cross_entropy(logits[:, 0], labels[:, 3]) + F.cross_entropy(logits[:, 1], labels[:, 4])
    assert loss_terms(ends) == 2  # of a question's answer


def test_where_a_cross_entropy_does_not_say_how_many_terms_it_averages_examples_count() -> None:
    logits, labels = torch.randn(4, 7, requires_grad=True), torch.tensor([1, 2, 3, -100])
    unknown = [
        F.cross_entropy(logits, labels, weight=torch.rand(7)),
        F.cross_entropy(logits, labels, reduction="sum") / 3,
        F.cross_entropy(logits, labels, reduction="none").mean(),
        F.cross_entropy(logits, labels) + F.cross_entropy(logits[:2], labels[:2]),
        logits.square().mean(),
        logits.mean().detach(),
    ]
    for loss in unknown:
        assert loss_terms(loss) is None
        assert batch_terms((torch.ones(5, 3),), loss) == 5


class Pair(NamedTuple):
    ids: torch.Tensor
    labels: torch.Tensor


IDS = torch.arange(6).reshape(2, 3)
TWICE = torch.tensor([[0, 1], [3, 4], [0, 1]])


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_batch_of_another_shape_repeats_or_cuts_what_there_is(kind: Any) -> None:
    batch = kind({"ids": IDS, "labels": torch.tensor([7, 8]), "n": 3, "one": torch.tensor(4)})
    batch["mask"] = torch.ones(2, 1, 3, 3)
    new = resized_batch(batch, 3, 2)
    assert type(new) is kind
    assert batch_shape(batch) == (2, 3)
    assert batch_shape(new) == (3, 2)
    assert torch.equal(new["ids"], TWICE)
    assert new["labels"].tolist() == [7, 8, 7]
    assert new["n"] == 3
    assert new["one"] == 4
    assert new["mask"].shape == (3, 1, 3, 3)
    assert batch["ids"] is IDS


def test_a_batch_of_another_shape_stays_the_tuple_it_was() -> None:
    new = resized_batch(Pair(IDS, torch.tensor([7, 8])), 3, 2)
    assert isinstance(new, Pair)
    assert torch.equal(new.ids, TWICE)
    (ids, labels) = resized_batch([IDS, {"y": (torch.tensor([7, 8]),)}], 1, 3)
    assert ids.tolist() == [[0, 1, 2]]
    assert labels["y"][0].tolist() == [7]


def test_the_shape_is_that_of_the_largest_table_of_whole_numbers() -> None:
    small, large = torch.zeros(9, 2, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)
    cube, wide = torch.zeros(2, 30, 4, dtype=torch.int64), torch.zeros(8, 8)
    assert batch_shape([small, cube, large, wide]) == (4, 5)
    assert batch_shape([large, small]) == (4, 5)
    assert batch_shape([cube]) == (2,)


def test_a_loss_of_no_token_is_that_of_one() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    assert loss_terms(F.cross_entropy(logits, torch.full((3,), -100))) == 1
    assert loss_terms(F.cross_entropy(logits, torch.tensor([-100, 2, -100]))) == 1


def test_a_batch_without_tokens_has_examples_alone() -> None:
    images = torch.zeros(2, 3, 8, 8)
    assert batch_shape([images, torch.tensor([0, 1])]) == (2,)
    assert resized_batch([images, torch.tensor([0, 1])], 5, 99)[0].shape == (5, 3, 8, 8)
    with pytest.raises(ObservationError, match="no tensor in a batch"):
        resized_batch({}, 1, 1)
