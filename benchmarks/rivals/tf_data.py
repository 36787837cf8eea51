"""tf.data as TensorFlow's reference ResNet reads ImageNet: the crop is drawn from the header and decoded alone."""

from pathlib import Path

import tensorflow as tf
from _timing import BATCH, SIZE, Pass, batches, jpegs, run


def example(jpeg: tf.Tensor) -> tf.Tensor:
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(jpeg),
        tf.zeros((1, 0, 4)),
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method="INTEGER_FAST")
    return tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8)


def decode(folder: Path, cores: int) -> Pass:
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.deterministic = False
    encoded = jpegs(folder)
    dataset = tf.data.Dataset.from_tensor_slices(encoded).repeat().map(example, cores).batch(BATCH)
    return batches(iter(dataset.prefetch(2).with_options(options)), len(encoded))


run(decode=decode)
