"""What batching needs of a data source: a length, a digest, and the samples that one process reads."""

from typing import NamedTuple, Protocol

import numpy as np

from trainer.data.order import ProcessStream


class Sample(NamedTuple):
    """One image and its label, before batching."""

    image: np.ndarray
    """(height, width, 3) uint8."""
    label: np.ndarray
    """int32 scalar; -1 marks a sample that does not count."""


def padding_sample(image_size: int) -> Sample:
    """A black image that does not count, to fill up the last batch."""
    return Sample(np.zeros((image_size, image_size, 3), np.uint8), np.array(-1, np.int32))


class Samples(Protocol):
    """The samples that one process reads, by their number: a random-access source of Grain."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample:
        """Sample `i` of the stream. Called by several threads at once, in about ascending order, once for each `i`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures on the reading, for the log, by TensorBoard's names."""
        ...

    def close(self) -> None:
        """End the reading. Threads that wait for a sample get an exception."""
        ...


class Split(Protocol):
    """The training or the held-out part of a data source."""

    digest: str
    """Identifies the samples and their numbering. A run does not resume with another digest."""
    block_starts: np.ndarray | None
    """(blocks,) int64: the first record of each block of neighbours; None where nothing is stored in blocks."""

    def __len__(self) -> int: ...

    def samples(self, stream: ProcessStream, *, train: bool) -> Samples:
        """Start to read the samples of `stream`, with the augmentation of training or the centre crop of evaluation."""
        ...


class InMemorySplit:
    """A split that lies in memory: an array of images and one of labels."""

    block_starts: np.ndarray | None = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, digest: str, *, length: int | None = None):
        """`images` is (n, height, width, 3) uint8, `labels` (n,) int32.

        They repeat until the split has `length` samples.
        """
        self._images, self._labels, self.digest = images, labels, digest
        self._length = len(images) if length is None else length

    def __len__(self) -> int:
        return self._length

    def samples(self, stream: ProcessStream, *, train: bool) -> "_InMemorySamples":
        return _InMemorySamples(self._images, self._labels, stream)


class _InMemorySamples:
    def __init__(self, images: np.ndarray, labels: np.ndarray, stream: ProcessStream):
        self._images, self._labels, self._stream = images, labels, stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, i: int) -> Sample:
        position = self._stream.position(int(i))
        if position is None:
            return padding_sample(self._images.shape[1])
        # The arrays may be shorter than the split, and then repeat.
        index = self._stream.order.index(position) % len(self._images)
        return Sample(self._images[index], self._labels[index])

    def __repr__(self) -> str:
        return f"InMemorySamples({len(self)})"

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
