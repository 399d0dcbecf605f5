"""One encoded picture becomes size x size pixels of three channels, or a line that says why it cannot."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Resize = Literal["squash", "cut"]
"""All of the picture, whatever its shape; or its middle square: short side to size, then the centre."""


class UnreadableError(ValueError):
    """A picture that no pixels come out of; says why in a few words."""


def picture(encoded: bytes | str | None, size: int | None, resize: Resize = "squash") -> np.ndarray:
    """Decode a file's bytes, or the file at a path, to uint8 [3, size, size], or at its own size for None.

    Any colours become RGB; transparent pixels show white; of an animation counts the first frame; a picture that says
    that it lies on its side (EXIF) is turned upright.
    """
    from PIL import Image

    if not encoded:
        raise UnreadableError("empty")
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as opened:
            shown = in_colours(upright(opened))
            shown = shown if size is None else resized(shown, size, resize)
            return np.asarray(shown, dtype=np.uint8).transpose(2, 0, 1)
    except Exception as error:  # decoders of broken files raise all there is
        raise UnreadableError(reason(error, encoded)) from None


def upright(opened: Image) -> Image:
    """Turn a picture as its EXIF entry says, which most have not."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(opened) if opened.getexif() else opened


def in_colours(shown: Image) -> Image:
    """Return any picture as RGB with 8 bits a channel."""
    from PIL import Image

    if shown.mode.startswith("I"):  # 16 bits of grey; PIL would cut off what is above 255
        grey = np.asarray(shown)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise UnreadableError("32 bits a pixel, whose range is not known")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if shown.mode == "F":
        raise UnreadableError("floating-point pixels, whose range is not known")
    if shown.has_transparency_data:
        shown = shown.convert("RGBA")
        white = Image.new("RGBA", shown.size, "white")
        return Image.alpha_composite(white, shown).convert("RGB")
    return shown.convert("RGB")


def resized(shown: Image, size: int, resize: Resize) -> Image:
    """Interpolate all of a picture, or its middle square, to size x size pixels."""
    from PIL import Image

    if shown.size == (size, size):
        return shown
    width, height = shown.size
    side = min(width, height)
    left, top = ((width - side) / 2, (height - side) / 2) if resize == "cut" else (0, 0)
    box = (left, top, width - left, height - top)
    return shown.resize((size, size), Image.Resampling.BILINEAR, box=box)


def reason(error: Exception, encoded: bytes | str) -> str:
    """Say in a few words what a decoder found."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnreadableError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(encoded, str) and not os.path.getsize(encoded)
        return "empty" if empty else "no image format that is known"
    text = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:120]
