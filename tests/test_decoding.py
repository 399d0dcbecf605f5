"""Pictures of all kinds become three channels of bytes, as a viewer would show them, or are refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from natgrad_lab.data.decoding import UnreadableError, picture


def file_of(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def flat(mode, colour):
    return Image.new(mode, (6, 4), colour)


KINDS = {
    "grey": (file_of(flat("L", 77)), (77, 77, 77)),
    "one bit": (file_of(flat("1", 1)), (255, 255, 255)),
    "palette": (file_of(flat("RGB", (10, 20, 30)).quantize(4)), (10, 20, 30)),
    "colour": (file_of(flat("RGB", (10, 20, 30))), (10, 20, 30)),
    "transparent": (file_of(flat("RGBA", (10, 20, 30, 0))), (255, 255, 255)),
    "opaque": (file_of(flat("RGBA", (10, 20, 30, 255))), (10, 20, 30)),
    "grey and transparent": (file_of(flat("LA", (7, 0))), (255, 255, 255)),
    "CMYK": (file_of(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    "16 bits": (file_of(Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16))), (156, 156, 156)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_colours_of_all_kinds_become_rgb(kind):
    file, colour = KINDS[kind]
    pixels = picture(file, None)
    assert (pixels.shape, pixels.dtype) == ((3, 4, 6), np.uint8)
    assert np.abs(pixels.astype(int) - np.array(colour).reshape(3, 1, 1)).max() <= 2


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_counts_the_first_frame(form):
    lossless = {"lossless": True} if form == "WEBP" else {}
    frames = [flat("RGB", (number, number, number)) for number in (50, 200)]
    file = file_of(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    assert (picture(file, None) == 50).all()


def test_a_picture_that_lies_on_its_side_is_turned_upright():
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    file = file_of(image, "PNG", exif=exif)
    assert (picture(file, None)[0] == np.rot90(np.asarray(image), -1)).all()


def ramp(height, width):
    """Columns count from 0."""
    return file_of(Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1))))


def test_a_picture_is_squashed_whole_or_cut_to_its_middle():
    squashed, cut = (picture(ramp(20, 40), 10, resize) for resize in ("squash", "cut"))
    assert squashed.shape == cut.shape == (3, 10, 10)
    np.testing.assert_allclose(squashed[0, 5], 4 * np.arange(10) + 1.5, atol=1.1)
    np.testing.assert_allclose(cut[0, 5], 10 + 2 * np.arange(10) + 0.5, atol=0.6)
    tall = picture(file_of(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (20, 1)).T)), 20, "cut")
    np.testing.assert_array_equal(tall[0, :, 3], np.arange(10, 30))


def whole():
    return file_of(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "empty"),
        (None, "empty"),
        (b"no picture", "no image format that is known"),
        (whole()[:-200], "OSError: image file is truncated"),
        (whole()[:30], "."),
        ("no/such.jpg", "not there"),
        ("tests", "IsADirectoryError"),
        (file_of(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "floating-point"),
        (file_of(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "TIFF"), "32 bits"),
    ],
    ids=["empty", "none", "text", "cut short", "a head alone", "missing", "a folder", "floats", "32 bits"],
)
def test_what_is_no_picture_is_refused_with_a_reason(file, why):
    with pytest.raises(UnreadableError, match=why) as refused:
        picture(file, 8)
    assert "\n" not in str(refused.value)
