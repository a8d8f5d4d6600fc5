"""timm's augmentation and evaluation transforms, from an image or its bytes to a tensor, in a fraction of the time.

timm's ``create_transform`` says what is done; size, crop, interpolation, mean and std come from the model's own
config, so that training, evaluation and the saved model's ``AutoImageProcessor`` agree. Three things make it fast. The
crop is drawn from the header's size, and JPEG is decoded no larger than the crop needs; resizing runs in torch, whose
kernel for bytes is vectorised; colour jitter works in place on one float image, or on the device on whole batches.
"""

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from ..limits import Number, OneOf, Positive, Whole, checked
from .decoding import Box, Size, check_pixels, decode
from .device_transforms import LUMA
from .rules import AutoAugment
from .seeding import preserve_rng

# What timm's transforms can do and this one does not.
_ELSEWHERE = dict.fromkeys(("naflex", "patchify", "separate", "tf_preprocessing", "use_prefetcher"), "not here")
_ELSEWHERE |= dict.fromkeys(
    ("re_prob", "re_mode", "re_count", "re_num_splits"), "random erasing happens after normalisation, on the device"
)

# How much larger than needed JPEG is decoded. In training a slightly other sharpness does no harm; evaluation should
# agree with what others measure, and PIL's own thumbnails take 2, "very close to fair resampling".
_TRAINING_MARGIN, _EVALUATION_MARGIN = 1, 2

_RULES: dict[str, Any] = {
    "scale": Number("(0, 1]"),
    "ratio": Number("(0, 100]"),
    "color_jitter": Number("[0, 10]"),
    "hflip": Number("[0, 1]"),
    "vflip": Number("[0, 1]"),
    "crop_pct": Number("[0.05, 1]"),
    "auto_augment": AutoAugment(),
    "interpolation": OneOf(("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")),
}
_FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_ON_TENSORS = (MaybePILToTensor, transforms.CenterCrop, *_FLIPS)
_STACKED = ("pixel_values", "augmentation")
_IN_TORCH = (transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.BICUBIC)


_OF_CHANNELS: dict[str, Number] = {"mean": Number(), "std": Number("(0, inf)"), "input_size": Whole("[1, 8192]")}


def check_channels(name: str, values: Any) -> None:
    """Raises TypeError or ValueError unless a ``mean``, ``std`` or ``input_size`` has its three numbers."""
    if not hasattr(values, "__len__") or len(values) != 3 or (name == "input_size" and values[0] != 3):
        raise ValueError(f"{name} must have 3 numbers, for RGB, got {values!r}")
    for value in values:
        _OF_CHANNELS[name].check(name, value)


