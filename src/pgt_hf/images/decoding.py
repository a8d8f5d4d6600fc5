"""Decodes bytes to an upright PIL image, JPEG at a reduced size; a ``BadImageError`` says why it cannot."""

from collections.abc import Callable
from io import BytesIO
from typing import Annotated

from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from ..limits import Count, Whole, checked

Box = tuple[int, int, int, int]  # left, top, right, bottom
Size = tuple[int, int]  # height, width

_UPRIGHT = 1


class BadImageError(ValueError):
    """An image that cannot be used: truncated, in no known format, or too large to decode. The message says which."""


def decode(
    image: bytes | Image.Image, plan: Callable[[int, int], tuple[Box, Size | None]], margin: int = 1
) -> tuple[Image.Image, Size | None]:
    """Decodes the part of an image that will be used.

    ``plan`` takes the width and height of the upright image, before anything is decoded. It returns the box to use,
    and the size that it will be scaled to, if known. The box is decoded at no less than ``margin`` times that size, if
    the file has as much.

    Returns:
        The box of the upright image, perhaps reduced by 2, 4 or 8, and the size that ``plan`` gave.

    Raises:
        BadImageError: The image cannot be decoded, or is too large for it.
    """
    try:
        return _decode(image, plan, margin)
    except BadImageError:
        raise
    except Exception as error:  # PIL's decoders raise whatever meets them
        raise BadImageError(f"the image cannot be decoded: {error}") from error


@checked
def shrink(image: bytes, shorter_side: Count, quality: Annotated[int, Whole("[1, 95]")]) -> bytes:
    """The image as JPEG with its shorter side at most ``shorter_side`` pixels.

    EXIF orientation is applied, other metadata are dropped, grey stays grey. An image that is small enough and upright
    comes back byte for byte, in whatever format it is.

    Raises:
        BadImageError: It cannot be decoded: small ones are decoded too, to find out.
    """

    def plan(width: int, height: int) -> tuple[Box, Size]:
        scale = min(shorter_side / min(width, height), 1)
        return (0, 0, width, height), (max(round(height * scale), 1), max(round(width * scale), 1))

    decoded, size = decode(image, plan, margin=2)
    assert size is not None
    source = _open(image)
    if _orientation(source) == _UPRIGHT and source.size == size[::-1]:
        return image
    smaller = decoded if decoded.mode == "L" else to_rgb(decoded)
    file = BytesIO()
    smaller.resize(size[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def read_upright(image: bytes | Image.Image) -> Image.Image:
    """The whole image, upright and with three 8-bit channels.

    Example:
        >>> read_upright(Image.new("L", (80, 60))).mode
        'RGB'
    """
    return to_rgb(decode(image, lambda width, height: ((0, 0, width, height), None))[0])


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with three 8-bit channels; real sets contain grey, 16-bit, palette, CMYK and transparent ones.

    Example:
        >>> to_rgb(Image.new("CMYK", (8, 8))).mode
        'RGB'
    """
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_pixels(pixels: int, what: str) -> None:
    """PIL's guard against decompression bombs, for the size that is really decoded."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(
            f"the image is too large: {what}, above PIL.Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS}"
        )


def _decode(
    image: bytes | Image.Image, plan: Callable[[int, int], tuple[Box, Size | None]], margin: int
) -> tuple[Image.Image, Size | None]:
    source = _open(image) if isinstance(image, bytes) else image
    orientation = _orientation(source)
    width, height = source.size if orientation < 5 else source.size[::-1]
    box, size = plan(width, height)

    reduction = 1
    if isinstance(image, bytes) and isinstance(source, JpegImageFile) and size is not None:
        reduction = _reduction(box, size, margin)
        source.draft("RGB", (max(source.width // reduction, 1), max(source.height // reduction, 1)))
    check_pixels(source.width * source.height, f"{width} x {height} pixels, decoded at 1/{reduction}")
    source.load()
    if orientation != _UPRIGHT:
        source = ImageOps.exif_transpose(source)
    return (source if box == (0, 0, width, height) else source.crop(_scaled(box, reduction))), size


def _open(data: bytes) -> Image.Image:
    # Image.open refuses large images by their header, before draft() can make them affordable.
    return JpegImageFile(BytesIO(data)) if data.startswith(b"\xff\xd8\xff") else Image.open(BytesIO(data))


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8; from 5 on, width and height are exchanged."""
    if isinstance(image, JpegImageFile) and not image.info.keys() & {"exif", "xmp"}:
        return _UPRIGHT
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # a broken EXIF block says nothing about the image
        return _UPRIGHT
    return orientation if orientation in range(1, 9) else _UPRIGHT


def _reduction(box: Box, size: Size, margin: int) -> int:
    """The most that libjpeg may shrink the image by, with the box still ``margin`` times the size."""
    left, top, right, bottom = box
    least = margin * size[0], margin * size[1]
    return next((by for by in (8, 4, 2) if bottom - top >= by * least[0] and right - left >= by * least[1]), 1)


def _scaled(box: Box, reduction: int) -> Box:
    left, top, right, bottom = (round(edge / reduction) for edge in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
