"""Finds the modules that compute a model's logits, and folds alpha into them.

Models of timm, transformers and PEFT are recognised by their attributes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .functional import check_alpha
from .limits import checked

__all__ = [
    "Head",
    "candidates",
    "find_heads",
    "fold_powergrad",
    "is_pretrained",
    "last_linear",
    "untied_layers",
    "unwrap",
]

Head = nn.Module | str | Sequence[nn.Module | str]

_HEAD_NAMES = (
    "timm_model", "classifier", "score", "lm_head", "qa_outputs", "classification_head", "decode_head", "logits_proj",
)  # fmt: skip
# Heads that a model has beside its first one, in pretraining or segmentation.
_SECOND_HEADS = ("seq_relationship", "sop_classifier", "multiple_choice_head", "auxiliary_head")
_FOLDED = "_powergrad_folded"  # the mark of a layer that holds alpha
_LINEAR = (nn.Linear, nn.Conv2d)


def find_heads(model: nn.Module, head: Head | None = None) -> list[nn.Module]:
    """The modules whose outputs are logits: the named ones, or all that are found; otherwise an error."""
    if isinstance(head, nn.Module):
        if not any(module is head for module in model.modules()):
            raise ValueError(f"head is a {type(head).__name__} that is not part of the model")
        return [head]
    if isinstance(head, str):
        names = dict(unwrap(model).named_modules())
        if not head or head not in names:
            raise ValueError(f"head={head!r} names no module of the model; candidates: {candidates(model)}")
        return [names[head]]
    if isinstance(head, Sequence) and head:
        return [found for each in head for found in find_heads(model, each)]
    if head is not None:
        raise TypeError(f"head must be a module, a dotted name, a list of these or None, got {head!r}")

    inner = unwrap(model)
    base = _peft_base(inner)
    if not is_pretrained(base):
        return [inner]  # the outermost module: PEFT calls a base model's forward() without its hooks
    first = [] if hasattr(base, "timm_model") else [base.get_output_embeddings()]
    first += [getattr(base, name, None) for name in _HEAD_NAMES]
    found = [module for module in first if isinstance(module, nn.Module)]
    second = [module for name, module in base.named_modules() if name.rpartition(".")[2] in _SECOND_HEADS]
    if not found and not second:
        raise ValueError(
            f"found no classification head on {type(base).__name__}; pass head=, one of: {candidates(base)}"
        )
    return [*found[:1], *second]


@checked
@torch.no_grad()
def fold_powergrad(model: nn.Module, alpha: float) -> nn.Module:
    """Multiplies the head's weight and bias by ``alpha``, in place: the same top-1, with ``p'`` as probabilities.

    PGT trains ``p' = softmax(alpha z)``, which is less sharp than the raw softmax. Folding (a temperature of 1/alpha)
    makes it the one that the model gives: an improvement where the network fits its data and is over-confident, and a
    loss where it underfits. ``compare_calibration`` measures which it is.

    Args:
        model: A trained model, see ``attach_powergrad``.
        alpha: The value it was trained with, above 0.

    Returns:
        ``model``.

    Raises:
        ValueError: ``alpha`` is 0 or differs from the model's config, or the head is already folded, unknown, tied to
            the input embeddings or followed by a soft cap. Then divide the logits by a temperature of 1/alpha.

    Example:
        >>> model = fold_powergrad(nn.Linear(4, 3), alpha=0.25)
    """
    alpha = float(check_alpha(alpha))
    advice = "; divide the logits by a temperature of 1/alpha instead"
    if alpha == 0:
        raise ValueError("alpha must be above 0 to be folded into the head: with 0, every probability would be 1/C")
    base = _peft_base(unwrap(model))
    config = getattr(base, "config", None)
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError(f"{type(base).__name__} caps its logits after the head: folding would not be exact{advice}")
    layers = list(_last_linear(base))
    if not layers:
        raise ValueError(f"model must have a linear layer at its head, got a {type(base).__name__} without{advice}")
    for layer in layers:
        if _is_tied(base, layer):
            raise ValueError(f"the head of {type(base).__name__} shares its weight with the input embeddings{advice}")
    trained = getattr(config, "powergrad_alpha", None)
    if getattr(config, "powergrad_folded", False) or any(hasattr(layer, _FOLDED) for layer in layers):
        raise ValueError(f"model must not be folded twice: alpha is already in the head of this {type(base).__name__}")
    if trained is not None and not math.isclose(trained, alpha, rel_tol=1e-6):
        raise ValueError(f"alpha must be the one that the model was trained with, {trained}, got {alpha}")
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if hasattr(hook, "state"):  # attached: training on is an error
                hook.state.folded = True
    for layer in layers:
        setattr(layer, _FOLDED, alpha)
        layer.weight.mul_(alpha)
        if layer.bias is not None:
            layer.bias.mul_(alpha)
    if config is not None and hasattr(config, "powergrad_alpha"):
        config.powergrad_folded = True
    return model


def last_linear(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The linear layers that compute the logits (which AGC, for one, leaves unclipped)."""
    return list(_last_linear(_peft_base(unwrap(model))))


def _last_linear(base: Any) -> Iterator[nn.Linear | nn.Conv2d]:
    base = getattr(base, "timm_model", base)
    if hasattr(base, "get_classifier"):  # timm; a distilled model has two
        found = base.get_classifier()
        heads = list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else [found]
    elif is_pretrained(base):
        heads = find_heads(base)
    else:  # torchvision and plain modules: the layer that was registered last under the usual name, or at all
        named = [getattr(base, name, None) for name in ("fc", "classifier", "heads", "head")]
        heads = [next((module for module in named if isinstance(module, nn.Module)), base)]
    for head in heads:
        yield from _linear(head)[-1:]


def _linear(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [child for child in module.modules() if isinstance(child, _LINEAR)]


def untied_layers(model: nn.Module, heads: list[nn.Module]) -> list[nn.Linear | nn.Conv2d]:
    """The last linear layer of each head, unless another module uses its weight or the head is the whole model."""
    layers = last_linear(model) if heads == [model] and hasattr(model, "get_classifier") else []
    layers += [layer for head in heads if head is not model for layer in _linear(head)[-1:]]
    return [layer for layer in layers if not _is_tied(model, layer)]


def _is_tied(model: nn.Module, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether another module has the very weight, as the input embeddings of language models often do."""
    return any(p is layer.weight for each in model.modules() if each is not layer for p in each._parameters.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and DataParallel; a compiled module is hooked outside its graph."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def _peft_base(model: Any) -> Any:
    """The model inside torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a transformers model."""
    return hasattr(model, "config") and hasattr(model, "get_output_embeddings")


def candidates(model: nn.Module) -> str:
    """Names of the last linear layers, for an error message."""
    names = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    return ", ".join(repr(name) for name in names[-8:]) or "none (it has no linear layer)"
