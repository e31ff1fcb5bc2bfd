import numpy as np
import pytest
import torch

from lrcompress.errors import SettingError
from lrcompress.tasks.batches import BatchLoader, collate, grouped_batches

LENGTHS = np.random.default_rng(0).integers(3, 60, size=1003)


def flat(rounds: list[list[np.ndarray]]) -> list[int]:
    return [int(row) for batches in rounds for rows in batches for row in rows]


def padding(rounds: list[list[np.ndarray]]) -> float:
    batches = [LENGTHS[rows] for of_ranks in rounds for rows in of_ranks]
    return sum((rows.max() - rows).sum() for rows in batches) / LENGTHS.sum()


@pytest.mark.parametrize("shuffle", [None, (0, 0)])
@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (32, 1), (32, 3), (2000, 2)])
def test_every_row_is_once_in_batches_of_almost_one_size(
    batch_size: int, ranks: int, shuffle: tuple[int, int] | None
) -> None:
    rounds = grouped_batches(LENGTHS, batch_size, ranks, shuffle)

    sizes = [len(rows) for batches in rounds for rows in batches]
    assert sorted(flat(rounds)) == list(range(len(LENGTHS)))
    assert {len(batches) for batches in rounds} == {ranks}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = []
    for shuffle in [(0, 0), (0, 1), (1, 0)]:
        torch.manual_seed(5)
        first = flat(grouped_batches(LENGTHS, 8, shuffle=shuffle))
        torch.manual_seed(6)
        assert flat(grouped_batches(LENGTHS, 8, shuffle=shuffle)) == first
        orders.append(tuple(first))
    assert len(set(orders)) == 3


def test_grouping_spares_most_of_the_padding() -> None:
    by_chance = [[rows] for rows in np.array_split(np.arange(len(LENGTHS)), len(LENGTHS) // 8)]
    assert padding(grouped_batches(LENGTHS, 8, shuffle=(0, 0))) < padding(by_chance) / 5
    assert padding(grouped_batches(LENGTHS, 8)) < padding(by_chance) / 50


def test_ranks_of_a_round_have_similar_lengths() -> None:
    rounds = grouped_batches(LENGTHS, 8, ranks=2, shuffle=(0, 0))
    gaps = [abs(LENGTHS[a].mean() - LENGTHS[b].mean()) for a, b in rounds]
    assert np.mean(gaps) < LENGTHS.std() / 5


def test_refuses_fewer_rows_than_ranks() -> None:
    with pytest.raises(SettingError, match="2 rows are too few to give one to each of 3 ranks"):
        grouped_batches([4, 5], 8, ranks=3)


def test_collate_keeps_the_kind_of_label() -> None:
    for label, kind in [(1, torch.int64), (0.5, torch.float32)]:
        rows = [{"input_ids": [2, 3], "attention_mask": [1, 1], "labels": label}] * 2
        assert collate(rows, pad_id=0)["labels"].dtype == kind


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, row: int) -> int:
        return row


def loader(num_workers: int = 0) -> BatchLoader:
    def batches(epoch: int) -> list[np.ndarray]:
        return [rows for (rows,) in grouped_batches(range(10), 2, shuffle=(0, epoch))]

    return BatchLoader(Numbers(), batches, lambda epoch, rows: rows, num_workers)


def test_a_second_pass_starts_again_even_after_an_interrupted_one() -> None:
    one = loader()
    next(iter(one))
    assert list(one) == list(one) == list(loader())


def test_a_new_epoch_has_another_order() -> None:
    one = loader()
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("served", range(6))
def test_resumes_with_the_next_batch_whatever_was_prefetched(served: int, num_workers: int) -> None:
    interrupted, resumed = loader(num_workers), loader()
    interrupted.set_epoch(3)
    whole, batches = list(interrupted), iter(interrupted)
    seen = [next(batches) for _ in range(served)]

    resumed.load_state_dict(interrupted.state_dict() if served else {"epoch": 3, "served": 0})
    resumed.set_epoch(3)

    assert seen + list(resumed) == whole
    assert len(resumed) == 5


def test_a_position_is_forgotten_in_the_next_epoch() -> None:
    resumed, fresh = loader(), loader()
    resumed.load_state_dict({"epoch": 0, "served": 5})
    for each in (resumed, fresh):
        each.set_epoch(1)
    assert resumed.state_dict() == {"epoch": 1, "served": 0}
    assert list(resumed) == list(fresh)


def test_an_epoch_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)
