"""A grid of many images as one picture, for TensorBoard and for the contact sheet of `launch data inspect`."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

TILE = 64
"""Smallest side of a tile, in pixels."""


def captioned_grid(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Draw images (n, height, width, 3) uint8 as a grid with a caption below each, as square as possible.

    Returns (height, width, 3) uint8. A tile is as large as an image, but at least 64 pixels wide.
    """
    columns = int(np.ceil(np.sqrt(len(images))))
    tile, text = max(TILE, images.shape[1]), 12
    num_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, num_rows * (tile + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * tile, i // columns * (tile + text)
        # To the nearest pixel, so that those of small images stay visible.
        scaled = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(scaled, (x, y))
        draw.text((x + 2, y + tile), caption, fill="black")
    return np.asarray(sheet)
