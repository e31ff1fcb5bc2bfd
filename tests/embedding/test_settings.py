"""Which tables are meant, who else reads them, and how narrow they become."""

import pytest
from torch import nn

from lrcompress.embedding.settings import METHODS, EmbeddingSettings, EmbeddingTable, parameters_of
from lrcompress.errors import NoMatchError, SettingError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(100, 16, padding_idx=1), nn.Embedding(100, 16)
        self.places, self.head = nn.Embedding(12, 16), nn.Linear(16, 100)
        self.again.weight = self.head.weight = self.words.weight


def test_a_table_knows_all_that_hold_it() -> None:
    tables = EmbeddingSettings(keep=0.5, targets=["again"]).tables(Model())
    assert tables == [EmbeddingTable("words", ("again",), ("head",), (100, 16), 1)]
    settings = EmbeddingSettings(keep=0.5, targets="*", exclude=["places"])
    assert settings.select(Model()).names == ("words", "again")
    assert settings.watched(Model()) == ("words", "again", "head")
    assert EmbeddingSettings(keep=0.5, targets="words", heads="untied").watched(Model()) == (
        "words",
        "again",
    )


def test_without_targets_it_takes_the_input_embedding_or_the_only_one() -> None:
    model = Model()
    with pytest.raises(NoMatchError, match=r"which of 3 embeddings is the tokens'\? Name it"):
        EmbeddingSettings(keep=0.5).tables(model)
    model.get_input_embeddings = lambda: model.places  # type: ignore[assignment]
    assert [x.name for x in EmbeddingSettings(keep=0.5).tables(model)] == ["places"]
    alone = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    assert [x.name for x in EmbeddingSettings(keep=0.5).tables(alone)] == ["0"]
    with pytest.raises(NoMatchError, match=r"which of 0 embeddings .*there is none"):
        EmbeddingSettings(keep=0.5).tables(nn.Linear(2, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.05, 0.17, 0.5, 1.0])
def test_keep_is_met_from_below_as_closely_as_the_form_allows(method: str, keep: float) -> None:
    table = EmbeddingTable("words", (), (), (5000, 96), None)
    rank = EmbeddingSettings(method=method, keep=keep).rank_of(table)
    held = METHODS[method](5000, 96, rank)
    dense = 5000 * 96
    assert sum(p.numel() for p in held.parameters()) == parameters_of(type(held), table.shape, rank)
    assert parameters_of(type(held), table.shape, rank) <= min(keep * dense, dense - 1)
    possible = [r for r in range(1, 97) if method != "kronecker" or 96 % r == 0]
    larger = [
        r
        for r in possible
        if r > rank and parameters_of(type(held), table.shape, r) <= min(keep * dense, dense - 1)
    ]
    assert all(r <= rank / 0.9 for r in larger)  # what alignment may cost
    assert EmbeddingSettings(method=method, rank=rank).rank_of(table) == rank


def test_statistics_are_those_that_are_needed() -> None:
    assert EmbeddingSettings(keep=0.5).kinds == ("token_count", "input_moment")
    assert EmbeddingSettings(keep=0.5, head_share=0).kinds == ("token_count",)
    assert EmbeddingSettings(keep=0.5, method="safe").kinds == ("token_count",)
    assert EmbeddingSettings(keep=0.5, weighting="none", heads="untied").kinds == ()
    fisher = EmbeddingSettings(keep=0.5, weighting="fisher", heads="untied").kinds
    assert fisher == ("token_count", "token_fisher")


def test_a_table_too_small_to_gain_is_named() -> None:
    small = EmbeddingTable("types", (), (), (2, 16), None)
    with pytest.raises(SettingError, match=r"keep=0.5 is not possible for table 'types'"):
        EmbeddingSettings(keep=0.5).rank_of(small)
    with pytest.raises(SettingError, match=r"rank 2 does not make table 'types' .*from 1 to 1"):
        EmbeddingSettings(rank=2).rank_of(small)
