"""Input: the order of samples, the sources, and the Grain graph that feeds the devices.

A source opens to two splits; a new source is one file here and one line below.
"""

from configs.schema import DataConfig
from trainer.data import digits, synthetic
from trainer.data.split import Split

_SOURCES = {"digits": digits.open_splits, "synthetic": synthetic.open_splits}


def open_splits(data: DataConfig, num_classes: int) -> tuple[Split, Split]:
    """The training and the held-out split."""
    return _SOURCES[data.source](data, num_classes)
