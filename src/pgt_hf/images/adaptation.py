"""Unsupervised domain adaptation: labelled images of a source domain, images without labels of a target domain.

The building blocks; ``AdaptationRun`` and ``recipes/domain_adaptation.py`` put them together. Whatever reads
probabilities (an entropy, a threshold) takes ``scale``: PGT trains ``softmax(alpha z)``, so alpha is the right one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..limits import NonNegative, Positive, Share, check_type, checked

_WIDTH = 128  # of the domain classifier
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class DomainAdversary(nn.Module):
    """A timm network with a second head that tells the domains apart, and features that learn to deceive it.

    "Domain-Adversarial Training of Neural Networks" (Ganin et al., arXiv 1505.07818).

    Example:
        >>> adversary = DomainAdversary(timm.create_model("resnet10t", num_classes=10))
        >>> logits, domains = adversary(torch.randn(4, 3, 32, 32), strength=0.5)
        >>> logits.shape, domains.shape
        (torch.Size([4, 10]), torch.Size([4]))
    """

    @checked
    def __init__(self, network: Any) -> None:
        super().__init__()
        check_type("network", network, nn.Module)
        if not hasattr(network, "get_classifier"):
            raise TypeError(f"network must be one of timm's, got a {type(network).__name__}")
        self.network = network
        features = network.get_classifier().in_features
        self.domain = nn.Sequential(nn.Linear(features, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))

    def forward(self, images: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """The logits of the classes, (N, C), and of the domain, (N): positive for the target."""
        features = self.network.forward_features(images)
        pooled = self.network.forward_head(features, pre_logits=True)
        return self.network.get_classifier()(pooled), self.domain(reverse_gradient(pooled, strength))[:, 0]


@checked
def reverse_gradient(features: Tensor, strength: NonNegative) -> Tensor:
    """The identity, whose gradient is multiplied by ``-strength``.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> reverse_gradient(x, 0.5).backward()
        >>> x.grad
        tensor([-0.5000])
    """
    return _Reverse.apply(features, strength)


@checked
def reversal_strength(progress: Share) -> float:
    """DANN's schedule: 0 at the start, near 1 from the middle on, for a ``progress`` from 0 to 1.

    Example:
        >>> reversal_strength(0.0), round(reversal_strength(0.5), 3)
        (0.0, 0.987)
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


@checked
def entropy(logits: Tensor, scale: Positive = 1.0) -> Tensor:
    """Mean entropy of ``softmax(scale * logits)``, in nats: what Tent minimises (Wang et al., arXiv 2006.10726).

    Example:
        >>> round(entropy(torch.zeros(2, 10)).item(), 3)
        2.303
    """
    log_probs = torch.log_softmax(scale * logits, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()


@checked
def confident_labels(logits: Tensor, threshold: Share, scale: Positive = 1.0) -> Tensor:
    """The best class where ``softmax(scale * logits)`` gives it at least ``threshold``, else -100.

    Raises:
        ValueError: ``threshold`` lies outside [0, 1].

    Example:
        >>> confident_labels(torch.tensor([[4.0, 0.0], [0.1, 0.0]]), threshold=0.9)
        tensor([   0, -100])
    """
    confidence, labels = torch.softmax(scale * logits.detach(), dim=-1).max(dim=-1)
    return torch.where(confidence >= threshold, labels, -100)


@checked
def train_norms_alone(network: nn.Module) -> list[nn.Parameter]:
    """Freezes all but the scales and shifts of the normalisation layers, and returns those.

    Raises:
        ValueError: The network has no such layers.

    Example:
        >>> len(train_norms_alone(timm.create_model("resnet10t")))
        28
    """
    network.requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    if not parameters:
        raise ValueError(f"network must have normalisation layers to adapt, got a {type(network).__name__} without")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad_output, None
