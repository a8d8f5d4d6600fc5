"""The study's images: decoded once, 36 pixels, in memory; random crops of 32 pixels and flips in training."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pgt_hf.images import load_image_dataset

__all__ = ["CROP", "Images", "Split", "prepare", "read"]

SIDE, CROP = 36, 32
CLASSES = {"tiny-imagenet": 100, "fashion-mnist": 10}
HUB = {"tiny-imagenet": "zh-plus/tiny-imagenet", "fashion-mnist": "zalando-datasets/fashion_mnist"}
FASHION_TRAIN, FASHION_SELECT = 10_000, 2_000
TINY_TRAIN, TINY_SELECT = 200, 20  # images a class; the whole set has 500 and 50


@dataclass(frozen=True)
class Split:
    """Images of shape (N, 3, 36, 36), uint8, and labels (N)."""

    images: Tensor
    labels: Tensor

    def centre(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The middle 32 pixels of the images from ``start`` to ``stop``."""
        edge = (SIDE - CROP) // 2
        return self.images[start:stop, :, edge : edge + CROP, edge : edge + CROP]


class Images(Dataset):
    """A split for training: which crop and flip an image gets is a function of (seed, epoch, index)."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split = split
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        generator = np.random.default_rng((self.seed, epoch, 1))
        self._draws = generator.integers(0, [SIDE - CROP + 1, SIDE - CROP + 1, 2], (len(self), 3))

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        top, left, flip = self._draws[index]
        image = self.split.images[index, :, top : top + CROP, left : left + CROP]
        return {"pixel_values": image.flip(-1) if flip else image, "labels": self.split.labels[index]}


def read(data: str, folder: Path) -> dict[str, Split]:
    """What ``prepare`` wrote: splits "train", "select" (for the learning rate) and "test" (for the tables)."""
    arrays = np.load(folder / f"{data}.npz")
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: Split(tensors[f"{name}_x"], tensors[f"{name}_y"]) for name in ("train", "select", "test")}


def prepare(data: str, source: str | None, folder: Path) -> None:
    """Writes the three splits into ``folder``, once.

    Args:
        data: "tiny-imagenet" or "fashion-mnist".
        source: What ``load_image_dataset`` takes, or a folder with Fashion-MNIST's four ``*-ubyte.gz``; by default
            the Hub.
        folder: Where they go.
    """
    path = folder / f"{data}.npz"
    if path.is_file():
        return
    train, test = _idx(Path(source)) if source and list(Path(source).glob("*-ubyte.gz")) else _pictures(data, source)
    if data == "fashion-mnist":
        order = np.random.default_rng(0).permutation(len(train[1]))[: FASHION_TRAIN + FASHION_SELECT]
        train, select = _take(train, order[:FASHION_TRAIN]), _take(train, order[FASHION_TRAIN:])
    else:
        train, test = (_take(split, np.flatnonzero(split[1] < CLASSES[data])) for split in (train, test))
        train = _take(train, np.flatnonzero(_rank_in_class(train[1]) < TINY_TRAIN))
        rank = _rank_in_class(test[1])
        select, test = (_take(test, np.flatnonzero(chosen)) for chosen in (rank < TINY_SELECT, rank >= TINY_SELECT))
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}_{part}": array for name, split in (("train", train), ("select", select), ("test", test))
              for part, array in zip("xy", split, strict=True)}  # fmt: skip
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def _take(split: tuple[NDArray[Any], NDArray[Any]], index: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return split[0][index], split[1][index]


def _rank_in_class(labels: NDArray[Any]) -> NDArray[Any]:
    """How many images of its class come before each one."""
    rank = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return rank


def _pictures(data: str, source: str | None) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    splits = load_image_dataset(source or HUB[data])
    return [_decoded(splits[name], data) for name in ("train", "validation")]


def _decoded(split: Any, data: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fashion-MNIST gets a margin of zeros, photographs are resized."""
    images = np.zeros((len(split), 3, SIDE, SIDE), dtype=np.uint8)
    labels = np.array(split["label"], dtype=np.int64)
    for index, image in enumerate(split["image"]):
        image = image.convert("RGB")
        if data == "fashion-mnist":
            images[index, :, 4:-4, 4:-4] = np.asarray(image).transpose(2, 0, 1)
        else:
            images[index] = np.asarray(image.resize((SIDE, SIDE), resample=3)).transpose(2, 0, 1)  # bicubic
    return images, labels


def _idx(folder: Path) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    splits = []
    for name in ("train", "t10k"):
        pixels, labels = (
            np.frombuffer(gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
            for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
        )
        images = np.zeros((len(labels), 3, SIDE, SIDE), dtype=np.uint8)
        images[:, :, 4:-4, 4:-4] = pixels.reshape(-1, 1, 28, 28)
        splits.append((images, labels.astype(np.int64)))
    return splits
