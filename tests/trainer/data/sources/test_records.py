"""The source `records`: the same training from a folder and a broken bucket, and what becomes of bad records."""

from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from tests import gcs as cloud
from tests.trainer import datasets
from tests.trainer.small import Recorder, config_of, run
from trainer.data import open_splits
from trainer.data.batches import Batches, eval_batches, train_batches
from trainer.mesh import batch_sharding, make_mesh

N = 96
IMAGES = datasets.jpegs(N, size=16)
LABELS = [i % 10 for i in range(N)]
BUCKET = f"gs://{cloud.BUCKET}/data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    datasets.write(tmp_path / "data", IMAGES, LABELS)
    return tmp_path / "data"


def settings(place: object, *overrides: str) -> tuple[str, ...]:
    split = f"{{path: '{place}', num_examples: {N}}}"
    return (
        "data.source=records",
        f"data.train={split}",
        f"data.eval={split}",
        "augment.flip=true",
        *overrides,
    )


def batches(config: RunConfig, *, steps: int = 6, position: int = 0, seen: str = "train") -> list[tuple]:
    """(images, labels) of each batch."""
    train, held_out = open_splits(config)
    sharding = batch_sharding(make_mesh(4, 1))
    stream: Batches = (
        train_batches(config, train, sharding, position=position, steps=steps)
        if seen == "train"
        else eval_batches(config, held_out, sharding)
    )
    with closing(stream):
        return [(np.asarray(b.images), np.asarray(b.labels)) for b in stream]


def assert_same(a: list[tuple], b: list[tuple]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_array_equal(x[1], y[1])


def leaves_of(directory: Path, step: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return jax.tree.map(np.asarray, restored.state)


def test_a_bucket_with_faults_trains_the_same_bits_as_a_folder(
    folder: Path, gcs: cloud.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.storage.fetch.MIN_WAIT_SECONDS", 0.01)
    gcs.put_folder(folder, "data/")
    gcs.faults += [
        cloud.Fault("status", object="data/part-*", status=503, share=0.2),
        cloud.Fault("corrupt", object="data/part-*", share=0.2, seed=1),
        cloud.Fault("short", object="data/part-*", share=0.2, seed=2),
    ]
    for name, place in (("local", folder), ("cloud", BUCKET)):
        outcome = run(tmp_path / name, *settings(place), steps=6)
        assert outcome.metrics["eval/count"] == N
    one, other = (leaves_of(tmp_path / name, 6) for name in ("local", "cloud"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_reading_does_is_in_the_report(folder: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    run(tmp_path / "run", *settings(folder), steps=5, recorder=recorder)
    said = {key: value for words in recorder.reports for key, value in words.items()}
    assert said["bound"] in ("input-bound", "compute-bound")
    assert said["data/requests"] > 0
    assert said["data/get_p50_ms"] > 0
    # The container's own bytes are more than the tiny images here.
    assert said["data/fetched_per_used"] > 0


@pytest.mark.parametrize("shuffle", ["blocks", "global", "none"])
def test_augmentation_and_order_are_the_positions_alone(shuffle: str, folder: Path) -> None:
    config = config_of(*settings(folder, f"data.shuffle={shuffle}", "data.window=8"))
    whole = batches(config, steps=6)
    assert_same(whole[4:], batches(config, steps=2, position=4 * 32))
    labels = np.concatenate([b[1] for b in whole[:3]])
    assert sorted(labels.tolist()) == sorted(LABELS)  # 3 batches are one epoch
    assert not np.array_equal(whole[0][0], whole[3][0])  # another epoch, other crops


def test_evaluation_counts_every_record_once(folder: Path) -> None:
    config = config_of(*settings(folder, "train.batch_size=40"))
    labels = np.concatenate([b[1] for b in batches(config, seen="eval")])
    assert len(labels) == 120
    assert sorted(labels[labels >= 0].tolist()) == sorted(LABELS)


# Bad records


def damage(folder: Path, *indices: int) -> list[str]:
    """Flip a byte of these records on disk, and return their shards."""
    config = config_of(*settings(folder))
    dataset = open_splits(config)[0]._dataset  # type: ignore[attr-defined]
    names = []
    for index in indices:
        shard = dataset.objects[int(dataset.shard_of(np.array(index)))].name
        content = bytearray((folder / shard).read_bytes())
        content[int(dataset.records["offset"][index]) + 5] ^= 0xFF
        (folder / shard).write_bytes(content)
        names.append(shard)
    return names


def test_a_bad_record_ends_the_run_and_is_named(folder: Path) -> None:
    (shard,) = damage(folder, 40)
    with pytest.raises(
        UserError, match=rf"{folder}/{shard}, record 8 \(bytes \d+ to \d+\): .*substitute or mask"
    ):
        batches(config_of(*settings(folder)))


def test_a_run_that_a_bad_record_ended_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    good = {f.name: f.read_bytes() for f in folder.iterdir()}
    overrides = settings(folder, "checkpoint.every_steps=1", "data.prefetch_batches=1")
    run(tmp_path / "whole", *overrides, steps=6)
    damage(folder, *range(60, 64))
    with pytest.raises(UserError, match="do not match their checksum"):
        run(tmp_path / "broken", *overrides, steps=6)
    for name, content in good.items():
        (folder / name).write_bytes(content)
    run(tmp_path / "broken", *overrides, steps=6)
    jax.tree.map(
        np.testing.assert_array_equal, leaves_of(tmp_path / "whole", 6), leaves_of(tmp_path / "broken", 6)
    )


def test_substitute_takes_the_next_good_record_of_the_dataset(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = config_of(*settings(folder, "data.shuffle=none", "augment.crop_scale=[1, 1]"))
    before = batches(plain, steps=3)
    damage(folder, 40, 41)
    config = config_of(
        *settings(folder, "data.shuffle=none", "data.on_bad_record=substitute", "augment.crop_scale=[1, 1]")
    )
    after = batches(config, steps=3)
    labels = np.concatenate([b[1] for b in after]).tolist()
    assert labels == [*LABELS[:40], LABELS[42], LABELS[42], *LABELS[42:]]
    assert_same([before[0], before[2]], [after[0], after[2]])
    assert caplog.text.count("do not match their checksum") == 2


def test_mask_leaves_a_hole_that_counts_for_nothing(folder: Path) -> None:
    damage(folder, 40)
    config = config_of(*settings(folder, "data.shuffle=none", "data.on_bad_record=mask"))
    labels = np.concatenate([b[1] for b in batches(config, steps=3)]).tolist()
    assert labels == [*LABELS[:40], -1, *LABELS[41:]]


def test_an_image_that_does_not_decode_is_a_bad_record_too(tmp_path: Path) -> None:
    images = [*IMAGES[:50], IMAGES[50][:100], *IMAGES[51:]]
    datasets.write(tmp_path, images, LABELS)
    with pytest.raises(UserError, match=r"record 18 .*substitute or mask"):
        batches(config_of(*settings(tmp_path)))
    config = config_of(*settings(tmp_path, "data.on_bad_record=mask"))
    assert sum((b[1] < 0).sum() for b in batches(config, steps=3)) == 1


def test_too_many_bad_records_end_the_run(folder: Path) -> None:
    damage(folder, *range(30, 40))
    config = config_of(*settings(folder, "data.on_bad_record=mask", "data.max_bad_records=9"))
    with pytest.raises(
        UserError, match=r"10 bad records, more than data.max_bad_records = 9; .*launch data verify"
    ):
        batches(config, steps=3)
