"""Images as raw pixels: PPM, which any program reads and which costs no decoding."""

import re

import numpy as np

_PPM = re.compile(rb"P6\n(\d{1,9}) (\d{1,9})\n255\n")


def ppm(pixels: np.ndarray) -> bytes:
    """The file of uint8 pixels of shape (H, W, 3)."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def ppm_pixels(file: bytes | memoryview) -> np.ndarray | None:
    """A view of shape (H, W, 3), without a copy; None unless it is a complete file as ``ppm`` writes them."""
    header = _PPM.match(file)
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    pixels = np.frombuffer(file, np.uint8, offset=header.end())
    return pixels.reshape(height, width, 3) if pixels.size == 3 * height * width else None
