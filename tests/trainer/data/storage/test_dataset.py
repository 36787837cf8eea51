"""Opening a dataset: what is not what its manifest says is refused in one line that names it."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from tests import gcs as cloud
from tests.trainer import datasets
from tests.trainer.small import config_of
from trainer.data import open_splits
from trainer.data.storage.dataset import RECORD_DTYPE, Dataset, open_dataset
from trainer.data.storage.store import Object

IMAGES = datasets.jpegs(40)
LABELS = [i % 10 for i in range(40)]


def refused(url: str) -> str:
    with pytest.raises(UserError) as e:
        open_dataset(url)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "no")) == f"{tmp_path}/no: there is no such folder"
    assert "is empty: no files lie directly in it" in refused(str(tmp_path))


def test_a_folder_that_has_only_splits_is_told_to_be_none(tmp_path: Path, gcs: cloud.Server) -> None:
    datasets.write(tmp_path / "train", IMAGES)
    gcs.put_folder(tmp_path / "train", "d/train/")
    for url in (str(tmp_path), f"gs://{cloud.BUCKET}/d"):
        assert "no files lie directly in it; name the folder of one split" in refused(url)


def test_a_bucket_that_is_not_there_or_empty_or_closed(gcs: cloud.Server) -> None:
    assert refused("gs://nowhere/x").startswith("gs://nowhere/x: there is no bucket nowhere; make it with")
    assert "is empty: no files lie directly in it" in refused(f"gs://{cloud.BUCKET}/x")
    assert "names no bucket" in refused("gs://")
    gcs.faults.append(cloud.Fault("status", operation="*", status=403))
    assert "no permission (HTTP 403); give them the role Storage Object Viewer" in refused(
        f"gs://{cloud.BUCKET}/x"
    )


@pytest.mark.parametrize("kind", ["corrupt", "short", "reset", "status"])
@pytest.mark.parametrize("name", ["manifest.json", "records.npy"])
def test_a_table_that_is_damaged_on_its_way_is_read_again(
    kind: str, name: str, tmp_path: Path, gcs: cloud.Server
) -> None:
    manifest = datasets.write(tmp_path, IMAGES)
    gcs.put_folder(tmp_path, "d/")
    gcs.faults.append(cloud.Fault(kind, object=f"d/{name}", count=1))  # type: ignore[arg-type]
    assert open_dataset(f"gs://{cloud.BUCKET}/d").manifest == manifest


def test_an_address_that_is_none() -> None:
    assert "lies in a folder or under gs://" in refused("s3://bucket/x")


def test_a_file_of_credentials_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file.json")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    assert "/no/such/file.json" in refused("gs://bucket/x")


def test_shards_without_a_manifest(tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES)
    (tmp_path / "manifest.json").unlink()
    assert "no manifest.json" in refused(str(tmp_path))
    assert "launch data index" in refused(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"version": 7}', '{"version": 1, "shards": 3}'])
def test_a_manifest_that_is_none(content: str, tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES)
    (tmp_path / "manifest.json").write_text(content)
    assert "manifest.json" in refused(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (["format"], "zip", "format 'zip' is none of array_record, tfrecord, webdataset"),
        (["format"], ["zip"], "cannot be read"),
        (["shards", 0, "size"], "x", "is none of a name and three numbers"),
        (["shards", 0, "num_records"], 14.0, "is none of a name and three numbers"),
        (["shards", 0, "crc32c"], None, "is none of a name and three numbers"),
        (["shards", 0, "name"], 3, "is none of a name and three numbers"),
        (["classes"], list(range(40)), "classes and base are no text"),
        (["base"], 3, "classes and base are no text"),
        (["classes"], ["a"] * 39, "names 39 classes, but records.npy has the label 39"),
    ],
)
def test_a_manifest_with_a_field_that_cannot_be(
    path: list[str | int], value: object, told: str, tmp_path: Path
) -> None:
    datasets.write(tmp_path, IMAGES)
    fields = json.loads((tmp_path / "manifest.json").read_text())
    *parents, last = path
    inner = fields
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    assert told in refused(str(tmp_path))


def test_rows_in_two_dimensions(tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES)
    np.save(tmp_path / "records.npy", np.load(tmp_path / "records.npy")[:, None])
    assert "records.npy is not that of manifest.json" in refused(str(tmp_path))


def test_rows_of_another_manifest(tmp_path: Path) -> None:
    datasets.write(tmp_path / "a", IMAGES)
    datasets.write(tmp_path / "b", IMAGES[::-1])
    (tmp_path / "a" / "records.npy").write_bytes((tmp_path / "b" / "records.npy").read_bytes())
    assert "records.npy is not that of manifest.json" in refused(str(tmp_path / "a"))
    (tmp_path / "a" / "records.npy").write_bytes(b"not an array")
    assert "records.npy" in refused(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("size", "told"), [(-1, "is missing"), (70_000, "is cut off"), (500_000, "is longer")]
)
def test_a_shard_that_is_missing_cut_off_or_grown(size: int, told: str, tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES)
    shard = sorted(tmp_path.glob("part-*"))[1]
    content = shard.read_bytes()
    shard.unlink() if size < 0 else shard.write_bytes(content[:size].ljust(size, b"\0"))
    assert f"{shard} {told}" in refused(str(tmp_path))


def test_a_shard_in_a_bucket_with_other_contents(tmp_path: Path, gcs: cloud.Server) -> None:
    datasets.write(tmp_path, IMAGES)
    gcs.put_folder(tmp_path, "d/")
    name = sorted(n for n in gcs.contents("d/") if "part-" in n)[1]
    gcs.put(name, gcs.contents()[name][::-1])
    assert f"{name} has other contents than its manifest says" in refused(f"gs://{cloud.BUCKET}/d")


def test_the_digest_is_of_the_contents_wherever_they_lie(tmp_path: Path, gcs: cloud.Server) -> None:
    here = datasets.write(tmp_path / "a", IMAGES)
    gcs.put_folder(tmp_path / "a", "d/")
    assert open_dataset(f"gs://{cloud.BUCKET}/d").manifest.digest == here.digest
    assert datasets.write(tmp_path / "b", IMAGES[:-1]).digest != here.digest


# What records and recipe must agree on


def recipe(train: Path, held_out: Path, *overrides: str, n: int = 40) -> RunConfig:
    return config_of(
        "data.source=records",
        f"data.train={{path: '{train}', num_examples: {n}}}",
        f"data.eval={{path: '{held_out}', num_examples: 40}}",
        *overrides,
    )


def told(config: RunConfig) -> str:
    with pytest.raises(UserError) as e:
        open_splits(config)
    return str(e.value)


def test_another_number_of_examples_than_the_recipe_says(tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES, LABELS)
    assert (
        told(recipe(tmp_path, tmp_path, n=41))
        == f"data.train.num_examples = 41, but {tmp_path} holds 40; set it to that"
    )


def test_labels_beyond_the_networks_classes(tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES, [i + 1 for i in LABELS])
    message = told(recipe(tmp_path, tmp_path))
    assert "4 labels are outside of model.num_classes = 10, the first is 10 at record 9" in message
    assert "--first-label" in message


def test_splits_that_name_their_classes_differently(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(10)]
    datasets.write(tmp_path / "a", IMAGES, LABELS, classes=names)
    datasets.write(tmp_path / "b", IMAGES, LABELS, classes=[*names[:4], *names[5:], "class 10"])
    message = told(recipe(tmp_path / "a", tmp_path / "b"))
    assert "label 4 is 'class 4' in one, 'class 5' in the other" in message
    assert "--classes" in message


def test_a_memory_that_the_shuffle_does_not_fit_in(tmp_path: Path) -> None:
    datasets.write(tmp_path, IMAGES, LABELS)
    config = recipe(tmp_path, tmp_path, "data.memory_mib=0.001")
    train, _ = open_splits(config)
    from trainer.data.batches import train_batches
    from trainer.mesh import batch_sharding, make_mesh

    with pytest.raises(UserError, match=r"data.memory_mib = 0.001 is too little: .* lower\s+data.window"):
        train_batches(config, train, batch_sharding(make_mesh(4, 1)), position=0, steps=1)


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    datasets.write(tmp_path / "d", IMAGES, LABELS)
    (tmp_path / "file").write_text("")
    message = told(recipe(tmp_path / "d", tmp_path / "d", f"data.cache={tmp_path}/file/cache"))
    assert message.startswith(f"data.cache = {tmp_path}/file/cache cannot be used")


def dataset_of(lengths: np.ndarray, num_shards: int) -> Dataset:
    """Records of these lengths, one after another, of which nothing is stored."""
    parts = np.array_split(lengths, num_shards)
    records = np.zeros(len(lengths), RECORD_DTYPE)
    records["length"] = lengths
    records["offset"] = np.concatenate([np.cumsum(part) - part for part in parts])
    objects = tuple(Object(f"{i}", int(part.sum()), 1, None) for i, part in enumerate(parts))
    first = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Dataset(None, None, objects, records, first)  # type: ignore[arg-type]


def test_blocks_are_neighbours_in_one_shard_of_about_four_mebibytes() -> None:
    dataset = dataset_of(np.random.default_rng(0).integers(50_000, 170_000, 200_000), num_shards=160)
    starts = dataset.block_starts()
    assert starts[0] == 0
    assert set(dataset.shard_starts[:-1]) <= set(starts.tolist())
    ends = np.append(starts[1:], len(dataset)) - 1
    offset, length = (dataset.records[name].astype(np.int64) for name in ("offset", "length"))
    spans = offset[ends] + length[ends] - offset[starts]
    assert 3.5 * 2**20 < np.mean(spans) <= 4.2 * 2**20
    assert np.max(spans) <= 4 * 2**20 + 170_000


def test_little_data_has_many_blocks_for_shuffling_to_move() -> None:
    assert len(dataset_of(np.full(60, 5000), num_shards=1).block_starts()) == 60
    assert 512 <= len(dataset_of(np.full(50_000, 2500), num_shards=3).block_starts()) <= 520
