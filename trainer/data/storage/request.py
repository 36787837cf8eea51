"""A range of bytes of an object, as reading, caching and fetching pass it on to each other."""

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.storage.formats.protocol import Framing
from trainer.data.storage.store import Object, Store


@dataclass(frozen=True)
class RangeRequest:
    """Bytes [offset, offset + length) of an object. They are delivered without the framing of the container."""

    store: Store
    object: Object
    offset: int
    length: int
    framing: Framing | None
    block: tuple[int, int] | None = None
    """(offset, length) of the block that this range is a part of. Only ranges with a block are cached."""

    def payload_bytes(self) -> int:
        """Size of what is delivered: the range without framing."""
        return self.length - framing_bytes(self.offset, self.offset + self.length, self.framing)

    def payload_offset_in(self, outer: "RangeRequest") -> int:
        """Where the payload of this range begins within the payload of `outer`, a range that includes this one."""
        return self.offset - outer.offset - framing_bytes(outer.offset, self.offset, self.framing)

    def extract(self, payload: np.ndarray, inner: "RangeRequest") -> np.ndarray:
        """The payload of `inner`, a part of this range, as a view of this range's `payload`."""
        begin = inner.payload_offset_in(self)
        return payload[begin : begin + inner.payload_bytes()]

    def whole_block(self) -> "RangeRequest":
        """The request for the whole block of this range."""
        assert self.block is not None
        offset, length = self.block
        return replace(self, offset=offset, length=length)

    def buffers(self, payload: memoryview) -> list[memoryview]:
        """Buffers to fill with the bytes of the range one after another.

        Those for payload are views of `payload`; between them, the framing goes to a buffer that nobody
        reads.
        """
        # Most formats store a record in one piece, and the range is read straight into place.
        if self.framing is None:
            return [payload]
        period, header = self.framing
        dropped = memoryview(bytearray(header))
        buffers, at, taken = [], self.offset, 0
        end = self.offset + self.length
        while at < end:
            if at % period == 0:
                buffers.append(dropped)
                at += header
            part = min(end, (at // period + 1) * period) - at
            buffers.append(payload[taken : taken + part])
            taken, at = taken + part, at + part
        return buffers


def framing_bytes(start: int, end: int, framing: Framing | None) -> int:
    """Number of framing bytes in [start, end) of an object. Neither end lies inside a header."""
    if framing is None:
        return 0
    return (-(-end // framing.period) - -(-start // framing.period)) * framing.header
