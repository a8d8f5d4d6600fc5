"""``attach_powergrad``: PGT on any model's logits, without a change to the model, its loss or its training loop.

A forward hook on the head sends its output through the gate (``gate.py``); the loss does the rest. Works on plain
modules, timm, torchvision, transformers and PEFT models, before or after they are wrapped for distributed training.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .functional import check_alpha, is_compiling, is_functorch
from .gate import State, TracedGate, enter
from .guard import guard_steps, guard_weights
from .heads import Head, candidates, find_heads, is_pretrained, untied_layers, unwrap
from .limits import checked
from .logits import PowerGradLogits

__all__ = ["PowerGradHandle", "attach_powergrad", "release_powergrad"]


@checked
def attach_powergrad(model: nn.Module, alpha: float, head: Head | None = None) -> "PowerGradHandle":
    """Applies PGT to every softmax cross-entropy of ``model``'s logits while it trains.

    It acts only in training mode with gradients enabled; evaluation, generation and saved weights stay as they are.
    A backward pass through the head without PGT raises RuntimeError, and so does an optimizer's step without one.

    Args:
        model: Any module. A plain one (timm, torchvision, your own) is hooked on its output; a transformers model,
            which may compute its loss inside, on its head or heads.
        alpha: ``0 <= alpha <= 1``; 1 is plain training, bit for bit.
        head: The module that computes the logits, its dotted name, or a list of several, if it is not detected.

    Returns:
        A ``PowerGradHandle``: ``handle.alpha`` can be changed, ``handle.calls`` counts backward passes with PGT, and
        ``handle.remove()``, or the end of a ``with`` block, detaches it.

    Raises:
        TypeError, ValueError: ``alpha`` is not allowed, or the head was not found (its candidates are listed).
        RuntimeError: PGT is attached already.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with attach_powergrad(model, alpha=0.25) as handle:
        ...     nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> handle.calls
        1
    """
    alpha = float(check_alpha(alpha))
    if any(hook.state.enabled for module in model.modules() for hook in _hooks_of(module).values()):
        name = type(unwrap(model)).__name__
        raise RuntimeError(f"PGT is already attached to this {name}; call remove() on the first handle")
    return PowerGradHandle(model, find_heads(model, head), alpha, all_heads=head is None)


class PowerGradHandle:
    """The result of ``attach_powergrad``, and a context manager that detaches at its end."""

    def __init__(self, model: nn.Module, heads: list[nn.Module], alpha: float, all_heads: bool = True) -> None:
        torch.compiler.allow_in_graph(TracedGate)
        self.heads = heads
        self.state = State(alpha)
        if (parameter := next(heads[0].parameters(), None)) is not None:
            self.state.place(parameter)
        self._hooks: list[RemovableHandle] = [head.register_forward_hook(_Hook(self.state)) for head in heads]
        inner = unwrap(model)
        if all_heads and is_pretrained(inner):
            self._hooks.append(inner.register_forward_hook(_CheckHeads(self.state)))
        for layer in untied_layers(inner, heads):
            self._hooks += guard_weights(self.state, layer)
        self.on_change: Callable[[float], None] = lambda alpha: None
        guard_steps(self.state, inner)
        if "torch._dynamo" in sys.modules:  # a graph that was compiled before has no guard on a new hook
            torch.compiler.reset()

    @property
    def alpha(self) -> float:
        """The exponent; a new value acts in the next forward pass, compiled or not, without recompiling."""
        return self.state.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = float(check_alpha(value))
        if value != self.state.alpha:
            self.state.alpha = value
            self.on_change(value)

    @property
    def calls(self) -> int:
        """The number of backward passes with PGT since it was attached."""
        return self.state.calls

    @property
    def attached(self) -> bool:
        """Whether PGT still acts on the model."""
        return self.state.enabled

    def remove(self) -> None:
        """Detaches the transform; the model is plain again. Harmless when called twice."""
        if self._hooks:
            self.state.enabled = False
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def __enter__(self) -> "PowerGradHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        heads = ", ".join(type(head).__name__ for head in self.heads)
        return f"PowerGradHandle(head={heads}, alpha={self.alpha}, calls={self.calls})"


class _StateHook:
    """A forward hook that knows its attachment; as a class, it can be copied and pickled with the model.

    A copy of the head shares alpha. If an optimizer owns the attachment, a copy (an EMA, say) is plain: nobody shall
    train it with PGT unknowingly.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def acts(self, module: nn.Module) -> bool:
        return self.state.enabled and module.training and torch.is_grad_enabled()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StateHook":
        if not self.state.owned:
            return self
        plain = copy.copy(self)
        plain.state = State(self.state.alpha)
        plain.state.enabled = False
        return plain


class _Hook(_StateHook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.acts(module) or torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None:
            return output  # a traced model has no gate, and the guard refuses its step
        if self.state.folded:
            raise RuntimeError(
                f"alpha = {self.state.alpha} was folded into the head during training: load the weights from before "
                "the fold, or attach PGT again to train the folded model"
            )
        if is_functorch():
            raise RuntimeError(
                "PGT does not act under torch.func (grad, vmap, jacrev, functional_call inside them); there, call "
                "handle.remove() and compute the loss with pgt_hf.powergrad_cross_entropy(logits, target, alpha=...)"
            )
        return enter(output, self.state)


class _CheckHeads(_StateHook):
    """Checks that PGT acts on all logits of a transformers model whose heads were detected."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.acts(module) or is_compiling() or not hasattr(output, "items"):
            return
        plain = [name for name, value in output.items() if name.endswith("logits") and _is_plain(value)]
        under_pgt = [name for name, value in output.items() if isinstance(value, PowerGradLogits)]
        if plain and under_pgt:
            raise RuntimeError(
                f"PGT acts on {', '.join(under_pgt)} of {type(module).__name__}, but not on {', '.join(plain)}; name "
                f"all the heads that it should act on, head=[...], from: {candidates(module)}"
            )


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, PowerGradLogits)


def release_powergrad(model: nn.Module) -> None:
    """Removes what an optimizer of this package attached to a model; what was attached by hand stays."""
    for module in model.modules():
        for key, hook in _hooks_of(module).items():
            if hook.state.owned or not hook.state.enabled:
                hook.state.replaced |= hook.state.enabled
                hook.state.enabled = False
                del module._forward_hooks[key]


def _hooks_of(module: nn.Module) -> dict[int, _StateHook]:
    hooks: dict[int, Any] = dict(module._forward_hooks)
    return {key: hook for key, hook in hooks.items() if isinstance(hook, _StateHook)}
