"""Image corruptions at five levels: a domain shift for any data set.

Kinds and levels are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), on Pillow and numpy; lengths
are theirs at 224 pixels and follow the image's size. The package ``imagecorruptions`` has more, but not for numpy 2.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageFilter

from ..limits import OneOf, Whole, checked
from .decoding import read_upright
from .transforms import ImageTransform

_Corruption = Callable[[Image.Image, int], Image.Image]


class Corrupted:
    """An ``ImageTransform`` that corrupts images first, at the size that the network sees them.

    ``kind`` is one of ``CORRUPTIONS``, ``level`` from 1, the mildest, to 5. Noise is drawn from numpy's global state,
    which ``ImageDataset`` seeds for each image.

    Example:
        >>> noisy = Corrupted(ImageTransform({"input_size": (3, 32, 32)}, training=False), "gaussian_noise", 3)
        >>> noisy(Image.new("L", (8, 8))).shape
        torch.Size([3, 32, 32])
    """

    @checked
    def __init__(self, transform: ImageTransform, kind: str, level: Annotated[int, Whole("[1, 5]")]) -> None:
        OneOf(CORRUPTIONS).check("kind", kind)
        self.transform, self.kind, self.level = transform, kind, level
        self.blank = transform.blank

    def __call__(self, image: bytes | Image.Image) -> Any:
        whole = read_upright(image)
        scale = max(self.transform.size) / min(whole.size)
        shown = whole.resize([max(round(side * scale), 1) for side in whole.size], Image.Resampling.BICUBIC)
        return self.transform(CORRUPTIONS[self.kind](shown, self.level - 1))


def _gaussian_noise(image: Image.Image, level: int) -> Image.Image:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    pixels = _pixels(image)
    return _image(pixels + np.random.normal(scale=deviation, size=pixels.shape))  # noqa: NPY002 - seeded per image


def _impulse_noise(image: Image.Image, level: int) -> Image.Image:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    pixels = _pixels(image)
    drawn = np.random.random(pixels.shape)  # noqa: NPY002
    return _image(np.where(drawn < share / 2, 0.0, np.where(drawn > 1 - share / 2, 1.0, pixels)))


def _gaussian_blur(image: Image.Image, level: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur((1, 2, 3, 4, 6)[level] * min(image.size) / 224))


def _contrast(image: Image.Image, level: int) -> Image.Image:
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _image((pixels - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean)


def _brightness(image: Image.Image, level: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue, saturation, value.point(lambda v: v + 255 * (level + 1) // 10))).convert("RGB")


def _pixelate(image: Image.Image, level: int) -> Image.Image:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    small = image.resize((max(int(image.width * share), 1), max(int(image.height * share), 1)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _jpeg(image: Image.Image, level: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return Image.open(file).convert("RGB")


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
