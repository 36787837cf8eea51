"""The little that the tools do to images: recognise them by their first bytes, and shrink them."""

import io

from PIL import Image

JPEG_QUALITY = 95
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def is_image(content: bytes) -> bool:
    """Whether bytes begin as an image does: JPEG, PNG, GIF, BMP, TIFF or WebP."""
    return content.startswith(_BEGINNINGS) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def shrink(content: bytes, short_side: int) -> bytes:
    """Shrink an image, antialiased and as JPEG, so that its short side is at most `short_side` pixels.

    An image that is small enough comes back unchanged. Raises ValueError if the image does not decode.
    """
    from trainer.data.pixels.decode import decode

    pixels = decode(content)
    height, width = pixels.shape[:2]
    if min(height, width) <= short_side:
        return content
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()
