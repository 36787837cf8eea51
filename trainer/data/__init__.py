"""The data: the order of samples, the sources, the bytes, the pixels, and the batches on the devices.

A source is opened as two splits. A new source is one file in sources/ and one name below.
"""

import importlib

from configs.schema import RunConfig
from trainer.data.split import Split

# Imported only when opened: some sources need Grain, which loads jax, and the tools do without both.
_SOURCES = {name: f"trainer.data.sources.{name}" for name in ("records", "digits", "synthetic")}


def open_splits(config: RunConfig) -> tuple[Split, Split]:
    """Open the training split and the held-out split of the source that `config.data.source` names.

    Raises UserError if the data is not what the recipe says.
    """
    splits: tuple[Split, Split] = importlib.import_module(_SOURCES[config.data.source]).open_splits(config)
    return splits
