"""What a batch says of itself."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lrcompress.errors import ObservationError
from lrcompress.statistics.batches import (
    batch_decoder_mask,
    batch_examples,
    batch_mask,
    batch_terms,
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
    ("batch", "has"), [({"ids": FOUR, "y": FOUR}, "keys are ids, y"), ((FOUR, FOUR), "tuple")]
)
def test_a_missing_mask_says_what_there_is_and_how_to_go_on(batch: Any, has: str) -> None:
    mask, missing = batch_mask(batch, "attention_mask", "Owner")
    assert mask is None
    assert missing is not None
    assert missing.startswith("Owner leaves padding out by the batch's 'attention_mask'")
    assert f"({has}); name another with mask=, or pass mask=None if nothing is padded" in missing


def test_what_a_decoder_reads_is_told_by_its_mask_or_its_labels() -> None:
    labels, mask = torch.tensor([[3, -100], [4, 5]]), torch.tensor([[1, 1], [1, 0]])
    found = batch_decoder_mask({"labels": labels, "decoder_attention_mask": mask})
    assert found is mask
    by_labels = batch_decoder_mask(BatchEncoding({"labels": labels}))
    assert by_labels is not None
    assert by_labels.tolist() == [[True, False], [True, True]]
    for batch in ({"labels": torch.zeros(4)}, {"labels": ["a"]}, {"x": FOUR}, FOUR):
        assert batch_decoder_mask(batch) is None


def test_a_loss_is_the_mean_of_its_predicted_tokens_or_of_its_examples() -> None:
    tokens = torch.tensor([[3, -100, 4], [4, 5, -100]])
    assert batch_terms({"input_ids": tokens, "labels": tokens}) == 4
    assert batch_terms(BatchEncoding({"labels": torch.full((2, 3), -100)})) == 1
    for labels in (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)):
        assert batch_terms({"labels": labels}) == 2, "several labels an example, or one"
    assert batch_terms((FOUR,)) == 4
