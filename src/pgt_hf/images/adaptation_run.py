"""Training on a source domain and adapting to a target, with Accelerate."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from ..data.workers import worker_options
from ..functional import IGNORED, powergrad_cross_entropy
from .adaptation import DomainAdversary, confident_labels, entropy, reversal_strength, train_norms_alone
from .dataset import ImageDataset
from .transforms import collate

METHODS = ("source-only", "bn", "tent", "pseudo-labels", "dann")


class AdaptationRun:
    """Training on the source, and adapting from it, at one seed and one alpha.

    Args:
        accelerator: The program's.
        settings: Has the numbers as attributes: ``epochs``, ``lr``, ``adapt_epochs``, ``adapt_lr``, ``weight_decay``,
            ``threshold`` (of pseudo-labels), ``adversary`` (largest strength of DANN's gradient), ``batch``,
            ``num_workers``.
        alpha: PGT's exponent, in the cross-entropy of the source and in what reads probabilities.
        source: ``train`` and ``validation``.

    Example:
        >>> run = AdaptationRun(Accelerator(), settings, alpha=0.25, source=source)
        >>> network = run.train(timm.create_model("resnet10t", num_classes=10))
        >>> adapted = run.adapt("bn", network, target, lambda: timm.create_model("resnet10t", num_classes=10))
        >>> run.accuracy(adapted, target["validation"])
    """

    def __init__(self, accelerator: Accelerator, settings: Any, alpha: float, source: dict[str, ImageDataset]):
        self.accelerator, self.settings, self.alpha, self.source = accelerator, settings, alpha, source

    def train(self, network: nn.Module) -> nn.Module:
        """On the source alone."""

        def loss(model: nn.Module, source: tuple[Tensor, Tensor], progress: float) -> Tensor:
            return self.cross_entropy(model(source[0]), source[1])

        return self.fit(network, loss, self.settings.epochs, self.settings.lr, [self.source["train"]])

    def adapt(
        self, method: str, network: nn.Module, target: dict[str, ImageDataset], fresh: Callable[[], nn.Module]
    ) -> nn.Module:
        """Adapts ``network``, which was trained on the source; "dann" trains a fresh one."""
        both = [self.source["train"], target["train"]]
        later = self.settings.adapt_epochs, self.settings.adapt_lr
        if method == "bn":
            self.take_statistics(network, target["train"])
        if method == "tent":
            train_norms_alone(network)
            network = self.fit(network, self.tent, *later, [target["train"]])
            self.take_statistics(network, target["train"])
        if method == "pseudo-labels":
            network = self.fit(network, self.pseudo_labels, *later, both)
        if method == "dann":
            adversary = DomainAdversary(fresh())
            network = self.fit(adversary, self.adversarial, self.settings.epochs, self.settings.lr, both).network
        return network

    # --- the losses

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return powergrad_cross_entropy(logits, labels, alpha=self.alpha)

    def tent(self, model: nn.Module, target: tuple[Tensor, Tensor], progress: float) -> Tensor:
        return entropy(model(target[0]), scale=self.alpha)

    def pseudo_labels(
        self, model: nn.Module, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], progress: float
    ) -> Tensor:
        logits = model(torch.cat([source[0], target[0]]))  # one pass: batch norm sees both domains
        ours, theirs = logits.split([len(source[0]), len(target[0])])
        labels = confident_labels(theirs, self.settings.threshold, scale=self.alpha)
        sure = powergrad_cross_entropy(theirs, labels, reduction="sum", alpha=self.alpha) / len(labels)
        return self.cross_entropy(ours, source[1]) + sure

    def adversarial(
        self, model: nn.Module, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], progress: float
    ) -> Tensor:
        strength = self.settings.adversary * reversal_strength(progress)
        logits, domains = model(torch.cat([source[0], target[0]]), strength)
        truth = torch.zeros_like(domains)
        truth[len(source[0]) :] = 1
        told_apart = nn.functional.binary_cross_entropy_with_logits(domains, truth)
        return self.cross_entropy(logits[: len(source[0])], source[1]) + told_apart

    # --- the loop

    def fit(self, network: Any, loss: Callable[..., Tensor], epochs: int, lr: float, data: list[ImageDataset]) -> Any:
        """SGD with Nesterov momentum and one cycle of the learning rate; an epoch is one of the first data set."""
        if epochs == 0:
            return network.to(self.accelerator.device)
        loaders = [self.loader(images, shuffle=True) for images in data]
        options = {"momentum": 0.9, "weight_decay": self.settings.weight_decay}
        optimizer = create_optimizer_v2(network, "sgd", lr=lr, **options)
        model, optimizer = self.accelerator.prepare(network, optimizer)
        steps = epochs * len(loaders[0])
        schedule = OneCycleLR(optimizer, lr, total_steps=steps + 1, cycle_momentum=False)
        model.train()
        batches = zip(*(_endless(loader) for loader in loaders), strict=True)
        for step in range(steps):
            for images in data:
                images.set_epoch(step // len(loaders[0]))
            value = loss(model, *next(batches), step / steps)
            self.accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        trained = self.accelerator.unwrap_model(model)
        self.accelerator.free_memory()
        self.average_statistics(trained)
        return trained

    def take_statistics(self, network: nn.Module, images: ImageDataset) -> None:
        loader = self.loader(images, shuffle=True)  # in order, a batch could be of one class
        network.requires_grad_(False)
        with torch.no_grad():
            update_bn((_readable(batch)[0] for batch in loader), network)
        self.average_statistics(network)

    def average_statistics(self, network: nn.Module) -> None:
        """Each process has batch norm statistics of its own part of the images."""
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    @torch.no_grad()
    def accuracy(self, network: nn.Module, images: ImageDataset) -> float:
        network.eval()
        right = total = 0
        for batch in self.loader(images, shuffle=False):
            best = network(batch["pixel_values"]).argmax(dim=1)
            best, labels = self.accelerator.gather_for_metrics((best, batch["labels"]))
            right, total = right + int((best == labels).sum()), total + int((labels != IGNORED).sum())
        return right / total

    def loader(self, images: ImageDataset, shuffle: bool) -> Any:
        workers = worker_options(self.settings.num_workers)
        loader: DataLoader[Any] = DataLoader(
            images, self.settings.batch, shuffle=shuffle, drop_last=shuffle, collate_fn=collate, **workers
        )
        return self.accelerator.prepare(loader)


def _endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for batch in loader:
            yield _readable(batch)


def _readable(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Images and labels without the black ones that stand for bad images: half of the losses read no labels."""
    read = batch["labels"] != IGNORED
    return batch["pixel_values"][read], batch["labels"][read]
