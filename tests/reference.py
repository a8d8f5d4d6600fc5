"""The formula of the paper, written out as plainly as can be: what every test compares with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def target_distribution(target: Tensor, classes: int, label_smoothing: float = 0.0) -> Tensor:
    """q with the classes last; class indices of -100 give zeros."""
    one_hot = F.one_hot(target.clamp(min=0), classes).double()
    q = one_hot * (1 - label_smoothing) + label_smoothing / classes
    return q * (target >= 0).unsqueeze(-1)


def powergrad_gradient(logits: Tensor, target: Tensor, alpha: float, label_smoothing: float = 0.0) -> Tensor:
    """Mean-reduced ``(softmax(alpha z) - q) / N`` in float64, classes last; target of indices or probabilities."""
    logits = logits.detach().double()
    if target.is_floating_point():
        return (torch.softmax(alpha * logits, -1) - target.double()) / logits[..., 0].numel()
    valid = target >= 0
    q = target_distribution(target, logits.size(-1), label_smoothing)
    return (torch.softmax(alpha * logits, -1) * valid.unsqueeze(-1) - q) / valid.sum()
