"""What the pipeline needs of a dataset: a length, a digest, and the sample at an index."""

from typing import NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    image: np.ndarray
    """(height, width, 3) uint8."""
    label: np.ndarray
    """int32 scalar."""


class Split(Protocol):
    digest: str
    """Identifies the samples and their numbering; a resume refuses another digest."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Called from several threads at once."""
        ...
