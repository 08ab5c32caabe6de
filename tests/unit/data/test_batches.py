import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from lisatune.data.batches import IGNORE, Order, collate, my_share
from lisatune.distributed import ranks


def test_collate_pads_on_the_right_without_loss() -> None:
    rows = [{"input_ids": tensor(ids), "labels": tensor([-100, *ids[1:]])} for ids in ([5, 6], [7, 8, 9])]
    batch = collate(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 5], [7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        collate([])


def test_positions_of_packed_rows_restart_at_each_document_and_each_padding_token() -> None:
    rows = [
        {"input_ids": torch.ones(5), "labels": torch.ones(5), "seq_lengths": tensor([3, 2])},
        {"input_ids": torch.ones(7), "labels": torch.ones(7), "seq_lengths": tensor([7])},
    ]
    assert collate(rows)["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("rows_per_record", [1, 2])
def test_ranks_share_whole_records_and_an_empty_share_has_no_loss(
    monkeypatch: pytest.MonkeyPatch, rows_per_record: int
) -> None:
    rows = [
        {"input_ids": tensor([i, i, i]), "labels": tensor([i, i, i]), "number": tensor([i])}
        for i in range(3 * rows_per_record)
    ]
    monkeypatch.setattr(ranks, "count", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(collate(my_share(rows, rows_per_record)))
    numbers = [share["number"].tolist() for share in shares]
    assert numbers == [[*range(i, i + rows_per_record)] for i in (0, rows_per_record, 2 * rows_per_record, 0)]
    assert [bool((share["labels"] == IGNORE).all()) for share in shares] == [False, False, False, True]


def test_the_end_of_an_empty_share_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": tensor([1] * 5), "labels": tensor([1] * 5), "last": tensor([4])}] * 2
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    share = collate(my_share(rows, 2))
    assert (share["input_ids"].shape, share["last"].tolist()) == ((2, 2), [1, 1])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**63))
def test_every_epoch_visits_each_row_once(num_rows: int, batch_size: int, seed: int) -> None:
    order = Order(num_rows, batch_size, seed)
    per_epoch = order.batches_per_epoch
    for epoch in range(3):
        batches = [order.batch(epoch * per_epoch + index) for index in range(per_epoch)]
        assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert 0 < len(batches[-1]) <= batch_size


def test_a_batch_depends_on_seed_and_micro_step_alone() -> None:
    order = Order(100, 8, seed=3)
    straight = [order.batch(step) for step in range(40)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    resumed = Order(100, 8, seed=3)
    assert [resumed.batch(step) for step in (39, 0, 17)] == [straight[step] for step in (39, 0, 17)]
    assert torch.equal(torch.get_rng_state(), state)
    assert straight[0] != straight[13]
    assert straight[0] != Order(100, 8, seed=4).batch(0)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(0, 1), (1, 0)])
def test_an_order_of_nothing_is_an_error(num_rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="order needs rows and a batch size >= 1"):
        Order(num_rows, batch_size, 0)
