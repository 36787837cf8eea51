"""Shards as upstream writes them are scanned to the byte, and damaged ones are refused at the byte."""

import io
import json
import os
import re
import struct
import tarfile
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grain.sources import ArrayRecordDataSource

from configs.errors import UserError
from trainer.data.storage.formats import FORMATS, array_record, detect_format, example, tfrecord, webdataset
from trainer.data.storage.formats.protocol import Framing


def scanned(module, content: bytes) -> list:
    return list(module.scan(io.BytesIO(content)))


def refusal(module, content: bytes) -> str:
    with pytest.raises(ValueError) as e:  # noqa: PT011
        scanned(module, content)
    return str(e.value)


# tf.train.Example


@pytest.fixture(scope="module")
def proto():
    """The message class of tf.train.Example, from its published schema."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        m = file.message_type.add(name=name)
        for number, (field_name, kind, label, type_name) in enumerate(fields, 1):
            m.field.add(name=field_name, number=number, type=kind, label=label, type_name=type_name)
        return m

    message("BytesList", ("value", field.TYPE_BYTES, field.LABEL_REPEATED, None))
    message("FloatList", ("value", field.TYPE_FLOAT, field.LABEL_REPEATED, None))
    message("Int64List", ("value", field.TYPE_INT64, field.LABEL_REPEATED, None))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = message(
        "Feature",
        *((name, field.TYPE_MESSAGE, field.LABEL_OPTIONAL, f".tensorflow.{kind}") for name, kind in lists),
    )
    feature.oneof_decl.add(name="kind")
    for f in feature.field:
        f.oneof_index = 0
    entry = ("feature", field.TYPE_MESSAGE, field.LABEL_REPEATED, ".tensorflow.Features.FeatureEntry")
    pair = message("Features", entry).nested_type.add(name="FeatureEntry")
    pair.options.map_entry = True
    pair.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    pair.field.add(
        name="value",
        number=2,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_OPTIONAL,
        type_name=".tensorflow.Feature",
    )
    message("Example", ("features", field.TYPE_MESSAGE, field.LABEL_OPTIONAL, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


@pytest.mark.parametrize("label", [0, 1, 127, 128, 999, 2**40])
@pytest.mark.parametrize("size", [1, 127, 128, 70_000])
def test_protobuf_reads_the_examples_that_are_written(proto, label, size):
    image = os.urandom(size)
    read = proto.FromString(example.serialize(image, label, text="Löwe", filename="a/b.jpg")).features.feature
    assert read["image/encoded"].bytes_list.value == [image]
    assert read["image/class/label"].int64_list.value == [label]
    assert read["image/class/text"].bytes_list.value == ["Löwe".encode()]
    assert read["image/filename"].bytes_list.value == [b"a/b.jpg"]
    assert len(read) == 4


@pytest.mark.parametrize(
    "keys", [("image/encoded", "image/class/label"), ("image", "label")], ids=lambda k: k[0]
)
@pytest.mark.parametrize("label", [0, 1000, -1])
def test_examples_that_protobuf_writes_are_read(proto, keys, label):
    written = proto()
    written.features.feature["image/width"].int64_list.value.extend([500, 375])
    written.features.feature["image/object/bbox/xmin"].float_list.value.append(0.5)
    written.features.feature["image/class/synset"].bytes_list.value.append(b"n01440764")
    written.features.feature[keys[0]].bytes_list.value.append(b"the image")
    written.features.feature[keys[1]].int64_list.value.append(label)
    record = written.SerializeToString()
    found = example.find_image(record)
    assert (record[found.start : found.stop], found.label) == (b"the image", label)


def test_an_example_without_packed_integers_is_read():
    # proto2 wrote repeated integers one by one.
    feature = example._feature(b"label", 3, b"\x08\x07")
    image = example._feature(b"image", 1, example._field(1, b"x"))
    assert example.find_image(example._field(1, feature + image)).label == 7


def test_an_example_without_a_label_is_refused_with_what_it_has():
    record = example._field(1, example._feature(b"image", 1, example._field(1, b"x")))
    with pytest.raises(ValueError, match=r"no image/class/label or label in it \(it holds image\)"):
        example.find_image(record)


@pytest.mark.parametrize(("images", "count"), [([], "no"), ([b"x", b"y"], "2")])
def test_an_example_of_no_one_image_is_refused(images, count):
    values = b"".join(example._field(1, image) for image in images)
    features = example._feature(b"image", 1, values) + example._feature(b"label", 3, b"\x08\x07")
    with pytest.raises(ValueError, match=f"image/encoded holds {count} images"):
        example.find_image(example._field(1, features))


@pytest.mark.parametrize("record", [b"hello", b"\x0a\xff", b"\x0b", b"\xff" * 12])
def test_what_is_no_example_is_refused(record):
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        example.find_image(record)


# ArrayRecord


def array_records(path: Path, records: list[bytes], options: str = array_record.OPTIONS) -> bytes:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


# Sizes around the 64 KiB between two headers, so that records begin and end at every side of one.
SIZES = [1, 5, 65_300, 65_384, 65_400, 65_512, 65_536, 131_100, 40_000, 3, 200_000, *range(64_980, 65_530, 7)]


def test_an_array_record_is_scanned_in_place(tmp_path: Path):
    images = [os.urandom(size) for size in SIZES]
    content = array_records(tmp_path / "a", [example.serialize(image, i) for i, image in enumerate(images)])
    entries = scanned(array_record, content)
    assert [e.image for e in entries] == images
    assert [e.label for e in entries] == list(range(len(images)))
    in_place = [array_record.FRAMING.strip(content[e.offset :][: e.length], e.offset) for e in entries]
    assert in_place == images
    assert any(e.length > len(e.image) for e in entries)


def test_grain_reads_the_records_that_are_written(tmp_path: Path, proto):
    images = [os.urandom(size) for size in SIZES]
    array_records(
        tmp_path / "a.array_record", [example.serialize(x, i, text="t") for i, x in enumerate(images)]
    )
    source = ArrayRecordDataSource([str(tmp_path / "a.array_record")])
    assert len(source) == len(images)
    for i in (len(images) - 1, 0, 7):
        assert proto.FromString(source[i]).features.feature["image/encoded"].bytes_list.value == [images[i]]


def test_an_array_record_without_records_is_empty(tmp_path: Path):
    assert scanned(array_record, array_records(tmp_path / "a", [])) == []


@pytest.mark.parametrize(
    ("options", "what"),
    [("group_size:1", "compressed records"), ("group_size:4,uncompressed", "4 records in a chunk")],
)
def test_other_array_records_are_refused_with_what_is_read(tmp_path: Path, options, what):
    content = array_records(tmp_path / "a", [example.serialize(b"x" * 5000, 0)] * 4, options)
    assert refusal(array_record, content).startswith(f"it has {what}")
    assert array_record.OPTIONS in refusal(array_record, content)


@pytest.mark.parametrize("size", [0, 3, 65_536, 131_072, 200_000, -65_536, -1])
def test_an_array_record_that_is_cut_off_is_refused_at_its_end(tmp_path: Path, size):
    content = array_records(tmp_path / "a", [example.serialize(os.urandom(100_000), 0)] * 3)[:size]
    assert f"no ArrayRecord postscript at its end, byte {len(content):,}" in refusal(array_record, content)


def test_an_array_record_with_a_damaged_chunk_header_is_refused_at_the_byte(tmp_path: Path):
    records = [example.serialize(os.urandom(1000), 0)] * 3
    content = bytearray(array_records(tmp_path / "a", records))
    content[24 + 40 + 24] = ord("?")  # the kind of the second chunk, after a frame and the signature
    assert "byte 104 begins no chunk" in refusal(array_record, bytes(content))


@pytest.mark.parametrize("size", [0, 10, 1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [b"r", b"p"])
def test_an_array_record_with_a_damaged_chunk_size_is_refused_at_the_byte(tmp_path: Path, kind, size):
    content = bytearray(array_records(tmp_path / "a", [example.serialize(os.urandom(1000), 0)] * 3))
    at = 24 + 40  # the header of the first record's chunk, after a frame and the signature
    content[at + 8 : at + 16] = struct.pack("<Q", size)
    content[at + 24 : at + 25] = kind
    assert re.search("byte [0-9]+", refusal(array_record, bytes(content)))


@pytest.mark.parametrize("offset", [2, 3, 9, 15, 39])
def test_framing_is_stripped_wherever_a_range_begins(offset):
    framing = Framing(period=10, header=2)
    shard = bytes(range(40))
    payload = bytes(b for i, b in enumerate(shard) if i >= offset and i % 10 >= 2)
    assert framing.strip(shard[offset:], offset) == payload


# TFRecord


def tf_records(*records: bytes) -> bytes:
    def framed(record: bytes) -> bytes:
        length = struct.pack("<Q", len(record))
        checksums = (struct.pack("<I", tfrecord.masked_crc32c(part)) for part in (length, record))
        return b"%b%b%b%b" % (length, next(checksums), record, next(checksums))

    return b"".join(map(framed, records))


def test_the_masked_checksum_is_that_of_tensorflow():
    # The first 12 bytes of any TFRecord whose first record has 24 bytes.
    assert struct.pack("<I", tfrecord.masked_crc32c(struct.pack("<Q", 24))) == bytes.fromhex("a37f4b22")


def test_a_tfrecord_is_scanned_in_place():
    images = [os.urandom(size) for size in (1, 100, 70_000)]
    content = tf_records(*(example.serialize(image, i) for i, image in enumerate(images)))
    entries = scanned(tfrecord, content)
    assert [(e.image, e.label) for e in entries] == [(image, i) for i, image in enumerate(images)]
    assert [content[e.offset :][: e.length] for e in entries] == images


@pytest.mark.parametrize("cut", [1, 4, 5, 1000, 1060])
def test_a_tfrecord_that_is_cut_off_is_refused_at_the_record(cut):
    first = tf_records(example.serialize(b"a" * 1000, 0))
    content = (first + tf_records(example.serialize(b"b" * 1000, 1)))[:-cut]
    assert refusal(tfrecord, content) == f"it is cut off in the record at byte {len(first):,}"


def test_damage_in_a_tfrecord_is_refused_at_the_record():
    first = tf_records(example.serialize(b"a" * 1000, 0))
    content = bytearray(first * 2)
    content[len(first) + 500] ^= 1
    assert (
        refusal(tfrecord, bytes(content)) == f"the record at byte {len(first):,} does not match its checksum"
    )
    content[len(first)] ^= 1
    assert f"the length at byte {len(first):,}" in refusal(tfrecord, bytes(content))


def test_a_gzipped_tfrecord_is_refused_as_such():
    assert "compressed with gzip" in refusal(tfrecord, b"\x1f\x8b\x08" + bytes(100))


# WebDataset


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SAMPLES = [
    ("train/0001.jpg", b"first" * 300),
    ("train/0001.cls", b"7\n"),
    ("train/0002.json", json.dumps({"label": 3, "url": "…"}).encode()),
    ("train/0002.seg.png", b"no image of ours"),
    ("train/0002.JPEG", b"second"),
    ("train/._0003.jpg", b"what macOS adds"),
    ("train/0003.png", b"third"),
    ("train/0003.json", b'{"cls": "5"}'),
    ("x" * 200 + "/0004.webp", b"a name beyond the header's 100 bytes"),
    ("x" * 200 + "/0004.cls", b"0"),
]


def test_a_webdataset_is_scanned_in_place():
    content = tar(*SAMPLES)
    entries = scanned(webdataset, content)
    assert [e.label for e in entries] == [7, 3, 5, 0]
    assert [e.image[:6] for e in entries] == [b"firstf", b"second", b"third", b"a name"]
    assert [content[e.offset :][: e.length] for e in entries] == [e.image for e in entries]


@pytest.mark.parametrize("size", [0, 100, 600, 512 * 5, 512 * 6 - 1, 512 * 8])
def test_a_tar_that_is_cut_off_is_refused(size):
    refusal(webdataset, tar(*SAMPLES)[:size])


def test_a_tar_that_ends_at_a_sample_without_the_end_mark_is_refused():
    whole = tar(*SAMPLES[:2])
    end = 512 + 512 * 3 + 512 + 512
    assert scanned(webdataset, whole)
    assert f"cut off at byte {end:,}" in refusal(webdataset, whole[:end])


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a/1.jpg", b"x")], "sample 'a/1' has no label: neither .cls nor .json (it holds jpg)"),
        ([("1.cls", b"1")], "sample '1' has 0 images (it holds cls)"),
        (
            [("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"1")],
            "sample '1' has 2 images (it holds jpg, png, cls)",
        ),
        (
            [("1.jpg", b"x"), ("1.JPG", b"x"), ("1.cls", b"1")],
            "sample '1' has 2 images (it holds jpg, jpg, cls)",
        ),
        ([("1.jpg", b"x"), ("1.json", b'{"label": 2.7}')], "sample '1': its label is no whole number"),
        ([("1.jpg", b"x"), ("1.json", b'{"label": true}')], "sample '1': its label is no whole number"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "sample '1': its label is no whole number"),
        ([("1.jpg", b"x"), ("1.json", b'{"caption": ""}')], "sample '1': its label is no whole number"),
    ],
)
def test_a_sample_that_is_none_is_refused_by_name(members, reason):
    assert refusal(webdataset, tar(*members)) == reason


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("00000-00.array_record", "array_record"),
        ("imagenet2012-train.array_record-00000-of-01024", "array_record"),
        ("imagenet2012-train.tfrecord-00000-of-01024", "tfrecord"),
        ("train-00000-of-01024", "tfrecord"),
        ("train.tfrecord", "tfrecord"),
        ("imagenet-000000.tar", "webdataset"),
    ],
)
def test_the_format_is_told_by_the_names(name, expected):
    assert detect_format([name, "dataset_info.json", "README"]) == expected
    assert expected in FORMATS


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.tar", "a.tfrecord"], r"several formats: tfrecord \(a.tfrecord\) and webdataset \(a.tar\)"),
        (["a.tar.gz"], "a.tar.gz is compressed"),
        (["a.tfrecord.zst"], "a.tfrecord.zst is compressed"),
        (["cat.jpg", "dog.jpg"], r"no shards: cat.jpg, dog.jpg; the endings of shards are .array_record"),
        ([], "no shards: nothing there"),
    ],
)
def test_folders_of_no_one_format_are_refused(names, reason):
    with pytest.raises(UserError, match=reason):
        detect_format(names)
