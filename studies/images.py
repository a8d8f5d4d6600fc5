"""Tiny-ImageNet in memory, decoded once; random crops and flips, a batch at a time, on any device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgt_hf.atomic import replacing
from pgt_hf.images import load_image_dataset

from .settings import Scale

__all__ = ["Split", "prepare", "read"]

HUB = "zh-plus/tiny-imagenet"
SELECT = 40  # images of a class for the search: the training images after those that are trained on


@dataclass(frozen=True)
class Split:
    """Images of shape (N, side, side, 3), uint8, and labels (N), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def centre(self, index: slice, crop: int) -> Tensor:
        """The middle of some images, shape (n, 3, crop, crop)."""
        edge = (self.images.size(1) - crop) // 2
        return self.images[index, edge : edge + crop, edge : edge + crop].permute(0, 3, 1, 2)

    def batches(self, size: int, crop: int, seed: int, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """An epoch of (indices, draws): the order of the images, and how each is cropped and flipped."""
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(self))
        places = self.images.size(1) - crop + 1
        draws = generator.integers(0, [places, places, 2], (len(self), 3))
        indices, draws = (torch.from_numpy(array).to(self.images.device) for array in (order, draws))
        whole = len(self) // size * size
        return list(zip(indices[:whole].split(size), draws[:whole].split(size), strict=True))

    def crops(self, index: Tensor, draws: Tensor, crop: int) -> Tensor:
        """Random crops, half of them flipped, of shape (n, 3, crop, crop) and channels last."""
        top, left, flip = draws[:, :, None].unbind(1)
        along = torch.arange(crop, device=index.device)
        rows, columns = top + along, left + torch.where(flip > 0, along.flip(0), along)
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def read(path: Path, device: str = "cpu") -> dict[str, Split]:
    """What ``prepare`` wrote: splits "train", "select" (for the search) and "test" (for the tables)."""
    with np.load(path) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: Split(tensors[f"{name}_x"], tensors[f"{name}_y"]).to(device) for name in ("train", "select", "test")}


def prepare(scale: Scale, source: str | None, path: Path) -> None:
    """Writes the three splits of a scale into one file, unless it is there; all that a training needs.

    Args:
        scale: Its classes, images and their size.
        source: What ``load_image_dataset`` takes; by default the Hub.
        path: The file.
    """
    if path.is_file():
        return
    splits = load_image_dataset(source or HUB)
    train, test = (_decoded(splits[name], scale) for name in ("train", "validation"))
    rank = np.zeros(len(train[1]), dtype=int)  # how many images of its class come before each one
    for label in range(scale.classes):
        rank[train[1] == label] = np.arange((train[1] == label).sum())
    if scale.images + SELECT > rank.max() + 1:
        raise ValueError(f"images must leave {SELECT} of {rank.max() + 1} for the search, got {scale.images}")
    chosen = {"train": rank < scale.images, "select": (rank >= scale.images) & (rank < scale.images + SELECT)}
    arrays = {"test_x": test[0], "test_y": test[1]}
    for name, mask in chosen.items():
        arrays |= {f"{name}_x": train[0][mask], f"{name}_y": train[1][mask]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _decoded(split: Any, scale: Scale) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = np.array(split["label"], dtype=np.int64)
    wanted = np.flatnonzero(labels < scale.classes)
    images = np.zeros((len(wanted), scale.side, scale.side, 3), dtype=np.uint8)
    for place, index in enumerate(wanted):
        image = split[int(index)]["image"].convert("RGB")
        images[place] = np.asarray(image.resize((scale.side, scale.side), resample=3))  # bicubic
    return images, labels[wanted]
