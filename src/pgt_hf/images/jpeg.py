"""JPEG through simplejpeg's libjpeg-turbo: Pillow's pixels in less time, and no more rows than are used."""

import re
from functools import cache
from types import ModuleType

import numpy as np

_BASELINE = (0xC0, 0xC1)
_OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00]")  # within a scan, a zero byte follows each 0xFF that is no marker
_ROWS_NOT_READ = "extraneous bytes before marker 0xd9"
_LEAST = 8  # pixels; several of libjpeg's scales give a smaller image the same size


def decode_rows(file: bytes, width: int, height: int, rows: int, reduction: int = 1) -> np.ndarray | None:
    """Decodes JPEG that Pillow opens as "L" or "RGB", from the top down to the last row that is needed.

    JPEG is compressed row by row, so what lies below costs nothing if the decoder is told that the image ends there.
    That would hide a truncated file, so the file itself must still end properly, with no other marker in between.

    Args:
        file: The whole file.
        width: The image's width in pixels.
        height: The image's height in pixels.
        rows: How many rows of the reduced image are needed.
        reduction: Decode at 1, 1/2, 1/4 or 1/8 of the size.

    Returns:
        RGB, of shape (at least ``rows``, ceil(width / reduction), 3); the same bits as Pillow's. None if libjpeg had
        anything to say about the file, or simplejpeg is not installed: then it is for Pillow to read.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None or min(width, rows * reduction) < _LEAST:
        return None
    last = min((rows + 2) * reduction, height)  # colours are interpolated from the row below as well
    if last < height:
        start = _height_position(file)
        if start is None:
            last = height
        else:
            file = b"".join((file[:start], last.to_bytes(2, "big"), file[start + 2 :]))
    shape = -(-last // reduction), -(-width // reduction), 3
    pixels = np.empty(shape, np.uint8)
    try:
        # strict: the first of libjpeg's warnings is an error, but all pixels are there by then.
        simplejpeg.decode_jpeg(file, "RGB", min_height=shape[0], min_width=shape[1], buffer=pixels, strict=True)
    except ValueError as error:
        if last == height or _ROWS_NOT_READ not in str(error):
            return None
    return pixels


def _height_position(file: bytes) -> int | None:
    """Where the height is in a file that holds one complete baseline scan and nothing after it."""
    position, height = 2, None
    while position + 8 < len(file) and file[position] == 0xFF:
        marker = file[position + 1]
        if marker in _BASELINE:
            height = position + 5
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == _SCAN:
            end = _MARKER.search(file, position + 2)
            return height if end is not None and file[end.start() + 1] == _END else None
        position += 2 + int.from_bytes(file[position + 2 : position + 4], "big")
    return None


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return None
    return simplejpeg
