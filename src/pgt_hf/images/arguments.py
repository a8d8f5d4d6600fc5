"""A program's flags for its images, with the data sets that they describe, and for what is fine-tuned on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from ..limits import Count, ExistingPath, Needs, Number, OneOf, Positive, Share, Text, Whole, check_fields
from .dataset import ImageDataset
from .rules import AutoAugment, Crop, DataSetName, OnBadImage, Side, TimmName
from .sources import load_image_dataset
from .transforms import ImageTransform

# What is trained, and the learning rate (AdamW) where none is given.
MODES = {"linear": 1e-3, "full": 1e-4, "layer-decay": 5e-4, "lora": 1e-3}


@dataclass
class ImageSourceArguments:
    """Flags for where a program's images come from.

    Example:
        >>> ImageSourceArguments("digits").load()["validation"].num_rows
        360
    """

    dataset_name: DataSetName | None = field(
        default=None, metadata={"help": "Hub id, folder of images, CSV or Parquet (file or folder), or 'digits'."}
    )
    dataset_config: Annotated[str | None, Text()] = field(
        default=None, metadata={"help": "The Hub data set's configuration, if any."}
    )
    image_column: Annotated[str | None, Text()] = field(
        default=None, metadata={"help": "Column of the images, if it is not detected."}
    )
    label_column: Annotated[str | None, Text()] = field(
        default=None, metadata={"help": "Column of the labels, if it is not detected."}
    )
    allow_outside_files: bool = field(
        default=False, metadata={"help": "Let a CSV or other table name images outside its folder."}
    )
    on_bad_image: OnBadImage = field(
        default="error", metadata={"help": "What to do with an unreadable image: 'error', or 'skip' and count it."}
    )

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))

    def load(self, seed: int = 0, **more: Any) -> Any:
        """The splits ``train`` and ``validation``, undecoded; ``more`` are options of ``load_image_dataset``."""
        if self.dataset_name is None:
            raise ValueError("--dataset-name must be given: a Hub id, a folder of images, a CSV or Parquet, or digits")
        return load_image_dataset(
            self.dataset_name,
            self.dataset_config,
            image_column=self.image_column,
            label_column=self.label_column,
            allow_outside_files=self.allow_outside_files,
            seed=seed,
            **more,
        )


@dataclass
class ImageDataArguments(ImageSourceArguments):
    """Flags for a program's images: where they come from, how many are used, how they are augmented.

    Example:
        >>> data = ImageDataArguments("digits", hflip=0.0)
        >>> train, validation = data.datasets(data.load(), {"input_size": (3, 32, 32)})
    """

    max_train_samples: Count | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: Count | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    image_size: Side | None = field(default=None, metadata={"help": "Side of the training images in pixels."})
    min_crop: Crop = field(default=0.08, metadata={"help": "Smallest random crop, as a share of the image's area."})
    hflip: Share = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: Annotated[float, Number("[0, 10]")] = field(
        default=0.4, metadata={"help": "Strength of the colour jitter in training."}
    )
    auto_augment: Annotated[str | None, AutoAugment()] = field(
        default=None, metadata={"help": "timm's RandAugment, such as rand-m9-mstd0.5-inc1."}
    )

    def load(self, seed: int = 0, **more: Any) -> Any:
        """The same, of at most so many images as the flags say."""
        return super().load(
            seed, max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples, **more
        )

    def augmentation(
        self, preprocessing: Mapping[str, Any], *, normalize: bool = False, on_device: bool = False
    ) -> ImageTransform:
        """The training transform; its images are uint8, which ``ImageTrainer`` normalises on the device.

        Let ``normalize`` be True for any other trainer, and ``on_device`` where the device is a GPU: flips and colour
        jitter then cost the CPU nothing.
        """
        size = {} if self.image_size is None else {"input_size": (3, self.image_size, self.image_size)}
        return ImageTransform(
            dict(preprocessing) | size,
            training=True,
            normalize=normalize,
            on_device=on_device,
            scale=(self.min_crop, 1.0),
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
        )

    def datasets(
        self,
        splits: Any,
        preprocessing: Mapping[str, Any],
        seed: int = 0,
        *,
        normalize: bool = False,
        on_device: bool = False,
    ) -> tuple[ImageDataset, ImageDataset]:
        """Training and evaluation images for a network with this preprocessing (``config.pretrained_cfg``)."""
        transform = self.augmentation(preprocessing, normalize=normalize, on_device=on_device)
        train = ImageDataset(splits["train"], transform, seed=seed, on_bad_image=self.on_bad_image)
        return train, self.evaluation(splits, ImageTransform(preprocessing, training=False, normalize=normalize))

    def evaluation(self, splits: Any, transform: Callable[[Any], Tensor]) -> ImageDataset:
        """The evaluation images."""
        return ImageDataset(splits["validation"], transform, on_bad_image=self.on_bad_image)


_LORA = Needs("mode", ("lora",))


@dataclass
class FinetuningArguments:
    """Flags for what is fine-tuned, and how.

    Example:
        >>> FinetuningArguments("resnet18", mode="lora", lora_rank=4).lora_scale
        2.0
    """

    model_name: Annotated[str, TimmName(folder=True, hub=True)] = field(
        default="resnet50.a1_in1k", metadata={"help": "timm name, Hub id, or a model's folder."}
    )
    weights: Annotated[str | None, ExistingPath("file"), Needs("pretrained")] = field(
        default=None, metadata={"help": "Local file of the model's pretrained weights."}
    )
    pretrained: bool = field(default=True, metadata={"help": "Begin with trained weights; else timm's random ones."})
    mode: Annotated[str, OneOf(MODES)] = field(
        default="full", metadata={"help": f"What is trained: {', '.join(MODES)}."}
    )
    layer_decay: Annotated[float, Number("(0, 1]"), Needs("mode", ("layer-decay",))] = field(
        default=0.75, metadata={"help": "Learning rate of a layer / that of the one above it."}
    )
    head_lr_scale: Positive = field(default=1.0, metadata={"help": "Learning rate of the new head, as a multiple."})
    lora_rank: Annotated[int, Whole("[1, 1024]"), _LORA] = field(
        default=8, metadata={"help": "Rank of LoRA's updates."}
    )
    lora_scale: Annotated[Positive, _LORA] = field(
        default=2.0, metadata={"help": "What LoRA's updates are multiplied by."}
    )
    lora_dropout: Annotated[float, Number("[0, 1)"), _LORA] = field(
        default=0.0, metadata={"help": "Dropout on the input of LoRA's updates."}
    )
    class_weights: Annotated[str | None, OneOf(("balanced",))] = field(
        default=None, metadata={"help": "'balanced': all classes count the same."}
    )
    patience: Count | None = field(
        default=None, metadata={"help": "Stop after so many epochs without a better top-1."}
    )
    fold: bool = field(default=False, metadata={"help": "Multiply the saved head by alpha."})

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))
