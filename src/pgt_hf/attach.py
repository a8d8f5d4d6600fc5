"""``attach_powergrad``: put PGT on any model's logits, without touching the model, its loss or the loop around it.

A forward hook on the head turns its output into ``PowerGradLogits``; the loss does the rest. Works on plain modules,
timm, torchvision, transformers and PEFT models, before or after they are wrapped for distribution.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from .functional import check_alpha
from .logits import PowerGradLogits, PowerGradState

__all__ = ["PowerGradHandle", "attach_powergrad", "find_head", "fold_powergrad"]

_HEAD_NAMES = ("timm_model", "classifier", "score", "lm_head", "qa_outputs")
_LINEAR = (nn.Linear, nn.Conv2d)


def attach_powergrad(model: nn.Module, alpha: float, head: nn.Module | str | None = None) -> "PowerGradHandle":
    """Makes every softmax cross-entropy of ``model``'s logits a PGT one, while it trains.

    It acts only in training mode with gradients enabled; evaluation, generation and saved weights are untouched.

    Args:
        model: Any module. A plain one (timm, torchvision, your own) is hooked on its own output, all tensors of it; a
            transformers model, whose loss may be computed inside, on its head.
        alpha: ``0 <= alpha <= 1``; 1 is plain training, bit for bit.
        head: The module whose output are the logits, or its dotted name, where it is not to be found by itself.

    Returns:
        A ``PowerGradHandle``: ``handle.alpha`` may be moved, ``handle.calls`` counts the softmaxes that used it,
        ``handle.remove()`` (or leaving a ``with`` block) detaches it.

    Raises:
        TypeError, ValueError: ``alpha`` is not allowed, or the head was not found (its candidates are listed).
        RuntimeError: PGT is attached already. Also, in the first backward pass of a loss that takes no softmax of
            the logits that PGT could see (sigmoid losses, fused losses): that would be training without PGT.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with attach_powergrad(model, alpha=0.25) as handle:
        ...     nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> handle.calls
        1
    """
    check_alpha(alpha)
    if any(True for _ in _find_hooks(model)):
        name = type(_unwrap(model)).__name__
        raise RuntimeError(f"PGT is attached to this {name} already; call remove() on the first handle before")
    return PowerGradHandle(model, find_head(model, head), float(alpha))


class PowerGradHandle:
    """What ``attach_powergrad`` returns. Also a context manager that detaches at its end."""

    def __init__(self, model: nn.Module, head: nn.Module, alpha: float) -> None:
        self.head = head
        self.state = PowerGradState(alpha)
        self._hooks: list[RemovableHandle] = [head.register_forward_hook(_WrapLogits(self.state))]
        # The model's own output is where a loss that never met the logits can be caught (the head may not even run).
        for module in {_unwrap(model), head}:
            self._hooks.append(module.register_forward_hook(_CheckUse(self.state)))

    @property
    def alpha(self) -> float:
        """The exponent in use; assigning moves it, also under torch.compile, without recompiling."""
        return self.state.alpha.item()

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha(value)
        if value != self.state.alpha:
            self.state.alpha.fill_(value)

    @property
    def calls(self) -> int:
        """How many softmaxes have used the transform since it was attached."""
        return int(self.state.calls.item())

    @property
    def attached(self) -> bool:
        """Whether the hooks are still on the model."""
        return any(getattr(hook, "state", None) is self.state for hook in self.head._forward_hooks.values())

    def remove(self) -> None:
        """Detaches the transform; the model is plain again. Harmless when called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "PowerGradHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"PowerGradHandle(head={type(self.head).__name__}, alpha={self.alpha}, calls={self.calls})"


class _WrapLogits:
    """Forward hook of the head; a class, so that models which carry it can be copied, pickled and spawned."""

    def __init__(self, state: PowerGradState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training and torch.is_grad_enabled() and self.state.active):
            return output
        if self.state.before_use is not None and not torch.compiler.is_compiling():
            self.state.before_use()
        if isinstance(output, Tensor):  # the common case, kept apart: a tree walk need not be traced
            return self._wrap(output)
        return tree_map(self._wrap, output)

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point() and value.dim() > 0:
            return PowerGradLogits.wrap(value, self.state)
        return value


class _CheckUse:
    """Forward hook of the model: its first backward pass must have met the transform on its way."""

    def __init__(self, state: PowerGradState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled() and self.state.active):
            return
        if self.state.calls > 0:
            return
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                with torch._C.DisableTorchFunctionSubclass():
                    value.register_hook(self._check)

    def _check(self, grad: Tensor) -> None:
        check_used(self.state)


def check_used(state: PowerGradState) -> None:
    """Raises if no softmax has used the transform; called in a backward pass or before a step."""
    if state.calls == 0:
        met = f" (the logits met: {', '.join(state.met)})" if state.met else " (the logits met no function at all)"
        raise RuntimeError(
            f"PGT was attached but the loss never took a log_softmax or cross_entropy of the logits{met}, so this is "
            "training without PGT. Sigmoid losses have no PGT. A fused loss (Liger, linear_cross_entropy) keeps no "
            "logits: switch it off or use pgt_hf.powergrad_linear_cross_entropy. A hand-written softmax: call "
            "pgt_hf.powergrad_log_softmax. Logits made elsewhere: pass head=. Or detach with handle.remove()."
        )


