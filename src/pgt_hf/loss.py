"""``PowerGradCrossEntropyLoss``: ``torch.nn.CrossEntropyLoss`` with PGT's gradient, for a loop that names its loss."""

from typing import Annotated

from torch import Tensor, nn

from .functional import check_alpha, powergrad_cross_entropy
from .limits import OneOf, Share, checked

__all__ = ["PowerGradCrossEntropyLoss"]


class PowerGradCrossEntropyLoss(nn.Module):
    """Cross-entropy whose backward pass uses ``softmax(alpha z)`` (see ``powergrad_cross_entropy``).

    Args:
        alpha: ``0 <= alpha <= 1``; 1 is ``torch.nn.CrossEntropyLoss``.
        weight: A weight for each class, (C).
        ignore_index: A class index that contributes neither to the value nor to the gradient.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].

    Shape:
        As ``torch.nn.CrossEntropyLoss``: input (C), (N, C) or (N, C, d1, ...); target of class indices or
        probabilities.

    Example:
        >>> criterion = PowerGradCrossEntropyLoss(alpha=0.25, label_smoothing=0.1)
        >>> criterion(torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))).backward()
    """

    weight: Tensor | None

    @checked
    def __init__(
        self,
        alpha: float | Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Annotated[str, OneOf(("none", "mean", "sum"))] = "mean",
        label_smoothing: Share = 0.0,
    ) -> None:
        super().__init__()
        check_alpha(alpha)
        if weight is not None and not (weight.dim() == 1 and weight.is_floating_point() and (weight >= 0).all()):
            raise ValueError(f"weight must have shape (C,) and hold numbers of at least 0, got {weight}")
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return powergrad_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing, alpha=self.alpha
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )
