"""Conversion and indexing: what goes in is what comes out, whole or not at all, and faults are told in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from PIL import Image

from configs.errors import UserError
from tests.gcs import Fault
from tests.trainer.datasets import jpegs, write_tfrecord
from trainer.data.storage.dataset import MANIFEST, Dataset, open_dataset
from trainer.data.storage.formats import FORMATS, array_record, example
from trainer.data.tools import convert as tool
from trainer.data.tools import inputs, parallel
from trainer.data.tools.index import index
from trainer.data.tools.summary import summarize, write_sheet
from trainer.data.tools.verify import verify

IMAGES = jpegs(30, size=64)
CLASSES = ["ant", "bee", "cat"]


def ignore(*_: int):
    return ignore


def convert(source, destination, kind="imagefolder", *, jobs=1, **settings):
    return tool.convert(
        str(source), str(destination), tool.Settings(kind, **settings), jobs=jobs, begin=ignore
    )


def indexed(source, destination=None, *, first_label=0, jobs=1):
    to = None if destination is None else str(destination)
    return index(str(source), to, first_label=first_label, jobs=jobs, begin=ignore)


def records(dataset: Dataset) -> list[tuple[bytes, int]]:
    """Image and label of each record, read by the table."""
    found, framing = [], FORMATS[dataset.manifest.format].FRAMING
    for i, row in enumerate(dataset.records):
        shard = dataset.objects[int(np.searchsorted(dataset.shard_starts, i, side="right")) - 1]
        with dataset.store.open(shard.name) as file:
            file.seek(int(row["offset"]))
            data = file.read(int(row["length"]))
        found.append((framing.strip(data, int(row["offset"])) if framing else data, int(row["label"])))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images in 3 classes; the name of an image tells which it is."""
    root = tmp_path / "images"
    for i, image in enumerate(IMAGES):
        file = root / CLASSES[i // 10] / f"{i:02}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    return root


# ImageFolder


def test_a_folder_becomes_records_with_the_labels_of_its_classes(folder: Path, tmp_path: Path):
    manifest = convert(folder, tmp_path / "out", shard_mib=1)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.manifest == manifest
    assert manifest.classes == tuple(CLASSES)
    assert sorted(records(dataset)) == sorted((image, i // 10) for i, image in enumerate(IMAGES))


def test_a_folder_is_written_mixed_and_by_its_seed(folder: Path, tmp_path: Path):
    digests = [convert(folder, tmp_path / str(k), seed=seed).digest for k, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]
    assert not summarize(open_dataset(str(tmp_path / "0"))).sorted_by_class


def test_upstream_reads_what_is_written(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "out")
    source = ArrayRecordDataSource([str(p) for p in sorted((tmp_path / "out").glob("*.array_record"))])
    found = [example.find_image(source[i]) for i in range(len(source))]
    images = [source[i][f.start : f.stop] for i, f in enumerate(found)]
    assert [(i, f.label) for i, f in zip(images, found, strict=True)] == records(
        open_dataset(str(tmp_path / "out"))
    )
    name = next(
        f"ant/{i:02}.JPEG" for i in range(10) if IMAGES[i] == images[[f.label for f in found].index(0)]
    )
    assert name.encode() in source[[f.label for f in found].index(0)]


def test_processes_write_what_one_process_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    big = folder / "ant" / "big.bmp"
    big.write_bytes(b"BM" + bytes(3 << 20))  # more than a shard, so that there are several
    one, two = tmp_path / "one", tmp_path / "two"
    convert(folder, one, shard_mib=1)
    convert(folder, two, shard_mib=1, jobs=2)
    assert len(list(one.glob("*.array_record"))) > 1
    assert contents(one) == contents(two)


def test_eval_takes_the_labels_of_train(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "train")
    for file in (folder / "ant").iterdir():
        file.unlink()
    (folder / "ant").rmdir()
    convert(folder, tmp_path / "eval", classes=tool.read_classes(str(tmp_path / "train")))
    assert {label for _, label in records(open_dataset(str(tmp_path / "eval")))} == {1, 2}


def test_resizing_shrinks_the_short_side_and_leaves_small_images_as_they_are(folder: Path, tmp_path: Path):
    big = io.BytesIO()
    Image.new("RGB", (200, 100), (10, 200, 30)).save(big, "PNG")
    (folder / "ant" / "big.png").write_bytes(big.getvalue())
    convert(folder, tmp_path / "out", resize=64)
    images = [image for image, _ in records(open_dataset(str(tmp_path / "out")))]
    small = [image for image in images if image not in IMAGES]
    assert len(small) == 1
    with Image.open(io.BytesIO(small[0])) as image:
        assert (image.size, image.format) == ((128, 64), "JPEG")
        assert np.abs(np.asarray(image).astype(int) - (10, 200, 30)).max() < 4


# Other inputs


def tar(path: Path, images, labels) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            for ending, content in (("jpg", image), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{i:06}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def parquet(path: Path, images, labels, *, names=None) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    path.parent.mkdir(exist_ok=True, parents=True)
    table = pa.table({"image": [{"bytes": i, "path": None} for i in images], "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


WRITERS = {
    "tfrecord": ("x-train.tfrecord-{:05}-of-00002", write_tfrecord),
    "webdataset": ("x-{:06}.tar", tar),
    "parquet": ("train-{:05}-of-00002.parquet", parquet),
}


def two_shards(kind: str, folder: Path, labels: list[int]) -> list[tuple[bytes, int]]:
    """Two shards of the images; what they hold."""
    name, write = WRITERS[kind]
    for k, part in enumerate((slice(0, 20), slice(20, 30))):
        write(folder / name.format(k), IMAGES[part], labels[part])
    return list(zip(IMAGES, labels, strict=True))


LABELS = [i % 7 for i in range(30)]


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_are_converted_in_their_order(kind: str, tmp_path: Path):
    expected = two_shards(kind, tmp_path / "in", LABELS)
    manifest = convert(tmp_path / "in", tmp_path / "out", kind)
    assert manifest.format == "array_record"
    assert records(open_dataset(str(tmp_path / "out"))) == expected


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset"])
@pytest.mark.parametrize("beside", [True, False])
def test_shards_are_indexed_where_they_lie(kind: str, beside: bool, tmp_path: Path):
    expected = two_shards(kind, tmp_path / "in", LABELS)
    before = contents(tmp_path / "in")
    manifest = indexed(tmp_path / "in", None if beside else tmp_path / "table")
    dataset = open_dataset(str(tmp_path / ("in" if beside else "table")))
    assert (manifest.format, records(dataset)) == (kind, expected)
    assert before.items() <= contents(tmp_path / "in").items()


def test_converted_shards_are_indexed_to_the_same_table(folder: Path, tmp_path: Path):
    converted = convert(folder, tmp_path / "out")
    assert indexed(tmp_path / "out") == converted


def test_class_names_are_not_kept_for_labels_beyond_them(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "out")
    (tmp_path / "out" / "00000-00.array_record").unlink()
    two_shards("tfrecord", tmp_path / "out", LABELS)
    assert indexed(tmp_path / "out").classes is None
    assert len(open_dataset(str(tmp_path / "out"))) == 30


def test_a_pattern_takes_one_split_of_a_folder(tmp_path: Path):
    expected = two_shards("tfrecord", tmp_path / "in", LABELS)
    write_tfrecord(tmp_path / "in" / "x-validation.tfrecord-00000-of-00001", IMAGES[:3], [9, 9, 9])
    (tmp_path / "in" / "dataset_info.json").write_text("{}")
    indexed(tmp_path / "in" / "x-train*", tmp_path / "table")
    assert records(open_dataset(str(tmp_path / "table"))) == expected
    convert(tmp_path / "in" / "x-train*", tmp_path / "out", "tfrecord")
    assert records(open_dataset(str(tmp_path / "out"))) == expected
    with pytest.raises(UserError, match="with --to"):
        indexed(tmp_path / "in" / "x-train*")


@pytest.mark.parametrize(
    "make", [indexed, lambda *a, **k: convert(*a, "tfrecord", **k)], ids=["index", "convert"]
)
def test_the_first_label_is_brought_to_0(make, tmp_path: Path):
    two_shards("tfrecord", tmp_path / "in", [label + 1 for label in LABELS])
    make(tmp_path / "in", tmp_path / "out", first_label=1)
    assert [label for _, label in records(open_dataset(str(tmp_path / "out")))] == LABELS


@pytest.mark.parametrize(
    "make", [indexed, lambda *a, **k: convert(*a, "tfrecord", **k)], ids=["index", "convert"]
)
def test_a_label_below_0_is_refused_with_its_record(make, tmp_path: Path):
    two_shards("tfrecord", tmp_path / "in", LABELS)
    with pytest.raises(
        UserError, match=r"x-train.tfrecord-00000-of-00002.*label 0 less --first-label 1, but labels are 0 to"
    ):
        make(tmp_path / "in", tmp_path / "out", first_label=1)
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "array_record"])
def test_an_empty_image_is_refused_with_its_record(kind: str, tmp_path: Path):
    images = [*IMAGES[:2], b""]
    if kind == "array_record":
        writer = ArrayRecordWriter(str(tmp_path / "in.array_record"), array_record.OPTIONS)
        for image in images:
            writer.write(example.serialize(image, 0))
        writer.close()
        (tmp_path / "in").mkdir()
        (tmp_path / "in.array_record").rename(tmp_path / "in" / "a.array_record")
    else:
        WRITERS[kind][1](tmp_path / "in" / WRITERS[kind][0].format(0), images, [0, 0, 0])
    with pytest.raises(UserError, match=r"record 2 \(byte [0-9,]+\): its image is empty"):
        indexed(tmp_path / "in")
    assert not (tmp_path / "in" / MANIFEST).exists()
    if kind != "array_record":
        with pytest.raises(UserError, match="/2 is no image by its content"):
            convert(tmp_path / "in", tmp_path / "out", kind)


def test_class_names_come_from_hugging_faces_schema(tmp_path: Path):
    parquet(tmp_path / "in" / "train.parquet", IMAGES[:3], [2, 0, 1], names=CLASSES)
    assert convert(tmp_path / "in", tmp_path / "out", "parquet").classes == tuple(CLASSES)
    parquet(tmp_path / "more" / "train.parquet", IMAGES[:3], [2, 0, 3], names=CLASSES)
    with pytest.raises(UserError, match=r"train.parquet/2 has the label 3, but there are 3 classes"):
        convert(tmp_path / "more", tmp_path / "none", "parquet")


def test_images_may_lie_in_parquet_as_plain_bytes(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"img": IMAGES[:2], "label": [0, 1]}), tmp_path / "in" / "a.parquet")
    convert(tmp_path / "in", tmp_path / "out", "parquet")
    assert records(open_dataset(str(tmp_path / "out"))) == [(IMAGES[0], 0), (IMAGES[1], 1)]


# Cloud Storage


@pytest.mark.parametrize("kind", WRITERS)
def test_from_bucket_to_bucket(kind: str, tmp_path: Path, gcs):
    expected = two_shards(kind, tmp_path / "in", LABELS)
    gcs.put_folder(tmp_path / "in", "in/")
    convert("gs://bucket/in", "gs://bucket/out", kind)
    convert(tmp_path / "in", tmp_path / "out", kind)
    uploaded = {name.removeprefix("out/"): content for name, content in gcs.contents("out/").items()}
    local = contents(tmp_path / "out")
    assert uploaded.pop(tool.JOURNAL) != local.pop(tool.JOURNAL)  # they name their sources
    assert uploaded == local
    assert open_dataset("gs://bucket/out").manifest == open_dataset(str(tmp_path / "out")).manifest
    assert len(expected) == open_dataset("gs://bucket/out").manifest.num_examples


def test_a_bucket_is_indexed_in_place(tmp_path: Path, gcs):
    expected = two_shards("webdataset", tmp_path / "in", LABELS)
    gcs.put_folder(tmp_path / "in", "in/")
    indexed("gs://bucket/in")
    assert records(open_dataset("gs://bucket/in")) == expected


def test_a_shard_that_comes_damaged_is_read_again(tmp_path: Path, gcs):
    expected = two_shards("webdataset", tmp_path / "in", LABELS)
    gcs.put_folder(tmp_path / "in", "in/")
    gcs.faults.append(Fault("corrupt", count=1))
    indexed("gs://bucket/in", tmp_path / "table")
    assert records(open_dataset(str(tmp_path / "table"))) == expected
    gcs.faults.append(Fault("corrupt"))
    with pytest.raises(UserError, match=r"gs://bucket/in/x-000000.tar comes damaged"):
        indexed("gs://bucket/in", tmp_path / "other")


# Killed, and gone on with


CONVERT = """
import sys
from trainer.data.tools import convert as tool

def begin(*_):
    def progress(*_):
        print("part", flush=True)
        sys.stdin.readline()
    return progress

if __name__ == "__main__":
    tool.convert(*sys.argv[1:3], tool.Settings("imagefolder", shard_mib=1), jobs=int(sys.argv[3]), begin=begin)
"""


@pytest.fixture
def many(folder: Path) -> Path:
    """The folder with images of 400 KB, so that there are several shards of 1 MiB."""
    for name in CLASSES:
        for i in range(4):
            (folder / name / f"big{i}.bmp").write_bytes(b"BM" + np.random.default_rng(i).bytes(400_000))
    return folder


def kill_conversion(source: Path, destination: str, script: Path, *, jobs: int, parts: int) -> None:
    """Convert in a process of its own, and kill that once so many parts are there."""
    script.write_text(CONVERT)
    command = [sys.executable, str(script), str(source), destination, str(jobs)]
    environment = os.environ | {"PYTHONPATH": str(Path(tool.__file__).parents[3])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stdin
        for part in range(parts):
            if part:
                process.stdin.write(b"\n")
                process.stdin.flush()
            assert process.stdout.readline() == b"part\n"
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) > jobs or jobs == 1
        process.send_signal(signal.SIGKILL)
    until_ended(workers)


@pytest.mark.parametrize(("jobs", "parts"), [(1, 1), (2, 3)])
def test_a_killed_conversion_goes_on_to_the_same_bytes(many: Path, tmp_path: Path, jobs: int, parts: int):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_conversion(many, str(killed), tmp_path / "convert.py", jobs=jobs, parts=parts)
    with pytest.raises(UserError, match="no manifest"):
        open_dataset(str(killed))
    done = {p.stem for p in killed.glob("*.part")}
    assert len(done) >= parts
    written = {p: p.stat().st_mtime_ns for p in killed.glob("*.array_record") if p.name[:5] in done}
    convert(many, killed, shard_mib=1)
    convert(many, whole, shard_mib=1)
    assert contents(killed) == contents(whole)
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert list(killed.glob(".*.partial")) == []


def test_a_conversion_into_a_bucket_goes_on_too(many: Path, tmp_path: Path, gcs):
    kill_conversion(many, "gs://bucket/out", tmp_path / "convert.py", jobs=1, parts=2)
    with pytest.raises(UserError, match="no manifest"):
        open_dataset("gs://bucket/out")
    generations = {name: stored.generation for (_, name), stored in gcs.objects.items()}
    done = [name for name in generations if name.endswith(".array_record")][:2]
    convert(many, "gs://bucket/out", shard_mib=1)
    convert(many, tmp_path / "whole", shard_mib=1)
    assert {n.removeprefix("out/"): c for n, c in gcs.contents("out/").items()} == contents(
        tmp_path / "whole"
    )
    assert [gcs.objects["bucket", name].generation for name in done] == [generations[name] for name in done]


def until_ended(processes: list[str]) -> None:
    def state(process: str) -> str:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "gone"

    deadline = time.monotonic() + 20
    while any(state(p) not in ("Z", "gone") for p in processes):
        assert time.monotonic() < deadline, "the workers go on without their parent"
        time.sleep(0.01)


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(UserError, match="fewer --jobs"):
        list(parallel.run(os._exit, [1, 1], jobs=2))


def test_only_the_same_conversion_goes_on(many: Path, tmp_path: Path):
    listing = inputs.list_input("imagefolder", str(many), classes=None, part_bytes=1 << 20, seed=0)
    last = many / listing.parts[-1].files[-1][0]
    last.write_bytes(b"BN" + last.read_bytes()[2:])  # as large, so that it stays where it is
    with pytest.raises(UserError, match=rf"{last.name} is no image by its content"):
        convert(many, tmp_path / "out", shard_mib=1)
    assert list((tmp_path / "out").glob("*.part"))
    with pytest.raises(
        UserError, match=r"unfinished conversion of .*images that differs in resize, seed; undo that"
    ):
        convert(many, tmp_path / "out", shard_mib=1, resize=32, seed=5)
    last.unlink()
    with pytest.raises(UserError, match="differs in input"):
        convert(many, tmp_path / "out", shard_mib=1)


def test_a_damaged_part_is_written_anew_and_a_damaged_journal_refused(many: Path, tmp_path: Path):
    kill_conversion(many, str(tmp_path / "out"), tmp_path / "convert.py", jobs=1, parts=2)
    part = min((tmp_path / "out").glob("*.part"))
    part.write_bytes(part.read_bytes()[:100])
    journal = tmp_path / "out" / tool.JOURNAL
    before = journal.read_bytes()
    for damaged in (before[:50], b"3"):
        journal.write_bytes(damaged)
        with pytest.raises(UserError, match=r"out/convert.json is damaged; give an empty"):
            convert(many, tmp_path / "out", shard_mib=1)
    journal.write_bytes(before)
    convert(many, tmp_path / "out", shard_mib=1)
    convert(many, tmp_path / "whole", shard_mib=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_conversion_that_has_written_nothing_may_begin_anew(folder: Path, tmp_path: Path):
    (folder / "cat" / "29.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image"):
        convert(folder, tmp_path / "out")
    (folder / "cat" / "29.JPEG").unlink()
    assert convert(folder, tmp_path / "out").num_examples == 29


def test_a_complete_conversion_is_left_as_it_is(folder: Path, tmp_path: Path):
    first = convert(folder, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name != ".lock"}
    assert convert(folder, tmp_path / "out") == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name != ".lock"} == before


def test_two_conversions_do_not_write_into_one_folder(folder: Path, tmp_path: Path):
    with tool._locked(str(tmp_path / "out")), pytest.raises(UserError, match="another conversion into it"):
        convert(folder, tmp_path / "out")


# Refused


def empty_class(folder: Path) -> None:
    (folder / "dog").mkdir()


def no_image_by_name(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("…")


def split_above(folder: Path) -> None:
    (folder / "ant" / "deeper").mkdir()


def no_image(folder: Path) -> None:
    (folder / "cat" / "x.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (empty_class, r"images/dog: a class folder without images"),
        (no_image_by_name, r"images/cat/notes.txt is no image by its name"),
        (split_above, r"images/ant/deeper is a folder, .* did you mean .*images/ant\?"),
        (no_image, r"cat/x.jpg is no image by its content"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_folder_of_other_things_is_refused_by_name(folder: Path, tmp_path: Path, spoil, reason):
    spoil(folder)
    with pytest.raises(UserError, match=reason):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["cat/\udcff.jpg", "d\udcffg/a.jpg", "cat/\udcff.tfrecord"])
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(
    name: str, folder: Path, tmp_path: Path
):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(IMAGES[0])
    is_shard = name.endswith(".tfrecord")
    with pytest.raises(UserError, match=r"udcff.*: the name is not UTF-8; rename it") as e:
        convert(folder / "cat", tmp_path / "out", "tfrecord") if is_shard else convert(
            folder, tmp_path / "out"
        )
    assert str(e.value).isascii()
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_are_refused(folder: Path, tmp_path: Path, gcs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(IMAGES[0])
    out = tmp_path / "out"
    convert(folder, out)
    refused = {
        "there is no such folder": lambda: convert(tmp_path / "none", tmp_path / "x"),
        "has a folder a class": lambda: convert(tmp_path / "flat", tmp_path / "x"),
        "from a local folder": lambda: convert("gs://bucket/in", tmp_path / "x"),
        "lies in the input": lambda: convert(folder, folder / "out"),
        "holds a dataset already": lambda: (out / "convert.json").unlink() or convert(folder, out),
        "is not empty": lambda: convert(folder, tmp_path / "flat"),
        "empty is empty": lambda: convert(tmp_path / "empty", tmp_path / "x", "tfrecord"),
        "gs://bucket/in is empty": lambda: convert("gs://bucket/in", tmp_path / "x", "tfrecord"),
        "there is no bucket elsewhere": lambda: indexed("gs://elsewhere/in"),
        "holds no webdataset shards": lambda: convert(tmp_path / "flat", tmp_path / "x", "webdataset"),
        "no shards: a.jpg": lambda: indexed(tmp_path / "flat"),
        "no manifest.json there": lambda: tool.read_classes(str(tmp_path / "flat")),
        "holds the table of its own shards": lambda: indexed(out, out) and indexed(tmp_path / "a.tar*", out),
    }
    tar(tmp_path / "a.tar", IMAGES[:1], [0])
    for reason, attempt in refused.items():
        with pytest.raises(UserError, match=reason):
            attempt()
    assert not (tmp_path / "x" / MANIFEST).exists()
    assert [p.name for p in (tmp_path / "flat").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_shard_that_is_cut_off_is_named(kind: str, tmp_path: Path):
    two_shards(kind, tmp_path / "in", LABELS)
    name = WRITERS[kind][0].format(1)
    content = (tmp_path / "in" / name).read_bytes()
    (tmp_path / "in" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        convert(tmp_path / "in", tmp_path / "out", kind)
    if kind in FORMATS:
        with pytest.raises(UserError, match=f"in/{name}: .*cut off"):
            indexed(tmp_path / "in")


def test_shards_without_records_are_no_dataset(tmp_path: Path):
    write_tfrecord(tmp_path / "in" / "a.tfrecord", [], [])
    with pytest.raises(UserError, match="not one image"):
        convert(tmp_path / "in", tmp_path / "out", "tfrecord")
    with pytest.raises(UserError, match="hold no records"):
        indexed(tmp_path / "in")


# Verify and inspect


def test_each_damaged_record_is_named(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    file = tmp_path / "out" / "00000-00.array_record"
    content = bytearray(file.read_bytes())
    for record in (4, 17):
        content[int(dataset.records["offset"][record]) + 30] ^= 0x10
    file.write_bytes(content)
    done = []
    bad = verify(
        open_dataset(str(tmp_path / "out")),
        decode=False,
        jobs=1,
        progress=lambda *counts: done.append(counts),
    )
    assert [(b.shard, b.record, b.offset) for b in bad] == [
        (file.name, r, int(dataset.records["offset"][r])) for r in (4, 17)
    ]
    assert all("crc32c" in b.reason for b in bad)
    assert sum(n for n, _ in done) == 30


@pytest.mark.parametrize("kind", ["tfrecord", "webdataset", "array_record"])
def test_sound_records_are_all_good(kind: str, folder: Path, tmp_path: Path):
    if kind == "array_record":
        convert(folder, tmp_path / "in")
    else:
        two_shards(kind, tmp_path / "in", LABELS)
        indexed(tmp_path / "in")
    assert verify(open_dataset(str(tmp_path / "in")), decode=True, jobs=1, progress=ignore) == []


def test_a_record_that_does_not_decode_is_named(folder: Path, tmp_path: Path):
    broken = IMAGES[3][: len(IMAGES[3]) // 2]
    (folder / "ant" / "03.JPEG").write_bytes(broken)
    convert(folder, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    (bad,) = verify(dataset, decode=True, jobs=1, progress=ignore)
    assert records(dataset)[bad.record][0] == broken
    assert "does not decode" in bad.reason


def test_a_dataset_sorted_by_class_is_told(tmp_path: Path):
    two_shards("tfrecord", tmp_path / "in", sorted(LABELS))
    indexed(tmp_path / "in")
    summary = summarize(open_dataset(str(tmp_path / "in")))
    assert summary.sorted_by_class
    assert summary.counts.tolist() == np.bincount(LABELS).tolist()
    assert (summary.smallest, summary.largest) == (min(map(len, IMAGES)), max(map(len, IMAGES)))


def test_the_contact_sheet_shows_the_images(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "out")
    assert write_sheet(open_dataset(str(tmp_path / "out")), tmp_path / "sheet.png", 9) == 9
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 128, 3 * 140)
        first = records(open_dataset(str(tmp_path / "out")))[0][0]
        with Image.open(io.BytesIO(first)) as image:
            tile = np.asarray(sheet.crop((0, 0, 128, 128)).resize((64, 64))).astype(int)
            assert np.abs(tile - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("how", ["its crc32c is", "it does not decode"])
def test_the_contact_sheet_names_a_record_that_is_bad(folder: Path, tmp_path: Path, how: str):
    if how == "it does not decode":
        for file in folder.glob("*/*"):
            file.write_bytes(b"BM" + bytes(500))
    convert(folder, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    if how == "its crc32c is":
        with (tmp_path / "out" / "00000-00.array_record").open("r+b") as f:
            f.seek(int(dataset.records["offset"][0]))
            f.write(b"?")
    with pytest.raises(UserError, match=rf"00000-00.array_record, record 0 \(bytes .*\): {how}"):
        write_sheet(open_dataset(str(tmp_path / "out")), tmp_path / "sheet.png", 3)
    assert not (tmp_path / "sheet.png").exists()