def release_powergrad(model: nn.Module) -> None:
    """Makes a model plain again that an optimizer of ours put PGT on; what was attached by hand stays."""
    for module, key, hook in list(_find_hooks(model)):
        if hook.state.owned:
            del module._forward_hooks[key]


def find_head(model: nn.Module, head: nn.Module | str | None = None) -> nn.Module:
    """The module whose output are the logits.

    Raises:
        TypeError: ``head`` is neither a module nor a name.
        ValueError: ``head`` is not in the model, or none was given and none found; candidates are listed.
    """
    if isinstance(head, nn.Module):
        if not any(module is head for module in model.modules()):
            raise ValueError(f"head is a {type(head).__name__} that is not part of the model")
        return head
    if isinstance(head, str):
        names = dict(_unwrap(model).named_modules())
        if head not in names:
            raise ValueError(f"head={head!r} names no module of the model; candidates: {_candidates(model)}")
        return names[head]
    if head is not None:
        raise TypeError(f"head must be a module, a dotted name or None, got {head!r}")

    inner = _unwrap(model)
    base = _peft_base(inner)
    if not _is_pretrained(base):
        return inner  # PEFT calls a base model's forward() past its hooks: so the outermost module it is
    output_embeddings = base.get_output_embeddings()
    if not hasattr(base, "timm_model") and isinstance(output_embeddings, nn.Module):
        return output_embeddings
    for name in _HEAD_NAMES:
        if isinstance(found := getattr(base, name, None), nn.Module):
            return found
    raise ValueError(f"found no classification head on {type(base).__name__}; pass head=, one of: {_candidates(base)}")


@torch.no_grad()
def fold_powergrad(model: nn.Module, alpha: float) -> nn.Module:
    """Multiplies the head's weight and bias by ``alpha``, in place: same top-1, and ``p'`` as probabilities.

    PGT trains ``p' = softmax(alpha z)``, so the raw softmax of a trained model is over-confident. Folding (a
    temperature of 1/alpha) makes the trained probabilities the ones that the model gives.

    Args:
        model: A trained model, see ``attach_powergrad``.
        alpha: The value it was trained with, above 0.

    Returns:
        ``model``.

    Raises:
        ValueError: ``alpha`` is 0, or the head is not a last linear layer that can be scaled exactly: tied to the
            input embeddings, followed by a soft cap, or unknown. Then divide the logits by a temperature of 1/alpha.

    Example:
        >>> model = fold_powergrad(nn.Linear(4, 3), alpha=0.25)
    """
    check_alpha(alpha)
    advice = "; divide the logits by a temperature of 1/alpha instead"
    if alpha == 0:
        raise ValueError("alpha must be above 0 to be folded into the head: 0 would make every probability 1/C")
    base = _peft_base(_unwrap(model))
    config = getattr(base, "config", None)
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError(f"{type(base).__name__} caps its logits after the head, folding would not be exact{advice}")
    layers = list(_last_linear(base))
    if not layers:
        raise ValueError(f"found no linear layer at the head of {type(base).__name__}{advice}")
    get_input = getattr(base, "get_input_embeddings", None)
    embeddings = get_input() if _is_pretrained(base) and get_input is not None else None
    for layer in layers:
        if embeddings is not None and layer.weight is getattr(embeddings, "weight", None):
            raise ValueError(f"the head of {type(base).__name__} shares its weight with the input embeddings{advice}")
    for layer in layers:
        layer.weight.mul_(alpha)
        if layer.bias is not None:
            layer.bias.mul_(alpha)
    if config is not None and hasattr(config, "powergrad_alpha"):
        config.powergrad_folded = True
    return model


def last_linear(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The linear layers that give the logits, for what must treat them apart (AGC leaves the head unclipped)."""
    return list(_last_linear(_peft_base(_unwrap(model))))


def _last_linear(base: Any) -> Iterator[nn.Linear | nn.Conv2d]:
    base = getattr(base, "timm_model", base)
    if hasattr(base, "get_classifier"):  # timm; a distilled model has two
        found = base.get_classifier()
        heads = list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else [found]
    elif _is_pretrained(base):
        heads = [find_head(base)]
    else:  # torchvision and plain modules: the layer that was registered last under the usual name, or at all
        named = [getattr(base, name, None) for name in ("fc", "classifier", "heads", "head")]
        heads = [next((module for module in named if isinstance(module, nn.Module)), base)]
    for head in heads:
        linear = [module for module in head.modules() if isinstance(module, _LINEAR)]
        if linear:
            yield linear[-1]


def _unwrap(model: nn.Module) -> nn.Module:
    """Looks through DistributedDataParallel and DataParallel; a compiled module is hooked outside its graph."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def _peft_base(model: Any) -> Any:
    """The model under torch.compile and PEFT; duck-typed from here on."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "get_output_embeddings")


def _find_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, "_WrapLogits | _CheckUse"]]:
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, (_WrapLogits, _CheckUse)):
                yield module, key, hook


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    return ", ".join(repr(name) for name in names[-8:]) or "none (it has no linear layer)"
