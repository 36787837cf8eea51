"""What the pipeline needs of a dataset: a length, a digest, and the samples that a process streams."""

from typing import NamedTuple, Protocol

import numpy as np

from trainer.data.order import ProcessStream


class Sample(NamedTuple):
    image: np.ndarray
    """(height, width, 3) uint8."""
    label: np.ndarray
    """int32 scalar; -1 counts for nothing."""


def padding_sample(image_size: int) -> Sample:
    return Sample(np.zeros((image_size, image_size, 3), np.uint8), np.array(-1, np.int32))


class Samples(Protocol):
    """A Grain random-access source: the samples that one process reads, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample:
        """Sample `i` of the stream. Called from several threads at once, in about ascending order, once each."""
        ...

    def metrics(self) -> dict[str, float]:
        """How reading goes, for the log."""
        ...

    def close(self) -> None: ...


class Split(Protocol):
    digest: str
    """Identifies the samples and their numbering; a resume refuses another digest."""
    block_starts: np.ndarray | None
    """First record of each block of neighbouring ones; None where each sample is as near as any other."""

    def __len__(self) -> int: ...

    def samples(self, stream: ProcessStream, *, train: bool) -> Samples:
        """Begin to read what `stream` says, with the augmentation of training or the crop of evaluation."""
        ...


class InMemorySplit:
    """A split whose samples cost nothing to reach: an array of images and one of labels."""

    block_starts: np.ndarray | None = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, digest: str, *, length: int | None = None):
        """Images (n, height, width, 3) uint8 and labels (n,) int32; they repeat up to `length`."""
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
        index = self._stream.order.index(position) % len(self._images)
        return Sample(self._images[index], self._labels[index])

    def __repr__(self) -> str:
        return f"InMemorySamples({len(self)})"

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
