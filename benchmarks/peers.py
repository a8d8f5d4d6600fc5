"""Other loaders with the recipe's augmentation, each where it is installed: timm, torchvision, FFCV, DALI.

Each side is a function without arguments that yields one epoch's batches. ``on_device`` leaves to a GPU what the peer
itself can leave to one (its batches are then uint8); otherwise they are normalised floats.
"""

import io
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

Batches = Callable[[], Iterator[Tensor]]
MEAN, STD = 255 * np.array(IMAGENET_DEFAULT_MEAN), 255 * np.array(IMAGENET_DEFAULT_STD)


class Setting(NamedTuple):
    """What all sides do alike."""

    size: int
    color_jitter: float
    on_device: bool = False
    batch_size: int = 64
    workers: int = 0
    scale: tuple[float, float] = (0.08, 1.0)


def timm_loader(folder: str, setting: Setting) -> Batches:
    """As timm's train.py makes it; its prefetcher normalises by batch, on the device."""
    loader = create_loader(
        create_dataset("", root=folder),
        input_size=(3, setting.size, setting.size),
        batch_size=setting.batch_size,
        is_training=True,
        scale=setting.scale,
        color_jitter=setting.color_jitter,
        interpolation="bicubic",
        num_workers=setting.workers,
        device=torch.device("cpu"),
        persistent_workers=setting.workers > 0,
        pin_memory=False,
    )
    loader.loader.batch_sampler.drop_last = False  # it would drop the last images, and count fewer than the others
    return lambda: (images for images, _ in (loader.loader if setting.on_device else loader))


def torchvision_loader(folder: str, setting: Setting, tensors: bool = False) -> Batches:
    """As torchvision's references/classification has it, with either of its backends, PIL or tensor."""
    mode, jitter = v2.InterpolationMode.BICUBIC, setting.color_jitter
    steps = [v2.RandomResizedCrop(setting.size, scale=setting.scale, interpolation=mode, antialias=True)]
    steps += [v2.RandomHorizontalFlip()] + ([v2.ColorJitter(jitter, jitter, jitter)] if jitter else [])
    steps += [] if tensors else [v2.PILToTensor()]
    if not setting.on_device:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    loader = DataLoader(
        torchvision.datasets.ImageFolder(
            folder,
            v2.Compose([*steps, v2.ToPureTensor()]),
            **({"loader": lambda path: decode_image(path, ImageReadMode.RGB)} if tensors else {}),
        ),
        setting.batch_size,
        shuffle=True,
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
    )
    return lambda: (images for images, _ in loader)


def ffcv_loader(files: list[bytes], setting: Setting, where: Path, raw: bool = False) -> Batches:
    """Its own file format, with JPEG of quality 90 or raw pixels; it has no bicubic interpolation."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomBrightness,
        RandomContrast,
        RandomHorizontalFlip,
        RandomSaturation,
        ToTensor,
        ToTorchImage,
    )
    from ffcv.writer import DatasetWriter

    path = where / f"{'raw' if raw else 'jpg'}-{len(files)}-{sum(map(len, files))}.beton"
    if not path.exists():
        fields = {"image": RGBImageField(write_mode="raw" if raw else "jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Decoded(files))
    jitter = setting.color_jitter
    steps: list[Any] = [
        RandomResizedCropRGBImageDecoder((setting.size, setting.size), scale=setting.scale),
        RandomHorizontalFlip(),
    ]
    if jitter:
        steps += [RandomBrightness(jitter, 1.0), RandomContrast(jitter, 1.0), RandomSaturation(jitter, 1.0)]
    steps += [] if setting.on_device else [NormalizeImage(MEAN, STD, np.float32)]
    loader = Loader(
        str(path),
        batch_size=setting.batch_size,
        num_workers=max(setting.workers, 1),
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines={"image": [*steps, ToTensor(), ToTorchImage(channels_last=False)], "label": None},
    )
    return lambda: (batch[0] for batch in loader)


def dali_loader(folder: str, setting: Setting, interpolation: str = "cubic") -> Batches:
    """On the CPU; what a GPU pipeline of DALI would do after the crop is left out where ``on_device``."""
    from nvidia.dali import fn, pipeline_def, types

    jitter = setting.color_jitter

    @pipeline_def(batch_size=setting.batch_size, num_threads=max(setting.workers, 1), device_id=None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(file_root=folder, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=list(setting.scale)
        )
        images = fn.resize(
            images,
            size=[setting.size, setting.size],
            interp_type=types.INTERP_CUBIC if interpolation == "cubic" else types.INTERP_LINEAR,
            antialias=True,
        )
        if setting.on_device:
            return images
        if jitter:
            low, high = 1 - jitter, 1 + jitter
            images = fn.color_twist(
                images,
                brightness=fn.random.uniform(range=(low, high)),
                contrast=fn.random.uniform(range=(low, high)),
                saturation=fn.random.uniform(range=(low, high)),
            )
        return fn.crop_mirror_normalize(
            images, mean=MEAN.tolist(), std=STD.tolist(), mirror=fn.random.coin_flip(), output_layout="CHW"
        )

    built = pipeline()
    built.build()
    left = built.epoch_size("reader")

    def batches() -> Iterator[Tensor]:
        for start in range(0, left, setting.batch_size):
            (images,) = built.run()
            # Its last batch of an epoch is filled up from the next one: the figures count what a loader would.
            yield torch.from_numpy(images.as_array())[: left - start]

    return batches


class _Decoded:
    """FFCV's writer takes pictures and labels."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB"), 0


def installed() -> dict[str, str]:
    """The version of each peer; those that are not installed are left out of every table."""
    found = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    if find_spec("ffcv"):
        found["FFCV"] = version("ffcv")
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        from nvidia import dali

        found["DALI"] = dali.__version__
    return found
