"""tf.train.Example, read and written by its wire format, so that neither TensorFlow nor a schema is needed.

An Example is a map from names to lists of bytes, floats or integers
(https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/example.proto,
https://protobuf.dev/programming-guides/encoding). The names are those of TFDS and of the ImageNet scripts.
"""

from collections.abc import Iterator
from typing import NamedTuple

IMAGE_KEYS = (b"image/encoded", b"image")
LABEL_KEYS = (b"image/class/label", b"label")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ImageSpan(NamedTuple):
    """Where an image lies in a serialized Example, in bytes, and its label."""

    start: int
    stop: int
    label: int


def find_image(record: bytes) -> ImageSpan:
    """The image and the label of a serialized Example. Raises ValueError unless it has exactly one of each."""
    spans = dict(_features(record))
    image, label = _first_present(spans, IMAGE_KEYS), _first_present(spans, LABEL_KEYS)
    lists = [span for number, _, *span in _fields(record, *image) if number == 1]  # of bytes
    images = [span for a, b in lists for _, _, *span in _fields(record, a, b)]
    if len(images) != 1:
        raise ValueError(f"{IMAGE_KEYS[0].decode()} holds {len(images) or 'no'} images")
    ((start, stop),) = images
    return ImageSpan(start, stop, _integer(record, *label))


def serialize(image: bytes, label: int, *, text: str | None = None, filename: str | None = None) -> bytes:
    """A serialized Example of one encoded image. `text` is the name of its class."""
    features = [
        _feature(b"image/encoded", 1, _field(1, image)),
        _feature(b"image/class/label", 3, _field(1, _varint(label))),
    ]
    for name, value in ((b"image/class/text", text), (b"image/filename", filename)):
        if value is not None:
            features.append(_feature(name, 1, _field(1, value.encode())))
    return _field(1, b"".join(features))


def _features(record: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The name of each Feature of an Example, and the span of its value."""
    for number, _, *features in _fields(record, 0, len(record)):
        for inner, _, *entry in _fields(record, *features) if number == 1 else ():
            span = {n: (a, b) for n, _, a, b in _fields(record, *entry)} if inner == 1 else {}
            if 1 in span and 2 in span:
                yield record[slice(*span[1])], span[2]


def varints(message: bytes) -> dict[int, int]:
    """The integer fields of any serialized message, by field number."""
    fields = _fields(message, 0, len(message))
    return {n: _read_varint(message, start)[0] for n, wire, start, _ in fields if wire == _VARINT}


def _first_present(spans: dict[bytes, tuple[int, int]], keys: tuple[bytes, ...]) -> tuple[int, int]:
    """The value of the first of `keys` that is in `spans`."""
    for key in keys:
        if key in spans:
            return spans[key]
    names = ", ".join(sorted(k.decode(errors="replace") for k in spans)) or "nothing"
    raise ValueError(f"no {' or '.join(k.decode() for k in keys)} in it (it holds {names})")


def _integer(record: bytes, start: int, stop: int) -> int:
    for number, _, a, b in _fields(record, start, stop):
        # Field 3 is a list of int64. Packed or not, its bytes begin with the first value.
        if number == 3:
            for _, _, first, _ in _fields(record, a, b):
                value, _ = _read_varint(record, first)
                return value - (1 << 64) if value >> 63 else value
    raise ValueError(f"{LABEL_KEYS[0].decode()} holds no integer")


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, stop) of the fields in data[at:stop]. Start and stop are those of the value."""
    while at < stop:
        tag, at = _read_varint(data, at)
        wire, start = tag & 7, at
        if wire == _BYTES:
            size, start = _read_varint(data, at)
            at = start + size
        elif wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("it is no tf.train.Example")
        if at > stop:
            raise ValueError("it is no tf.train.Example, or is cut off")
        yield tag >> 3, wire, start, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer at byte `at`, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it is no tf.train.Example, or is cut off")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: bytes) -> bytes:
    return b"".join([bytes([number << 3 | _BYTES]), _varint(len(value)), value])


def _feature(name: bytes, kind: int, values: bytes) -> bytes:
    """One entry of the map: a name and its Feature, in which the list is field `kind`."""
    return _field(1, _field(1, name) + _field(2, _field(kind, values)))
