"""What is seen of embeddings: exact counts, squared gradients by row, and how they merge."""

import pytest
import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import Statistics, Sums
from lrcompress.statistics.reduction import _buckets, reduced_bytes
from lrcompress.statistics.views import is_embedding, is_linear, view

KINDS = ("token_count", "token_fisher", "input_moment")


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        return self.head(x.tanh())


IDS = torch.tensor([[1, 2, 1, 8], [1, 3, 0, 0]])
MASK = (IDS > 0).long()


def observed(model: Reader, *names: str, scale: float = 1.0, repeat: int = 1) -> Statistics:
    recorder = Recorder(model, names, KINDS, shared=True)
    for _ in range(repeat):
        with recorder.step(MASK):
            loss = torch.nn.functional.cross_entropy(model(IDS)[MASK.bool()], IDS[MASK.bool()])
            recorder.commit(scale)
            loss.backward()
    assert recorder.nbytes >= recorder.statistics.nbytes
    return recorder.statistics


def test_tokens_are_counted_and_padding_is_not() -> None:
    torch.manual_seed(0)
    found = observed(Reader(), "words", "places", "head", repeat=3)
    count = found.inputs["words"].values["token_count"]
    assert count.dtype == torch.int64
    assert count.tolist() == [0, 9, 3, 3, 0, 0, 0, 0, 3]
    assert found.inputs["places"].values["token_count"].tolist() == [3, 3, 3, 3, 0]  # once a step
    assert found.inputs["head"].moment("input_moment").shape == (4, 4)
    assert "input_moment" not in found.inputs["words"].values
    assert (found.steps, found.tokens) == (3, 18)


def test_the_fisher_of_a_row_is_the_sum_of_its_tokens_squared_gradients() -> None:
    torch.manual_seed(0)
    model = Reader()
    found = observed(model, "words", "places", scale=2.0)
    seen: list[Tensor] = []

    def take(_layer: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(seen.append)

    model.words.register_forward_hook(take)
    torch.nn.functional.cross_entropy(model(IDS)[MASK.bool()], IDS[MASK.bool()]).backward()
    expected = torch.zeros(9)
    for token, g in zip(IDS[MASK.bool()], 2 * seen[0][MASK.bool()], strict=True):
        expected[token] += g.square().sum()
    torch.testing.assert_close(found.outputs["words"].values["token_fisher"], expected)
    assert found.outputs["words"].values["token_fisher"][0] == 0
    assert found.outputs["places"].values["token_fisher"].all().item() is False


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    sums = Sums.zeros({"token_fisher": (4,)})
    sums.add_row_gradients_(torch.tensor([[1], [2]]), torch.tensor([[1.0], [torch.inf]]), 1)
    assert not sums.values["token_fisher"].any()
    assert (sums.skipped.item(), sums.tokens.item()) == (1, 0)


def test_counts_stay_exact_where_float32_would_stall() -> None:
    one, many = Sums.zeros({"token_count": (2,)}), 2**24 + 1
    one.values["token_count"][0] = many
    one.add_rows_(torch.tensor([[0], [0], [1]]))
    other = Sums.from_state(one.state_dict(), "cpu")
    other.merge_(one)
    assert other.values["token_count"].tolist() == [2 * (many + 2), 2]


def test_buckets_hold_one_type_each() -> None:
    sums = [Sums.zeros({"token_count": (5,), "token_fisher": (5,)}) for _ in range(2)]
    parts = list(_buckets(sums, 1000))
    assert [len({part.dtype for part in bucket}) for bucket in parts] == [1] * len(parts)
    assert sum(part.numel() for bucket in parts for part in bucket) == 20
    assert reduced_bytes(Statistics(inputs={"a": sums[0]})) == 5 * 8 + 5 * 4 + 24


def test_sequences_without_a_mask_raise_if_one_was_expected() -> None:
    model = Reader()
    recorder = Recorder(model, ["words"], KINDS)
    with pytest.raises(ObservationError, match="no mask"), recorder.step(missing="no mask"):
        model(IDS)


def test_an_embedding_is_a_table_and_no_linear_layer() -> None:
    layer = nn.Embedding(5, 3)
    assert is_embedding(layer)
    assert not is_linear(layer)
    assert view(layer, table=True).shape == (5, 3)
    assert view(layer, table=True).weight.data_ptr() == layer.weight.data_ptr()
    assert not is_embedding(nn.Linear(2, 2))
