"""The order of samples: every epoch a permutation of all, the same whatever the hosts, found in no time."""

import numpy as np
import pytest

from tests.trainer.small import config_of
from trainer.data.order import Order, ProcessStream, choose_num_lanes, epoch_seed, eval_order, train_order


def blocks(n: int, mean: int, seed: int = 0) -> np.ndarray:
    """First records of blocks of unequal sizes."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, n), max(n // mean, 1) - 1, replace=False)
    return np.concatenate([[0], np.sort(cuts)])


ORDERS = {
    "blocks": Order(997, 3, "blocks", blocks(997, 20), lanes=16, window=24),
    "lanes as many as samples": Order(16, 3, "blocks", blocks(16, 4), lanes=16, window=8),
    "fewer samples than a round of lanes": Order(7, 3, "blocks", blocks(7, 3), lanes=16, window=8),
    "one block": Order(50, 3, "blocks", np.array([0]), lanes=4, window=5),
    "windows of one": Order(50, 3, "blocks", blocks(50, 5), lanes=4, window=1),
    "global": Order(997, 3, "global", window=32),
    "one sample": Order(1, 3, "global"),
    "as stored": Order(997, 3, "none", window=32),
    "as stored, in lanes": Order(997, 3, "none", lanes=16, window=10),
}


def epoch(order: Order, number: int) -> list[int]:
    n = order.num_examples
    return order.indices(np.arange(number * n, (number + 1) * n)).tolist()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_each_epoch_is_a_permutation_of_all(order: Order) -> None:
    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(order.num_examples))


@pytest.mark.parametrize("shuffle", ["blocks", "global"])
def test_epochs_and_seeds_differ_and_no_epoch_is_another_seeds(shuffle: str) -> None:
    orders = [Order(100, seed, shuffle, blocks(100, 5), 4, 8) for seed in range(4)]  # type: ignore[arg-type]
    assert len({tuple(epoch(order, number)) for order in orders for number in range(4)}) == 16


def test_unshuffled_is_as_stored() -> None:
    assert epoch(ORDERS["as stored"], 1) == list(range(997))


def test_the_order_never_changes_from_one_release_to_the_next() -> None:
    # A run that is resumed by a newer podlaunch must see the samples that it would have seen.
    assert epoch_seed(7, 3) == 708_825_980
    assert epoch(Order(10, 7, "global"), 2) == [2, 4, 5, 3, 6, 0, 9, 8, 1, 7]
    order = Order(16, 7, "blocks", np.array([0, 3, 8, 12]), lanes=2, window=4)
    assert epoch(order, 2) == [5, 15, 3, 0, 6, 2, 4, 8, 12, 9, 14, 1, 13, 10, 7, 11]


def test_blocks_are_mixed_as_well_as_by_a_buffer_of_lanes_times_window() -> None:
    order = Order(20_000, 1, "blocks", np.arange(0, 20_000, 40), lanes=64, window=128)
    indices = np.array(epoch(order, 0))
    batches = indices[: 20_000 // 256 * 256].reshape(-1, 256)
    # Neighbours in the stream are a third of the dataset apart, as in a uniform permutation (1/3).
    assert np.abs(np.diff(indices)).mean() / 20_000 == pytest.approx(1 / 3, abs=0.02)
    # Class-sorted data, 100 classes: a batch has nearly as many classes as of a uniform permutation (92.4).
    assert np.mean([len(set(batch // 200)) for batch in batches]) > 85


def positions(order: Order, steps: int, batch: int, hosts: int, start: int = 0) -> np.ndarray:
    """(steps, batch) positions as `hosts` hosts of equal rows read them."""
    rows = np.arange(batch).reshape(hosts, -1)
    streams = [ProcessStream(order, start, start + steps * batch, batch, ours) for ours in rows]
    read = [np.array([d.position(i) for i in range(len(d))]).reshape(steps, -1) for d in streams]
    return np.concatenate(read, axis=1)


@pytest.mark.parametrize("name", ["blocks", "global", "as stored", "one block"])
def test_batches_are_the_same_for_every_number_of_hosts(name: str) -> None:
    order = ORDERS[name]
    alone = positions(order, 100, 16, 1)  # over more than one epoch
    assert sorted(alone.ravel()) == list(range(1600))
    for hosts in (2, 4, 8, 16):
        np.testing.assert_array_equal(positions(order, 100, 16, hosts), alone)


def test_a_run_saved_on_four_hosts_goes_on_with_two_or_eight() -> None:
    order = ORDERS["blocks"]
    whole = positions(order, 100, 16, 4)
    for hosts in (1, 2, 8):
        rest = positions(order, 63, 16, hosts, start=37 * 16)
        np.testing.assert_array_equal(np.concatenate([whole[:37], rest]), whole)


@pytest.mark.parametrize("name", ["blocks", "as stored, in lanes", "global"])
@pytest.mark.parametrize("start", [0, 5 * 16])
def test_a_hosts_windows_hold_what_it_reads_and_are_told_before_their_use(name: str, start: int) -> None:
    order = ORDERS[name]
    streams = [
        ProcessStream(order, start, start + 100 * 16, 16, rows) for rows in np.arange(16).reshape(4, 4)
    ]
    for stream in streams:
        told = list(stream.windows())
        first_use = {}
        for i in range(len(stream)):
            position = stream.position(i)
            assert position is not None
            first_use.setdefault(order.locate(position)[0], i // 4)
        assert {key: batch for batch, key in told} == first_use
        assert [batch for batch, _ in told] == sorted(batch for batch, _ in told)
        wanted = [order.positions(key)[stream.includes(order.positions(key))] for _, key in told]
        assert sorted(np.concatenate(wanted)) == sorted(stream.position(i) for i in range(len(stream)))  # type: ignore[type-var]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8, 16])
def test_where_hosts_divide_the_lanes_each_record_is_one_hosts(hosts: int) -> None:
    order = Order(9970, 3, "blocks", blocks(9970, 20), lanes=16, window=24)
    windows = [
        {key for _, key in ProcessStream(order, 0, 9600, 64, rows).windows()}
        for rows in np.arange(64).reshape(hosts, -1)
    ]
    assert sum(map(len, windows)) == len(set().union(*windows))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 360])
def test_evaluation_reads_every_sample_once_and_pads_the_rest(length: int) -> None:
    order = eval_order(config_of(), length, np.arange(0, length, 7))
    padded = -(-length // 32) * 32
    stream = ProcessStream(order, 0, padded, 32, np.arange(32), limit=length)
    read = [stream.position(i) for i in range(len(stream))]
    assert len(read) == padded
    assert sorted(order.indices(np.array([p for p in read if p is not None]))) == list(range(length))


def test_lanes_divide_the_batch_and_powers_of_two_of_hosts_divide_the_lanes() -> None:
    assert [choose_num_lanes(b, 64) for b in (1024, 256, 1000, 96, 97, 8, 1)] == [64, 64, 40, 32, 1, 8, 1]


def test_what_lies_in_memory_is_shuffled_sample_by_sample() -> None:
    assert train_order(config_of(), 100, None).shuffle == "global"
    assert train_order(config_of("data.shuffle=none"), 100, None).shuffle == "none"
    assert train_order(config_of(), 100, np.arange(0, 100, 9)).shuffle == "blocks"
