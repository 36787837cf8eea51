"""The sources that lie in memory: every digit in one split, noise that stays in range."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from configs.files import cache_folder
from tests.trainer.small import config_of
from trainer.data import open_splits
from trainer.data.order import Order, ProcessStream
from trainer.data.sources import digits
from trainer.data.split import Sample, Split


def samples(split: Split) -> list[Sample]:
    """All of a split, as stored."""
    n = len(split)
    stream = ProcessStream(Order(n, 0, "none"), 0, n, 1, np.arange(1))
    with closing(split.samples(stream, train=True)) as found:
        return [found[i] for i in range(n)]


def test_digits_are_scikit_learns_each_in_one_split() -> None:
    train, held_out = open_splits(config_of())
    assert (len(train), len(held_out)) == (1437, 360)
    everything = samples(train) + samples(held_out)
    ours = sorted((int(s.label), s.image[..., 0].tobytes()) for s in everything)
    raw = load_digits()
    theirs = sorted(
        (int(label), np.rint(image * (255 / 16)).astype(np.uint8).tobytes())
        for image, label in zip(raw.images, raw.target, strict=True)
    )
    assert ours == theirs
    assert everything[0].image.shape == (8, 8, 3)


def test_digits_written_by_many_at_once_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digits.write, [folder] * 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits"]
    assert len(digits.read(folder / "train.array_record", 8)) == 1437


def test_digits_are_cached_where_the_user_says() -> None:
    open_splits(config_of())
    assert (cache_folder() / "digits-v1" / "eval.array_record").is_file()


def test_synthetic_samples_repeat_and_stay_in_range() -> None:
    config = config_of("data.source=synthetic", "data.train.num_examples=1000", "data.eval.num_examples=10",
                       "model.num_classes=5", "data.image_size=16")  # fmt: skip
    train, held_out = open_splits(config)
    assert (len(train), len(held_out)) == (1000, 10)
    found = samples(train)
    assert found[3].image.shape == (16, 16, 3)
    assert np.array_equal(found[3].image, found[67].image)
    assert {int(sample.label) for sample in found} <= set(range(5))
    assert train.digest != held_out.digest
