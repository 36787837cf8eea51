"""Input: the order of samples, the sources, and the Grain graph that feeds the devices.

A source opens to two splits; a new source is one file here and one line below.
"""

import importlib

from configs.schema import RunConfig
from trainer.data.split import Split

# Imported when opened: Grain loads jax, which the tools of this package do without.
_SOURCES = {name: f"trainer.data.sources.{name}" for name in ("records", "digits", "synthetic")}


def open_splits(config: RunConfig) -> tuple[Split, Split]:
    """The training and the held-out split."""
    splits: tuple[Split, Split] = importlib.import_module(_SOURCES[config.data.source]).open_splits(config)
    return splits
