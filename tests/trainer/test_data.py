"""Order, pipeline and sources: each sample once an epoch, the same whatever reads it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from configs.files import cache_folder
from tests.trainer.small import config_of
from trainer.data import digits, open_splits
from trainer.data.order import epoch_seed, sample_index
from trainer.data.pipeline import eval_batches, local_rows, train_batches
from trainer.data.split import Sample
from trainer.mesh import make_mesh, rows


class Numbered:
    """Samples that say their own index in their label."""

    digest = "numbered"

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full((8, 8, 3), index % 256, np.uint8), np.array(index, np.int32))


def epoch(number: int, n: int, seed: int = 0) -> list[int]:
    return [sample_index(p, num_examples=n, seed=seed) for p in range(number * n, (number + 1) * n)]


@pytest.mark.parametrize("n", [1, 2, 7, 360, 1437])
def test_each_epoch_is_a_permutation_of_all(n: int) -> None:
    for number in range(3):
        assert sorted(epoch(number, n)) == list(range(n))


def test_epochs_and_seeds_differ_and_no_epoch_is_another_seeds() -> None:
    orders = {tuple(epoch(e, 100, seed)) for e in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes_from_one_release_to_the_next() -> None:
    # A run that is resumed by a newer podlaunch must see the samples that it would have seen.
    assert epoch_seed(7, 3) == 708_825_980
    assert epoch(2, 10, seed=7) == [2, 4, 5, 3, 6, 0, 9, 8, 1, 7]


def labels(batches: object) -> list[np.ndarray]:
    return [np.asarray(batch.labels) for batch in batches]  # type: ignore[attr-defined]


def test_batches_follow_the_order_across_the_end_of_an_epoch() -> None:
    config, split = config_of(), Numbered(50)
    found = labels(train_batches(config, split, rows(make_mesh(4, 1)), position=0, steps=5))
    expected = [sample_index(p, num_examples=50, seed=0) for p in range(5 * 32)]
    assert np.concatenate(found).tolist() == expected


def test_a_stream_that_begins_in_the_middle_is_the_rest_of_the_whole() -> None:
    config, split, sharding = config_of(), Numbered(50), rows(make_mesh(4, 1))
    whole = labels(train_batches(config, split, sharding, position=0, steps=6))
    rest = labels(train_batches(config, split, sharding, position=4 * 32, steps=2))
    np.testing.assert_array_equal(rest, whole[4:])


@pytest.mark.parametrize(("batch", "model"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("threads", [0, 3])
def test_the_global_batch_is_the_same_on_every_mesh(batch: int, model: int, threads: int) -> None:
    config, split = config_of(f"data.read_threads={threads}"), Numbered(70)
    found = labels(train_batches(config, split, rows(make_mesh(batch, model)), position=32, steps=2))
    assert np.concatenate(found).tolist() == [sample_index(p, num_examples=70, seed=0) for p in range(32, 96)]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 360])
def test_evaluation_sees_every_sample_once_and_marks_the_rest(length: int) -> None:
    found = np.concatenate(labels(eval_batches(config_of(), Numbered(length), rows(make_mesh(4, 1)))))
    assert found[found >= 0].tolist() == list(range(length))
    assert len(found) % 32 == 0


def test_a_process_reads_only_the_rows_of_its_devices() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("batch", "model"))
    assert local_rows(rows(mesh), 8).tolist() == list(range(8))
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "model"))
    assert local_rows(rows(alone), 8).tolist() == list(range(8))


def test_digits_are_scikit_learns_each_in_one_split() -> None:
    train, held_out = open_splits(config_of().data, 10)
    assert (len(train), len(held_out)) == (1437, 360)
    samples = [split[i] for split in (train, held_out) for i in range(len(split))]
    ours = sorted((int(s.label), s.image[..., 0].tobytes()) for s in samples)
    raw = load_digits()
    theirs = sorted(
        (int(label), np.rint(image * (255 / 16)).astype(np.uint8).tobytes())
        for image, label in zip(raw.images, raw.target, strict=True)
    )
    assert ours == theirs
    assert samples[0].image.shape == (8, 8, 3)


def test_digits_written_by_many_at_once_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digits.write, [folder] * 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits"]
    assert len(digits.Digits(folder / "train.array_record", 8)) == 1437


def test_digits_are_cached_where_the_user_says() -> None:
    open_splits(config_of().data, 10)
    assert (cache_folder() / "digits-v1" / "eval.array_record").is_file()


def test_synthetic_samples_repeat_and_stay_in_range() -> None:
    config = config_of("data.source=synthetic", "data.train.num_examples=1000", "data.eval.num_examples=10",
                       "model.num_classes=5", "data.image_size=16")  # fmt: skip
    train, held_out = open_splits(config.data, 5)
    assert (len(train), len(held_out)) == (1000, 10)
    assert train[3].image.shape == (16, 16, 3)
    assert np.array_equal(train[3].image, train[67].image)
    assert {int(train[i].label) for i in range(64)} <= set(range(5))
    assert train.digest != held_out.digest
