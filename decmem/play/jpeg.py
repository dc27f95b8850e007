"""Frames as JPEGs, and pictures of any kind as frames."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from decmem.errors import UserError

QUALITY = 90
THUMBNAIL = (64, 96)
_MOST_PIXELS = 64 * 2**20


def jpeg(frame: UInt8[np.ndarray, "H W 3"], quality: int = QUALITY) -> bytes:
    """One frame."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A frame made small."""
    height, width = THUMBNAIL
    small = Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def load_picture(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as a frame of this size: its middle, scaled.

    Raises:
        UserError: for a file that is no picture, or one too large to unpack.
    """
    height, width = size
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF")) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise UserError(
                    "picture",
                    f"{picture.width} x {picture.height} pixels",
                    f"Give one of at most {_MOST_PIXELS // 2**20} million",
                )
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "picture", "not a picture that can be read", "Give a JPEG, PNG or WebP"
        ) from error
    scale = min(picture.width / width, picture.height / height)
    across, down = width * scale, height * scale
    left, upper = (picture.width - across) / 2, (picture.height - down) / 2
    box = (left, upper, left + across, upper + down)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized).copy()
