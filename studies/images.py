"""A data set in memory, decoded once, on any device; ``Images`` is a network trained and measured on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pgt_hf.analysis import compare_calibration, filter_norms, logit_statistics, zeroed_filters
from pgt_hf.atomic import replacing
from pgt_hf.heads import last_linear
from pgt_hf.images import create_model, load_image_dataset, normalize

from .settings import Scale, Setting
from .train import in_bfloat16

__all__ = ["Images", "Split", "prepare", "read"]

HUB = {"tiny-imagenet": "zh-plus/tiny-imagenet", "fashion-mnist": "zalando-datasets/fashion_mnist"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_NORM = 0.1  # a tenth of a fresh filter's norm: on its way to zero
TRAIN_PROBE = 2_000  # training images, without augmentation, that the training accuracy is measured on


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
    splits = load_image_dataset(source or HUB[scale.data])
    (pixels, labels), test = (_decoded(splits[name], scale) for name in ("train", "validation"))
    rank = np.zeros(len(labels), dtype=int)  # how many images of its class come before each one
    for label in range(scale.classes):
        rank[labels == label] = np.arange((labels == label).sum())
    if scale.images + scale.select > rank.max() + 1:
        raise ValueError(f"images must leave {scale.select} of {rank.max() + 1} for the search, got {scale.images}")
    kept = np.round(scale.images * scale.imbalance ** (-labels / (scale.classes - 1)))
    chosen = {"train": rank < kept, "select": (rank >= scale.images) & (rank < scale.images + scale.select)}
    arrays = {"test_x": test[0], "test_y": test[1]}
    for name, mask in chosen.items():
        arrays |= {f"{name}_x": pixels[mask], f"{name}_y": labels[mask]}
    arrays["train_y"] = _mislabelled(arrays["train_y"], scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _decoded(split: Any, scale: Scale) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = np.array(split["label"], dtype=np.int64) - scale.first
    wanted = np.flatnonzero((labels >= 0) & (labels < scale.classes))
    images = np.zeros((len(wanted), scale.side, scale.side, 3), dtype=np.uint8)
    for place, index in enumerate(wanted):
        image = split[int(index)]["image"].convert("RGB")
        images[place] = np.asarray(image.resize((scale.side, scale.side), resample=3))  # bicubic
    return images, labels[wanted]


def _mislabelled(labels: NDArray[Any], scale: Scale) -> NDArray[Any]:
    """The labels with the scale's share of them moved to another class."""
    draws = np.random.default_rng(0)
    wrong = draws.permutation(len(labels))[: round(scale.noise * len(labels))]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + draws.integers(1, scale.classes, len(wrong))) % scale.classes
    return labels


@dataclass(frozen=True)
class Images:
    """The task of a scale of images.

    Args:
        scale: The scale.
        splits: As ``read`` gives them.
        given: The weights of the trained network that the scale names as its start or teacher.
    """

    scale: Scale
    splits: dict[str, Split]
    given: dict[str, Tensor] | None = None

    @property
    def device(self) -> str:
        return self.splits["train"].images.device.type

    def create(self, setting: Setting) -> nn.Module:
        """A ResNet; from the given weights, but for the head, where the scale has a start."""
        model = self._network(setting.network == "norm-free")
        if self.scale.start and self.given:
            (head,) = last_linear(model)
            name = next(name for name, module in model.named_modules() if module is head)
            backbone = {key: value for key, value in self.given.items() if not key.startswith(f"{name}.")}
            model.load_state_dict(model.state_dict() | backbone)
        return model

    def _network(self, norm_free: bool = False) -> nn.Module:
        names = [str(label) for label in range(int(self.splits["train"].labels.max()) + 1)]
        model = create_model(self.scale.network, names, image_size=self.scale.crop, norm_free=norm_free)
        return model.to(memory_format=torch.channels_last)

    def epoch_steps(self, setting: Setting) -> int:
        """Whole batches."""
        return len(self.splits["train"]) // setting.batch

    def losses(self, model: nn.Module, setting: Setting, seed: int, epoch: int) -> Iterator[Tensor]:
        """Cross-entropy on random crops, with the labels or with the mean of the labels and a teacher's shares."""
        images, crop = self.splits["train"], self.scale.crop
        teacher = self._teacher if self.scale.teacher else None
        for index, draws in images.batches(setting.batch, crop, seed, epoch):
            pixels = normalize(images.crops(index, draws, crop), MEAN, STD)
            logits = self._logits(model, pixels)
            target = images.labels[index]
            if teacher is not None:
                with torch.no_grad():
                    shares = self._logits(teacher, pixels).softmax(dim=1)
                target = (shares + nn.functional.one_hot(target, shares.size(1))) / 2
            yield nn.functional.cross_entropy(logits, target, label_smoothing=setting.label_smoothing)

    @cached_property
    def _teacher(self) -> nn.Module:
        assert self.given is not None
        teacher = self._network()
        teacher.load_state_dict(self.given)
        return teacher.to(self.device).eval()

    def _logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=in_bfloat16(self.device)):
            logits: Tensor = model(pixels).logits
        return logits.float()

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, split: Split) -> Tensor:
        logits = []
        for start in range(0, len(split), 500):
            pixels = normalize(split.centre(slice(start, start + 500), self.scale.crop), MEAN, STD)
            logits.append(self._logits(model, pixels.contiguous(memory_format=torch.channels_last)))
        return torch.cat(logits)

    def score(self, model: nn.Module, setting: Setting) -> float:
        """Top-1 on the images of the search."""
        split = self.splits["select"]
        return (self._evaluate(model, split).argmax(dim=1) == split.labels).double().mean().item()

    @torch.no_grad()
    def measure(self, model: nn.Module, head: nn.Module, setting: Setting) -> dict[str, Any]:
        """Accuracy on all splits; the rest on the test images."""
        found: dict[str, Any] = {}
        train = self.splits["train"]
        every = len(train) // TRAIN_PROBE or 1
        probe = Split(train.images[::every], train.labels[::every])
        norms: list[Tensor] = []
        for name, split in (("train", probe), ("select", self.splits["select"]), ("test", self.splits["test"])):
            norms.clear()
            hook = head.register_forward_pre_hook(lambda module, args: norms.append(args[0].float().norm(dim=1)))
            logits = self._evaluate(model, split)
            hook.remove()
            hits = logits.topk(5).indices == split.labels[:, None]
            found[f"{name}_top1"] = hits[:, 0].double().mean().item()
            found[f"{name}_loss"] = nn.functional.cross_entropy(logits, split.labels).item()
        found |= {"test_top5": hits.any(dim=1).double().mean().item(), "feature_norm": torch.cat(norms).mean().item()}
        found |= {key: value.item() for key, value in logit_statistics(logits).items()}
        if logits.isfinite().all():
            factor = setting.alpha if setting.method == "pgt" else 1.0
            for kind, scores in compare_calibration(logits.cpu(), self.splits["test"].labels.cpu(), factor).items():
                found |= {f"{kind}_nll": scores.nll, f"{kind}_ece": scores.ece}
        layers = dict(model.named_modules())
        filters = torch.cat([norm for name, norm in filter_norms(model).items() if layers[name] is not head])
        of_head = {id(parameter) for parameter in head.parameters()}
        backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_head]
        return found | {
            "filters": len(filters),
            "zeroed_filters": zeroed_filters([filters]).item(),
            "small_filters": zeroed_filters([filters], SMALL_NORM).item(),
            "smallest_filter": filters.min().item(),
            "head_norm": head.weight.norm().item(),
            "checksum": sum(parameter.double().abs().sum().item() for parameter in backbone),
        }