class ImageTransform:
    """Turns one image into a tensor of the model's input size.

    Bytes are decoded here: JPEG at the smallest of libjpeg's sizes (1, 1/2, 1/4, 1/8) that is not below what is
    needed, in evaluation not below twice that. EXIF orientation is applied; grey, 16-bit, palette, CMYK and
    transparent images become RGB.

    Args:
        config: The model's ``config.pretrained_cfg``: input size, mean, std, interpolation, crop.
        training: Augment: random resized crop, flip and colour jitter; else resize and crop the centre.
        normalize: Return float32, normalised by the model's mean and std; if False uint8, a quarter of the memory, to
            be normalised on the device by ``normalize(images, transform.mean, transform.std)``.
        on_device: Leave flips and colour jitter, where nothing but normalisation follows them, to
            ``augment(images, augmentation)`` on the device: a call then returns both, ``pixel_values`` (uint8) and
            ``augmentation``, what was drawn for this image. The result is the same but for rounding.
        **augmentation: For training, as ``timm.data.create_transform`` takes it: ``scale=(0.08, 1.0)``, ``hflip=0.5``,
            ``color_jitter=0.4``, ``auto_augment="rand-m9-mstd0.5"``, ``interpolation="random"``. Random erasing is not
            among them: it belongs after normalisation, on the device.

    Raises:
        BadImageError: From the call: as ``decode``.

    Example:
        >>> transform = ImageTransform({"input_size": (3, 32, 32)}, training=True, normalize=False)
        >>> image = transform(Image.new("RGB", (80, 60)))
        >>> image.shape, image.dtype
        (torch.Size([3, 32, 32]), torch.uint8)
    """

    @checked
    def __init__(
        self,
        config: Mapping[str, Any],
        training: bool,
        *,
        normalize: bool = True,
        on_device: bool = False,
        **augmentation: Any,
    ) -> None:
        for name in augmentation:
            if name in _ELSEWHERE:
                raise ValueError(f"augmentation must be that of one image, got {name}: {_ELSEWHERE[name]}")
        own = {"crop_pct": config.get("crop_pct"), "interpolation": config.get("interpolation") or "bicubic"}
        check_augmentation(own | augmentation)
        for name in _OF_CHANNELS:
            if config.get(name) is not None:
                check_channels(name, config[name])
                config = {**config, name: np.asarray(config[name]).tolist()}
        options = resolve_data_config(pretrained_cfg=dict(config))
        self.normalize = normalize and not on_device
        self.mean, self.std = tuple(options["mean"]), tuple(options["std"])
        self.size: tuple[int, int] = tuple(options["input_size"][-2:])
        options |= augmentation if training else {}
        steps = create_transform(**options, is_training=training, normalize=False).transforms

        # The first step decides how large the image is decoded. Any other than these two is left to PIL, as in timm.
        self._crop: RandomResizedCropAndInterpolation | None = None
        self._shorter_side: int | None = None
        self._interpolations: Sequence[transforms.InterpolationMode] = ()
        first = steps[0]
        if isinstance(first, RandomResizedCropAndInterpolation):
            self._crop, steps = first, steps[1:]
            chosen = first.interpolation
            self._interpolations = chosen if isinstance(chosen, tuple) else (chosen,)
        elif isinstance(first, transforms.Resize) and isinstance(first.size, int):
            self._shorter_side, steps = first.size, steps[1:]
            self._interpolations = (first.interpolation,)
        self._steps = [_Jitter(step) if _is_plain_jitter(step) else step for step in steps]
        self._on_device: list[Any] | None = None
        if on_device:
            first = len(self._steps)
            while first and isinstance(self._steps[first - 1], (MaybePILToTensor, _Jitter, *_FLIPS)):
                first -= 1
            self._on_device = [step for step in self._steps[first:] if not isinstance(step, MaybePILToTensor)]
            self._steps = self._steps[:first]

    def __call__(self, image: bytes | Image.Image) -> Any:
        region, size = decode(image, self._plan, _TRAINING_MARGIN if self._crop else _EVALUATION_MARGIN)
        decoded = torch.from_numpy(region).permute(2, 0, 1)  # the channels last in memory
        pixels: Tensor | Image.Image = decoded
        if size is not None:
            several = len(self._interpolations) > 1
            interpolation = random.choice(self._interpolations) if several else self._interpolations[0]
            pixels = _resize(decoded, size, interpolation)
        for step in self._steps:
            if isinstance(step, _Jitter):
                pixels = step(_to_tensor(pixels))
            else:
                pixels = step(pixels if isinstance(step, _ON_TENSORS) else _to_image(pixels))
        pixels = _to_tensor(pixels)
        if self.normalize:
            return normalize(pixels[None], self.mean, self.std)[0]
        if self._on_device is None:
            return pixels.contiguous()
        return {"pixel_values": pixels.contiguous(), "augmentation": _draw(self._on_device)}

    def blank(self) -> Any:
        """A black image, of the shape and type that a call gives."""
        pixels = torch.zeros(3, *self.size, dtype=torch.float32 if self.normalize else torch.uint8)
        if self._on_device is None:
            return pixels
        with preserve_rng():
            return {"pixel_values": pixels, "augmentation": torch.zeros_like(_draw(self._on_device))}

    def _plan(self, width: int, height: int) -> tuple[Box, Size | None]:
        """For ``decode``; no size where PIL does all that follows."""
        whole = (0, 0, width, height)
        if self._crop is not None:
            shape = torch.empty(1).expand(height, width)  # the size is all that timm asks for
            top, left, crop_height, crop_width = self._crop.get_params(shape, self._crop.scale, self._crop.ratio)
            # In an image of a few pixels timm may draw an empty crop, at its edge.
            left, top = min(left, width - 1), min(top, height - 1)
            return (left, top, left + max(crop_width, 1), top + max(crop_height, 1)), self.size
        if self._shorter_side is None:
            return whole, None
        short, long = sorted((width, height))
        longer_side = int(self._shorter_side * long / short)
        check_pixels(self._shorter_side * longer_side, f"{width} x {height} pixels, too long and thin to resize")
        return whole, (self._shorter_side, longer_side) if height <= width else (longer_side, self._shorter_side)


