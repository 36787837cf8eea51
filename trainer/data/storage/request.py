"""A range of an object, as the reader asks for it and fetching and caching pass it on."""

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.storage.formats.protocol import Framing
from trainer.data.storage.store import Object, Store


@dataclass(frozen=True)
class RangeRequest:
    """Bytes [offset, offset + length) of an object, to be delivered without the framing."""

    store: Store
    object: Object
    offset: int
    length: int
    framing: Framing | None
    block: tuple[int, int] | None = None
    """(offset, length) of the block that it is a part of; only what has one is cached."""

    def payload_bytes(self) -> int:
        return self.length - framing_bytes(self.offset, self.offset + self.length, self.framing)

    def payload_offset_in(self, outer: "RangeRequest") -> int:
        """Where this range's payload begins in that of `outer`, which holds it."""
        return self.offset - outer.offset - framing_bytes(outer.offset, self.offset, self.framing)

    def extract(self, payload: np.ndarray, inner: "RangeRequest") -> np.ndarray:
        """What this range's payload holds of `inner`, as a view."""
        begin = inner.payload_offset_in(self)
        return payload[begin : begin + inner.payload_bytes()]

    def whole_block(self) -> "RangeRequest":
        assert self.block is not None
        offset, length = self.block
        return replace(self, offset=offset, length=length)

    def buffers(self, payload: memoryview) -> list[memoryview]:
        """Buffers that take the range in turn: parts of `payload`, and a bin for the framing between them."""
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
    """Bytes of framing in [start, end) of an object. Neither lies inside a header."""
    if framing is None:
        return 0
    return (-(-end // framing.period) - -(-start // framing.period)) * framing.header
