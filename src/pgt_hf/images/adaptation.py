"""Unsupervised domain adaptation: labelled images of a source domain, images without labels of a target domain.

``AdaptationRun`` trains on the source and adapts to the target, with Accelerate. What reads probabilities (an entropy,
a threshold) takes those of ``alpha * logits``: PGT trains ``softmax(alpha z)``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from ..data.workers import worker_options
from ..functional import IGNORED, powergrad_cross_entropy
from ..limits import DataSet, near
from .corruptions import CORRUPTIONS
from .dataset import ImageDataset
from .sources import DIGITS
from .transforms import collate

METHODS = ("source-only", "bn", "tent", "pseudo-labels", "dann")
_Batch = tuple[Tensor, Tensor]  # images and labels
_WIDTH = 128  # of the domain classifier
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class _Target(DataSet):
    """A corruption with its level, or another data set."""

    def check(self, name: str, value: str) -> None:
        """Raises ValueError unless it is one of these."""
        kind, _, level = value.partition(":")
        if kind in CORRUPTIONS and level in set("12345"):
            return
        if kind in CORRUPTIONS or near(kind, CORRUPTIONS):
            raise ValueError(
                f"{name} must be one of {', '.join(CORRUPTIONS)} with a level from 1 to 5, or a data set, "
                f"got {value!r}{near(kind, CORRUPTIONS)}"
            )
        super().check(name, value)


TargetName = Annotated[str, _Target((DIGITS,))]


class AdaptationRun:
    """Training on the source, and adapting from it, at one seed and one alpha.

    Args:
        accelerator: The program's.
        settings: Has the numbers as attributes: ``epochs``, ``lr``, ``adapt_epochs``, ``adapt_lr``, ``weight_decay``,
            ``threshold`` (of pseudo-labels), ``adversary`` (largest strength of DANN's gradient), ``batch``,
            ``num_workers``.
        alpha: PGT's exponent.
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
        """Trains on the source alone."""

        def loss(model: nn.Module, source: _Batch, progress: float) -> Tensor:
            return self._cross_entropy(model(source[0]), source[1])

        return self._fit(network, loss, self.settings.epochs, self.settings.lr, [self.source["train"]])

    def adapt(
        self, method: str, network: nn.Module, target: dict[str, ImageDataset], fresh: Callable[[], nn.Module]
    ) -> nn.Module:
        """Adapts ``network``, which was trained on the source; "dann" trains a ``fresh`` one."""
        both = [self.source["train"], target["train"]]
        later = self.settings.adapt_epochs, self.settings.adapt_lr
        if method == "bn":
            self._take_statistics(network, target["train"])
        if method == "tent":
            train_norms_alone(network)
            network = self._fit(network, self._tent, *later, [target["train"]])
            self._take_statistics(network, target["train"])
        if method == "pseudo-labels":
            network = self._fit(network, self._pseudo_labels, *later, both)
        if method == "dann":
            adversary = DomainAdversary(fresh())
            network = self._fit(adversary, self._adversarial, self.settings.epochs, self.settings.lr, both).network
        return network

    @torch.no_grad()
    def accuracy(self, network: nn.Module, images: ImageDataset) -> float:
        """The share of the images that ``network`` gets right, over all processes."""
        network.eval()
        right = total = 0
        for batch in self._loader(images, shuffle=False):
            best = network(batch["pixel_values"]).argmax(dim=1)
            best, labels = self.accelerator.gather_for_metrics((best, batch["labels"]))
            right, total = right + int((best == labels).sum()), total + int((labels != IGNORED).sum())
        return right / total

    # --- the losses, of a batch from each data set

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return powergrad_cross_entropy(logits, labels, alpha=self.alpha)

    def _tent(self, model: nn.Module, target: _Batch, progress: float) -> Tensor:
        return entropy(self.alpha * model(target[0]))

    def _pseudo_labels(self, model: nn.Module, source: _Batch, target: _Batch, progress: float) -> Tensor:
        logits = model(torch.cat([source[0], target[0]]))  # one pass: batch norm sees both domains
        ours, theirs = logits.split([len(source[0]), len(target[0])])
        labels = confident_labels(self.alpha * theirs, self.settings.threshold)
        sure = powergrad_cross_entropy(theirs, labels, reduction="sum", alpha=self.alpha) / len(labels)
        return self._cross_entropy(ours, source[1]) + sure

    def _adversarial(self, model: nn.Module, source: _Batch, target: _Batch, progress: float) -> Tensor:
        logits, domains = model(torch.cat([source[0], target[0]]), self.settings.adversary * dann_schedule(progress))
        truth = torch.zeros_like(domains)
        truth[len(source[0]) :] = 1
        told_apart = nn.functional.binary_cross_entropy_with_logits(domains, truth)
        return self._cross_entropy(logits[: len(source[0])], source[1]) + told_apart

    # --- the loop

    def _fit(self, network: Any, loss: Callable[..., Tensor], epochs: int, lr: float, data: list[ImageDataset]) -> Any:
        """SGD with Nesterov momentum, one cycle of the learning rate; an epoch is a pass over the first data set."""
        if epochs == 0:
            return network.to(self.accelerator.device)
        loaders = [self._loader(images, shuffle=True) for images in data]
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
        self._average_statistics(trained)
        return trained

    def _take_statistics(self, network: nn.Module, images: ImageDataset) -> None:
        loader = self._loader(images, shuffle=True)  # in order, a batch could be of one class
        network.requires_grad_(False)
        with torch.no_grad():
            update_bn((batch["pixel_values"] for batch in loader), network)
        self._average_statistics(network)

    def _average_statistics(self, network: nn.Module) -> None:
        """Each process has batch norm statistics of its own part of the images."""
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _loader(self, images: ImageDataset, shuffle: bool) -> Any:
        options = worker_options(self.settings.num_workers) | {"collate_fn": _readable if shuffle else collate}
        loader: DataLoader[Any] = DataLoader(
            images, self.settings.batch, shuffle=shuffle, drop_last=shuffle, **options
        )
        return self.accelerator.prepare(loader)


class DomainAdversary(nn.Module):
    """A timm network with a second head that tells the domains apart, and features that learn to deceive it.

    "Domain-Adversarial Training of Neural Networks" (Ganin et al., arXiv 1505.07818).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        features = network.get_classifier().in_features
        self.domain = nn.Sequential(nn.Linear(features, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))

    def forward(self, images: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """The logits of the classes, (N, C), and of the domain, (N): positive for the target."""
        features = self.network.forward_features(images)
        pooled = self.network.forward_head(features, pre_logits=True)
        return self.network.get_classifier()(pooled), self.domain(reverse_gradient(pooled, strength))[:, 0]


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """The identity, whose gradient is multiplied by ``-strength``."""
    return features.detach() + strength * (features.detach() - features)


def dann_schedule(progress: float) -> float:
    """DANN's strength of the reversed gradient: 0 at the start, near 1 from the middle on."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of ``softmax(logits)``, in nats: what Tent minimises (Wang et al., arXiv 2006.10726)."""
    log_probs = torch.log_softmax(logits, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()


def confident_labels(logits: Tensor, threshold: float) -> Tensor:
    """The best class where ``softmax(logits)`` gives it at least ``threshold``, else ``IGNORED``."""
    confidence, labels = torch.softmax(logits.detach(), dim=-1).max(dim=-1)
    return torch.where(confidence >= threshold, labels, IGNORED)


def check_methods(methods: Iterable[str], network: nn.Module) -> None:
    """Raises ValueError for a method that would change nothing in a network with other layers."""
    layers = {"bn": (nn.modules.batchnorm._BatchNorm,), "tent": _NORMS}
    for method, kinds in layers.items():
        if method in methods and not any(isinstance(module, kinds) for module in network.modules()):
            raise ValueError(
                f"methods must leave out {method!r} for a {type(network).__name__}, which has no layers to adapt, "
                f"got {method!r}"
            )


def train_norms_alone(network: nn.Module) -> None:
    """Freezes all but the scales and shifts of the normalisation layers."""
    network.requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    if not any(True for norm in norms for _ in norm.parameters()):
        raise ValueError(f"network must have normalisation layers to adapt, got a {type(network).__name__} without")
    for norm in norms:
        norm.requires_grad_(True)


def _endless(loader: Any) -> Iterator[_Batch]:
    while True:
        for batch in loader:
            yield batch["pixel_values"], batch["labels"]


def _readable(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch without the black images in place of bad ones: half of the losses read no labels."""
    batch = collate(examples)
    read = batch["labels"] != IGNORED
    return {name: batch[name][read] for name in ("pixel_values", "labels")}
