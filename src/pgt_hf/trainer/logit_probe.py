"""The logits of one forward pass and their gradient, for the callbacks that look at them."""

from typing import Any

import torch
from torch import Tensor, nn

from ..guard import ALPHA_KEY
from ..heads import find_heads, last_linear
from ..logits import elem_of

_MOST_ROWS = 1024  # a language model has more logits in a batch than are worth looking at


class LogitProbe:
    """Keeps the logits of one forward pass and their gradient; while it is not listening it costs one comparison."""

    def __init__(self, model: nn.Module, head: nn.Module | str | None, features: bool = False) -> None:
        self.listening = False
        self.features: Tensor | None = None
        self._logits: Tensor | None = None
        self._grad: Tensor | None = None
        self._hooks = [find_heads(model, head)[0].register_forward_hook(self._see)]
        if features and (layers := last_linear(model)):
            self._hooks.append(layers[0].register_forward_pre_hook(self._see_features))

    def listen(self) -> None:
        self.forget()
        self.listening = True

    def forget(self) -> None:
        self.listening, self.features, self._logits, self._grad = False, None, None, None

    def remove(self) -> None:
        self.forget()
        for hook in self._hooks:
            hook.remove()

    def seen(self) -> tuple[Tensor, Tensor] | None:
        """Logits and gradient, (N, C) each, of at most 1,024 rows; None where the model's graph was compiled."""
        if self._logits is None or self._grad is None:
            return None
        rows = [tensor.flatten(0, -2) for tensor in (self._logits, self._grad)]
        step = -(-len(rows[0]) // _MOST_ROWS)
        return rows[0][::step], rows[1][::step]

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self.listening or self._logits is not None:
            return
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None or not logits.requires_grad or logits.dim() < 2:
            return
        self._logits = elem_of(logits).detach()
        with torch._C.DisableTorchFunctionSubclass():
            logits.register_hook(self._see_grad)

    def _see_grad(self, grad: Tensor) -> None:
        if self.listening and self._grad is None:
            self._grad = elem_of(grad).detach().clone()

    def _see_features(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.listening and self.features is None and args:
            self.features = args[0].detach()


def alpha_of(optimizer: Any) -> float:
    """The alpha in use; 1, plain training, if the optimizer's groups have none."""
    groups = getattr(optimizer, "param_groups", [])
    return float(groups[0].get(ALPHA_KEY, 1.0)) if groups else 1.0
