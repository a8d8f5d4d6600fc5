"""Images to tensors: timm's augmentation and evaluation transforms, as a picklable callable for ``datasets``.

Mean, size, crop and interpolation come from the model's own config, so training, evaluation and the saved model's
``AutoImageProcessor`` agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

__all__ = ["ImageTransform", "collate", "to_rgb"]


class ImageTransform:
    """Turns the columns ``image`` and ``label`` of a batch into ``pixel_values`` and ``labels``.

    Args:
        config: The model's ``config.pretrained_cfg``: input size, mean, std, interpolation, crop.
        training: Augment: random resized crop, flip and colour jitter; else resize and crop the centre.
        **augmentation: For training, as ``timm.data.create_transform`` takes it: ``scale=(0.08, 1.0)``, ``hflip=0.5``,
            ``color_jitter=0.4``, ``auto_augment="rand-m9-mstd0.5"``, ``re_prob=0.25``.

    Example:
        >>> train = dataset["train"].with_transform(ImageTransform(model.config.pretrained_cfg, training=True))
        >>> train[0]["pixel_values"].shape
        torch.Size([3, 224, 224])
    """

    def __init__(self, config: Mapping[str, Any], training: bool, **augmentation: Any) -> None:
        options = resolve_data_config(pretrained_cfg=dict(config))
        self.transform = create_transform(**options, is_training=training, **(augmentation if training else {}))

    def __call__(self, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {
            "pixel_values": [self.transform(to_rgb(image)) for image in examples["image"]],
            "labels": list(examples["label"]),
        }


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with three 8-bit channels: grey, 16-bit grey, palette, CMYK and transparent ones occur in real sets.

    Example:
        >>> to_rgb(Image.new("CMYK", (8, 8))).mode
        'RGB'
    """
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks examples into ``pixel_values`` of shape (N, 3, H, W) and ``labels`` of shape (N).

    Example:
        >>> collate([train[0], train[1]])["labels"].shape
        torch.Size([2])
    """
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.long),
    }
