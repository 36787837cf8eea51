"""Many images in one picture, for TensorBoard and for contact sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

TILE = 64


def captioned_grid(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """(n, height, width, 3) uint8 to one (rows × tile, columns × tile, 3) picture, tiles of at least 64 px."""
    columns = int(np.ceil(np.sqrt(len(images))))
    tile, text = max(TILE, images.shape[1]), 12
    num_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, num_rows * (tile + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * tile, i // columns * (tile + text)
        scaled = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(scaled, (x, y))
        draw.text((x + 2, y + tile), caption, fill="black")
    return np.asarray(sheet)
