"""``ImageDataArguments``: a program's flags for its images, and the data sets that they describe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .dataset import ImageDataset
from .sources import load_image_dataset
from .transforms import ImageTransform


@dataclass
class ImageDataArguments:
    """Flags for a program's images: where they come from, how many are used, how they are augmented.

    Example:
        >>> data = ImageDataArguments("digits", hflip=0.0)
        >>> train, validation = data.datasets(data.load(), {"input_size": (3, 32, 32)})
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder of images, CSV or Parquet (file or folder), or 'digits'."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration, if any."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if it is not detected."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it is not detected."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    on_bad_image: str = field(
        default="error", metadata={"help": "What to do with an unreadable image: 'error', or 'skip' and count it."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the training images in pixels."})
    min_crop: float = field(default=0.08, metadata={"help": "Smallest random crop, as a share of the image's area."})
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: float = field(default=0.4, metadata={"help": "Strength of the colour jitter in training."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's RandAugment, such as rand-m9-mstd0.5-inc1."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    def load(self, seed: int = 0, *, streaming: bool = False) -> Any:
        """The splits ``train`` and ``validation``, undecoded, as ``load_image_dataset`` gives them."""
        if self.dataset_name is None:
            raise ValueError("--dataset-name must be given: a Hub id, a folder of images, a CSV or Parquet, or digits")
        return load_image_dataset(
            self.dataset_name,
            self.dataset_config,
            image_column=self.image_column,
            label_column=self.label_column,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            seed=seed,
            streaming=streaming,
        )

    def augmentation(self, preprocessing: Mapping[str, Any], *, on_device: bool = False) -> ImageTransform:
        """The training transform; its images are uint8, which the trainer normalises on the device.

        Let ``on_device`` be True where that is a GPU: flips and colour jitter then cost the CPU nothing.
        """
        size = {} if self.image_size is None else {"input_size": (3, self.image_size, self.image_size)}
        return ImageTransform(
            dict(preprocessing) | size,
            training=True,
            normalize=False,
            on_device=on_device,
            scale=(self.min_crop, 1.0),
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
        )

    def datasets(
        self, splits: Any, preprocessing: Mapping[str, Any], seed: int = 0, *, on_device: bool = False
    ) -> tuple[ImageDataset, ImageDataset]:
        """Training and evaluation images for a network with this preprocessing (``config.pretrained_cfg``)."""
        transform = self.augmentation(preprocessing, on_device=on_device)
        train = ImageDataset(splits["train"], transform, seed=seed, on_bad_image=self.on_bad_image)
        return train, self.evaluation(splits, ImageTransform(preprocessing, training=False, normalize=False))

    def evaluation(self, splits: Any, transform: Callable[[Any], Tensor]) -> ImageDataset:
        """The evaluation images."""
        return ImageDataset(splits["validation"], transform, on_bad_image=self.on_bad_image)
