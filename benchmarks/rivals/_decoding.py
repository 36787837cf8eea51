"""Our decoding, for streams whose reading alone is to be compared."""

import itertools

import numpy as np
from _timing import SIZE

from configs.schema import AugmentConfig, DataConfig
from trainer.data.pixels.decode import Encoded
from trainer.data.pixels.transform import train_image

_data, _augment = DataConfig(source="digits", image_size=SIZE), AugmentConfig()
_positions = itertools.count()


def decoded(jpeg: Encoded, augment: AugmentConfig = _augment) -> np.ndarray:
    return train_image(jpeg, seed=0, position=next(_positions), data=_data, augment=augment)
