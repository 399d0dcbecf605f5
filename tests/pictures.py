"""Small sets of generated pictures, for tests of data."""

import io

import numpy as np


def write_images(folder, classes=("cat", "dog"), count=2, shape=(10, 14)):
    """Class folders; picture k of class c is all 100 c + k."""
    from PIL import Image

    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((*shape, 3), 100 * label + number, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def encoded(pixels, path=None):
    """A picture as parquet files hold it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def plain(number, size=32):
    """A picture that is all one number."""
    return encoded(np.full((size, size, 3), number, dtype=np.uint8))
