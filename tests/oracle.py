"""PGT's gradient for any program, found by no code of the package: what the tests of whole programs compare with."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Oracle(TorchDispatchMode):
    """Answers every derivative of a log-softmax by the formula, ``g - softmax(alpha log p) sum(g)``, in float64.

    To be active during the backward pass of a program without PGT, all of whose log-softmaxes are of the logits.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten._log_softmax_backward_data.default:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        grad, log_probs, dim, dtype = args
        grad, log_probs = grad.double(), log_probs.double()
        powered = torch.softmax(torch.where(log_probs.isinf(), log_probs, self.alpha * log_probs), dim)
        return (grad - powered * grad.sum(dim, keepdim=True)).to(dtype)