def check_augmentation(options: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for an option of timm's ``create_transform`` that is out of its range."""
    for name, value in options.items():
        if name in _RULES and (value is not None or name == "interpolation"):
            several = name in ("scale", "ratio", "color_jitter") and isinstance(value, (tuple, list))
            for item in value if several else (value,):
                _RULES[name].check(name, item)
    jitter = options.get("color_jitter")
    if isinstance(jitter, (tuple, list)) and len(jitter) not in (3, 4):
        raise ValueError(f"color_jitter must be a number, or 3 or 4 of them, got {jitter!r}")
    for name in ("scale", "ratio"):
        pair = options.get(name) or (0, 1)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[0] > pair[1]:
            raise ValueError(f"{name} must be two rising numbers, got {pair!r}")


class _Jitter:
    """torchvision's ColorJitter without hue, with the same draws; values differ from PIL's by rounding alone."""

    def __init__(self, jitter: transforms.ColorJitter) -> None:
        self.jitter = jitter

    def draw(self) -> list[tuple[float, float, float]]:
        """Steps as ``device_transforms`` has them."""
        ranges = self.jitter
        order, brightness, contrast, saturation, _ = ranges.get_params(
            ranges.brightness, ranges.contrast, ranges.saturation, None
        )
        steps = [
            None if brightness is None else (brightness, 0.0, 0.0),
            None if contrast is None else (contrast, 0.0, 1 - contrast),
            None if saturation is None else (saturation, 1 - saturation, 0.0),
            None,
        ]
        return [step for number in order.tolist() if (step := steps[number]) is not None]

    def __call__(self, image: Tensor) -> Tensor:
        """Takes and returns uint8 of shape (3, H, W); ``augment`` for one image, on a CPU in a third of the time."""
        pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
        for times, of_grey, of_mean in self.draw():
            if of_mean:
                mean = int(torch.dot(pixels.mean((1, 2)), _LUMA) + 0.5)
                pixels.mul_(times).add_(of_mean * mean)
            elif of_grey:
                grey = (_LUMA @ pixels.flatten(1)).view(pixels.shape[1:])
                pixels.mul_(times).add_(grey.mul_(of_grey))
            else:
                pixels.mul_(times)
            pixels.clamp_(0, 255).floor_()  # PIL stores bytes after each step
        # By way of int16: torch vectorises these two, not the direct conversion.
        return pixels.to(torch.int16).to(torch.uint8)


_LUMA = torch.tensor(LUMA)


def _draw(steps: Sequence[Any]) -> Tensor:
    """What timm's transforms would have drawn in these steps, for ``augment``."""
    flips, jitter = [0.0, 0.0, 0.0], []
    for step in steps:
        if isinstance(step, _Jitter):
            jitter += step.draw()
        elif torch.rand(1) < step.p:
            flips[isinstance(step, transforms.RandomVerticalFlip)] = 1.0
    return torch.tensor([flips, *jitter])


@checked
def normalize(images: Tensor, mean: Sequence[float], std: Sequence[Positive]) -> Tensor:
    """Images of 0..255, shape (N, 3, H, W), to float32 of zero mean and unit deviation, on their own device.

    Example:
        >>> normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), mean=(0.5,) * 3, std=(0.5,) * 3).unique()
        tensor([1.])
    """
    if not len(mean) == len(std) == images.size(-3):
        raise ValueError(f"mean and std must have {images.size(-3)} numbers each, got {mean} and {std}")
    shift, scale = (_constant(tuple(values), images.device) for values in (mean, std))
    return images.to(torch.float32, copy=True).sub_(shift).div_(scale)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: Python numbers that become a tensor on a device wait for it."""
    with torch.inference_mode(False):  # for training, whoever asks first
        return (255 * torch.tensor(values)).to(device).view(-1, 1, 1)


@checked
def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks examples into ``pixel_values`` of shape (N, 3, H, W), ``labels`` of shape (N), and any ``augmentation``.

    Example:
        >>> collate([{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}] * 2)["labels"]
        tensor([1, 1])
    """
    if not len(examples) or any("labels" not in example for example in examples):
        raise ValueError(f"examples must be at least one, each with labels, got {str(examples)[:80]}")
    stacked = {name: torch.stack([example[name] for example in examples]) for name in _STACKED if name in examples[0]}
    return stacked | {"labels": torch.tensor([example["labels"] for example in examples], dtype=torch.long)}


def _resize(pixels: Tensor, size: Size, interpolation: transforms.InterpolationMode) -> Tensor:
    if interpolation not in _IN_TORCH:
        return _to_tensor(transforms.functional.resize(_to_image(pixels), list(size), interpolation))
    if pixels.shape[1:] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode=interpolation.value, antialias=True)[0]


def _to_tensor(image: Tensor | Image.Image) -> Tensor:
    """Shape (3, H, W), with the channels last in memory, where resizing is fastest."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_image(image: Tensor | Image.Image) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, Tensor) else image


def _is_plain_jitter(step: Any) -> bool:
    return isinstance(step, transforms.ColorJitter) and step.hue is None
