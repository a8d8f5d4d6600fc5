"""The one decoder: a file's bytes to an upright 8-bit image, JPEG at a reduced size, or a ``BadImageError``."""

import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE as _BITS
from PIL.TiffImagePlugin import PLANAR_CONFIGURATION as _PLANES
from PIL.TiffImagePlugin import TiffImageFile

from ..limits import Count, Whole, checked
from .jpeg import decode_rows
from .raw import ppm, ppm_pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom
Size = tuple[int, int]  # height, width
File = bytes | memoryview | Image.Image

SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
    *(".jpg", ".jpx", ".jxl", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)  # those that Pillow does not read among them, which are met with an error that says so
_PNG = b"\x89PNG\r\n\x1a\n"
_TURNS = {  # EXIF's orientation, and what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEPTHS = (8, 12, 16, 31)  # bits of a level
_DEEP = re.compile(r"(RGB|RGBA|RGBX|[RGBA]);16[BLN]|LA;16B")  # Pillow's names for colour of 16 bits in a file
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # a program, which Pillow would have Ghostscript run
_NO_IMAGES = {
    rb"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself with: git lfs pull",
    rb"\s*<\?xml|\s*<svg": "it is XML, perhaps SVG, and no pixels",
    rb"\s*<": "it is a web page, perhaps the error of a download",
    rb"%PDF": "it is a PDF",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!": "it is an archive; unpack it",
    rb"....ftyp(hei|hev|mif1|msf1)": "it is HEIC, which Pillow does not read; convert it to JPEG",
    rb"\xff\x0a|....JXL ": "it is JPEG XL, which Pillow does not read; convert it to JPEG",
}


class BadImageError(ValueError):
    """An image that cannot be used: truncated, in no known format, or too large to decode. The message says which."""

    def __init__(self, message: str) -> None:
        # A DataLoader puts the whole traceback of its worker into the message.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def decode(
    image: File, plan: Callable[[int, int], tuple[Box, Size | None]], margin: int = 1
) -> tuple[np.ndarray, Size | None]:
    """Decodes the part of an image that will be used: JPEG by simplejpeg where it can, all else by Pillow.

    ``plan`` takes the width and height of the upright image. It returns the box to use, and the size that it will be
    scaled to, if known. The box is decoded at no less than ``margin`` times that size, if the file has as much.

    Returns:
        The box of the upright image, (H, W, 3), perhaps reduced by 2, 4 or 8; and the size that ``plan`` gave.

    Raises:
        BadImageError: The image cannot be decoded, or has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels at the size
            that it would be decoded at, which its header tells.

    Example:
        >>> decode(Image.new("L", (80, 60)), lambda width, height: ((0, 0, 30, 20), None))[0].shape
        (20, 30, 3)
    """
    if isinstance(image, bytes | memoryview) and (pixels := ppm_pixels(image)) is not None:
        height, width, _ = pixels.shape
        _check_size(width, height)
        check_pixels(width * height, f"{width} x {height} pixels")
        (left, top, right, bottom), size = plan(width, height)
        return pixels[top:bottom, left:right].copy(), size
    if isinstance(image, memoryview):
        image = image.tobytes()
    jpeg = isinstance(image, bytes) and image.startswith(b"\xff\xd8\xff")
    with _errors():
        source = _open(image) if isinstance(image, bytes) else image
        _check_size(*source.size)
        deep = _is_deep(source)
        if not jpeg:  # it is decoded whole; PNG may name its orientation last, and TIFF turns itself
            check_pixels(source.width * source.height, f"{source.width} x {source.height} pixels")
            source.load()
        orientation = _orientation(source)
        if deep and isinstance(image, bytes):
            source = _all_bits(source, image)
        width, height = source.size if orientation < 5 else source.size[::-1]
    box, size = plan(width, height)
    with _errors():
        whole = box == (0, 0, width, height)
        reduction = 1
        if isinstance(source, JpegImageFile) and isinstance(image, bytes):
            if size is not None:
                reduction = _reduction(box, size, margin)
                source.draft("RGB", (max(source.width // reduction, 1), max(source.height // reduction, 1)))
            # libjpeg keeps all of a progressive file in memory, however small the result.
            decoded = width * height if "progressive" in source.info else source.width * source.height
            check_pixels(decoded, f"{width} x {height} pixels, decoded at 1/{reduction}")
            if orientation == 1 and source.mode in ("L", "RGB"):
                left, top, right, bottom = (0, 0, *source.size) if whole else _scaled(box, reduction)
                rows = decode_rows(image, width, height, bottom, reduction)
                if rows is not None:
                    return rows[top:bottom, left:right], size
            source.load()
        if orientation in _TURNS:
            source = source.transpose(_TURNS[orientation])
        if not whole:
            source = _grey(source).crop(_scaled(box, reduction))
        return np.array(to_rgb(source)), size


@checked
def shrink(image: bytes, shorter_side: Count, quality: Annotated[int | None, Whole("[1, 95]")]) -> bytes:
    """The image as JPEG with its shorter side at most ``shorter_side`` pixels; as PPM if ``quality`` is None.

    EXIF orientation is applied, other metadata are dropped. For JPEG, grey stays grey, and an image that is small
    enough and upright comes back byte for byte, in whatever format it is. PPM is RGB, with nothing to decode.

    Raises:
        BadImageError: It cannot be decoded: small ones are decoded too, to find out.
    """
    smaller = read_upright(image, shorter_side)
    if quality is None:
        return ppm(np.asarray(smaller))
    with _errors():
        source = _open(image)
        if source.size == smaller.size and _orientation(source) == 1:
            return image
    file = BytesIO()
    mode = "L" if source.mode == "L" or _is_deep_grey(source) else "RGB"
    smaller.convert(mode).save(file, "JPEG", quality=int(quality))
    return file.getvalue()


@checked
def read_upright(image: File, shorter_side: Count | None = None) -> Image.Image:
    """The whole image, upright and with three 8-bit channels; or a smaller copy of it.

    Raises:
        BadImageError: As ``decode``.

    Example:
        >>> read_upright(Image.new("L", (80, 60)), shorter_side=30).size
        (40, 30)
    """
    pixels, size = decode(image, partial(_whole, shorter_side), margin=2)
    whole = Image.fromarray(pixels)
    return whole if size is None else whole.resize(size[::-1], Image.Resampling.BICUBIC)


@checked
def to_rgb(image: Image.Image) -> Image.Image:
    """The image with three 8-bit channels; real sets contain grey, 16-bit, palette, CMYK and transparent ones.

    Grey of more than 8 bits (modes I, I;16 and F) is scaled from the smallest of these ranges that holds its largest
    value: 8, 12, 16 and 31 bits, and for floats [0, 1] before these. Values below 0, and NaN, are black. ``decode``
    does the same with colour of 16 bits, which Pillow would cut to the upper 8.

    Example:
        >>> to_rgb(Image.new("CMYK", (8, 8))).mode
        'RGB'
    """
    image = _grey(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # or Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def check_pixels(pixels: int, what: str) -> None:
    """PIL's guard against decompression bombs, for the size that is really decoded."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(
            f"the image is too large: {what}, above PIL.Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS}"
        )


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImageError(f"the image has no pixels: {width} x {height}")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:  # PIL's decoders raise exceptions of any kind
        raise BadImageError(f"the image cannot be decoded: {error}") from error


def _open(data: bytes) -> Image.Image:
    if data.startswith(b"\xff\xd8\xff"):  # Image.open refuses large ones, before draft() can make them affordable
        return JpegImageFile(BytesIO(data))
    if data.startswith(_PNG):
        _check_png(data)
    if data.startswith(_POSTSCRIPT):
        raise BadImageError("the image cannot be decoded: it is PostScript, which is not run")
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        found = next((what for begin, what in _NO_IMAGES.items() if re.match(begin, data, re.DOTALL)), None)
        reason = found or "it is empty, damaged or in no known format"
        raise BadImageError(f"the image cannot be decoded: {reason}") from error
    if isinstance(image, TiffImageFile):
        _mend_planes(image)
    return image


def _check_png(data: bytes) -> None:
    """Compares the checksums of all chunks, most of which PIL passes over."""
    view, place, kind = memoryview(data), len(_PNG), b""
    while kind != b"IEND":
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        kind, checksum = bytes(view[place + 4 : place + 8]), view[end : end + 4]
        if len(checksum) < 4:
            raise BadImageError("the image cannot be decoded: the PNG file is truncated or damaged")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(checksum, "big"):
            raise BadImageError(f"the image cannot be decoded: the checksum of PNG chunk {kind!r} is wrong")
        place = end + 4


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8; from 5 on, width and height are exchanged."""
    if isinstance(image, JpegImageFile) and not image.info.keys() & {"exif", "xmp"}:
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the image
        return 1
    return orientation if orientation in _TURNS else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet holds colour of 16 bits."""
    tiles = getattr(image, "tile", ())
    return bool(tiles) and all(_DEEP.fullmatch(_raw_mode(tile)) for tile in tiles)


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _with_raw_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)


def _all_bits(upper: Image.Image, file: bytes) -> Image.Image:
    """An image of which Pillow has read the upper bytes: where a file uses 12 bits or 8, they are next to black."""
    levels = np.array(upper.convert("RGB"), dtype=np.float32)
    if levels.max() > 15:
        return upper
    lower: Any = _open(file)
    if lower.tile[0].codec_name == "libtiff" and lower.tag_v2.get(_PLANES) == 2:
        raise BadImageError("the image cannot be decoded: it has 16 bits, few of them used, in compressed planes")
    grey = _raw_mode(lower.tile[0]) == "LA;16B"  # read as RGBA: the upper and lower byte of grey, and of alpha
    lower.tile = [
        _with_raw_mode(tile, "RGBA" if grey else (mode := _raw_mode(tile))[:-1] + _OTHER_BYTE[mode[-1]])
        for tile in lower.tile
    ]
    lower.load()
    below = np.asarray(lower)
    return _in_8_bits(256 * levels + (below[..., 1:2] if grey else below[..., :3]))


def _mend_planes(image: TiffImageFile) -> None:
    """Of colours that lie in planes of 16 bits Pillow would read 8."""
    if image.tag_v2.get(_PLANES) == 2 and set(image.tag_v2.get(_BITS, ())) == {16}:
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        image.tile = [
            _with_raw_mode(tile, f"{_raw_mode(tile)};16{order}") if tile.codec_name == "raw" else tile
            for tile in image.tile
        ]


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits becomes mode L, see ``to_rgb``; convert() would clip it."""
    if not _is_deep_grey(image):
        return image
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    if image.mode == "F" and levels.max(initial=0) <= 1:
        return Image.fromarray((levels * 255).round().astype(np.uint8))
    return _in_8_bits(levels)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _in_8_bits(levels: np.ndarray) -> Image.Image:
    depth = next((bits for bits in _DEPTHS if levels.max(initial=0) < 2**bits), _DEPTHS[-1])
    return Image.fromarray((levels / 2 ** (depth - 8)).clip(max=255).astype(np.uint8))


def _whole(shorter_side: int | None, width: int, height: int) -> tuple[Box, Size | None]:
    """A plan for the whole image, with its shorter side at most so many pixels."""
    if shorter_side is None:
        return (0, 0, width, height), None
    scale = min(shorter_side / min(width, height), 1)
    return (0, 0, width, height), (max(round(height * scale), 1), max(round(width * scale), 1))


def _reduction(box: Box, size: Size, margin: int) -> int:
    """The most that libjpeg may shrink the image by, with the box still ``margin`` times the size."""
    left, top, right, bottom = box
    least = margin * size[0], margin * size[1]
    return next((by for by in (8, 4, 2) if bottom - top >= by * least[0] and right - left >= by * least[1]), 1)


def _scaled(box: Box, reduction: int) -> Box:
    left, top, right, bottom = (round(edge / reduction) for edge in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
