"""The optimizer factory: every optimizer of timm's factory behind the prefix ``powergrad_``.

PGT acts at the logits, not in the step, so ``powergrad_sgd`` is timm's ``sgd`` plus a transform on the model that
lives exactly as long as the optimizer. alpha stands in ``param_groups`` as ``powergrad_alpha``, beside lr.
"""

import difflib
import inspect
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .attach import PowerGradHandle, attach_powergrad, check_used, last_linear, release_powergrad
from .clipping import ClipGradients, check_clipping
from .functional import check_alpha

__all__ = ["DEFAULT_ALPHA", "PREFIX", "bind_powergrad", "create_optimizer", "list_optimizers"]

PREFIX = "powergrad_"
ALPHA_KEY = "powergrad_alpha"
DEFAULT_ALPHA = 0.25

_handles: "weakref.WeakKeyDictionary[Optimizer, PowerGradHandle]" = weakref.WeakKeyDictionary()
_hooks: "weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]]" = weakref.WeakKeyDictionary()
_watching = False


def create_optimizer(
    model: nn.Module,
    opt: str = "powergrad_sgd",
    lr: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    clip_mode: str | None = None,
    clip_value: float | None = None,
    head: nn.Module | str | None = None,
    **kwargs: Any,
) -> Optimizer:
    """``timm.optim.create_optimizer_v2`` plus the PowerGrad Transform on ``model``.

    Works with ``accelerator.prepare`` as any optimizer does. Creating a second one for the same model replaces the
    first one's transform; when the optimizer is gone, so is the transform.

    Args:
        model: The model to train (its parameters are grouped as timm does: no weight decay on biases and norms).
        opt: ``"powergrad_" +`` any name that timm knows; ``list_optimizers()`` prints them.
        lr: Learning rate.
        alpha: ``0 <= alpha <= 1``; 1 is plain training.
        clip_mode: None, "norm", "value" or "agc" (adaptive; the head is left out), before each step.
        clip_value: The bound that ``clip_mode`` needs.
        head: Where the logits are made, see ``attach_powergrad``.
        **kwargs: Passed on: ``momentum``, ``weight_decay``, ``layer_decay``, ``filter_bias_and_bn``, ``nesterov``, ...

    Returns:
        A ``torch.optim.Optimizer``. Its ``powergrad`` attribute is the handle.

    Raises:
        TypeError, ValueError: An option is not allowed or the optimizer's name is unknown.
        RuntimeError: PGT was attached to the model by hand already.

    Example:
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=0.25, nesterov=True, weight_decay=5e-4)
    """
    from timm.optim import create_optimizer_v2

    check_alpha(alpha)
    check_clipping(clip_mode, clip_value)
    name = _base_name(opt)
    optimizer = create_optimizer_v2(model, opt=name, lr=lr, **kwargs)
    return bind_powergrad(optimizer, model, alpha=alpha, clip_mode=clip_mode, clip_value=clip_value, head=head)


def bind_powergrad(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    alpha: float = DEFAULT_ALPHA,
    clip_mode: str | None = None,
    clip_value: float | None = None,
    head: nn.Module | str | None = None,
) -> Optimizer:
    """Attaches PGT to ``model`` for the life of any ``optimizer``; see ``create_optimizer`` for the rest."""
    check_clipping(clip_mode, clip_value)
    stepped = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead wraps one and shares its groups
    release_powergrad(model)
    handle = attach_powergrad(model, alpha, head)
    for group in optimizer.param_groups:
        group[ALPHA_KEY] = handle.alpha
    optimizer.powergrad = handle  # type: ignore[attr-defined]

    follow = _Follow(handle, weakref.ref(stepped))
    handle.state.owned, handle.state.before_use = True, follow
    for hook in _hooks.pop(stepped, []):  # of an earlier binding of the same optimizer
        hook.remove()
    _hooks[stepped] = [
        stepped.register_step_pre_hook(_CheckStep(handle)),
        stepped.register_load_state_dict_post_hook(lambda _: follow()),
        stepped.register_step_post_hook(lambda *_: follow()),  # a compiled forward does not look at the groups itself
    ]
    if clip_mode is not None and clip_value is not None:
        exclude = [parameter for layer in last_linear(model) for parameter in layer.parameters()]
        _hooks[stepped].append(stepped.register_step_pre_hook(ClipGradients(clip_mode, clip_value, exclude)))
    weakref.finalize(stepped, handle.remove)
    _watch(stepped, handle)
    return optimizer


def list_optimizers(filter: str = "") -> list[str]:
    """The names that ``create_optimizer`` takes, by a wildcard such as ``"powergrad_ada*"``.

    Example:
        >>> list_optimizers("powergrad_sgd*")
        ['powergrad_sgd', 'powergrad_sgdp', 'powergrad_sgdw']
    """
    from timm.optim import list_optimizers as timm_list_optimizers

    return [PREFIX + name for name in timm_list_optimizers(filter.removeprefix(PREFIX))]


def allowed_options(opt: str) -> dict[str, inspect.Parameter]:
    """Every option that ``create_optimizer`` takes for this name: its own, timm's factory's and the optimizer's."""
    from timm.optim import create_optimizer_v2, get_optimizer_class

    optimizer_class = get_optimizer_class(_base_name(opt).removeprefix("lookahead_"), bind_defaults=False)
    options: dict[str, inspect.Parameter] = {}
    for function in (optimizer_class.__init__, create_optimizer_v2, create_optimizer):
        options |= inspect.signature(function).parameters
    for name in ("self", "params", "model", "model_or_params", "opt", "kwargs", "args", "param_group_fn"):
        options.pop(name, None)
    return options


class _Follow:
    """Carries alpha from the param groups, where schedulers and state dicts write it, to the logits."""

    def __init__(self, handle: PowerGradHandle, optimizer: "weakref.ref[Optimizer]") -> None:
        self.handle = handle
        self.optimizer = optimizer
        self.last = handle.alpha

    def __call__(self) -> None:
        optimizer = self.optimizer()
        if optimizer is None:
            return
        values = {float(group[ALPHA_KEY]) for group in optimizer.param_groups if ALPHA_KEY in group}
        moved = values - {self.last}
        if len(moved) > 1:
            raise ValueError(f"all param groups must share one {ALPHA_KEY}, got {sorted(values)}")
        # Either side may have been moved: a group (scheduler, state dict) wins over the handle.
        self.handle.alpha = self.last = moved.pop() if moved else self.handle.alpha
        for group in optimizer.param_groups:
            group[ALPHA_KEY] = self.last


class _CheckStep:
    """Step pre-hook: catches what the backward check cannot see, a compiled graph or a head that never ran."""

    def __init__(self, handle: PowerGradHandle) -> None:
        self.handle = handle

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.handle.attached:
            check_used(self.handle.state)


def _watch(optimizer: Optimizer, handle: PowerGradHandle) -> None:
    """Registers ``_refuse_foreign_step`` with torch, once for all optimizers of ours."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_foreign_step)
        _watching = True
    _handles[optimizer] = handle


def _refuse_foreign_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: an older optimizer that is still there must not bring PGT in unnoticed."""
    if any(ALPHA_KEY in group for group in optimizer.param_groups):
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for bound, handle in list(_handles.items()):
        shared = any(id(parameter) in stepped for group in bound.param_groups for parameter in group["params"])
        if shared and handle.attached:
            raise RuntimeError(
                f"a plain {type(optimizer).__name__} steps on a model that another optimizer trains with PGT "
                f"(alpha={handle.alpha}); call powergrad.remove() on that optimizer, or delete it, "
                "before the forward pass, or use pgt_hf.bind_powergrad on this one"
            )


def _base_name(opt: str) -> str:
    names = list_optimizers()
    base = opt.removeprefix(PREFIX) if isinstance(opt, str) else ""
    if not isinstance(opt, str) or not opt.startswith(PREFIX) or PREFIX + base.removeprefix("lookahead_") not in names:
        close = difflib.get_close_matches(f"{PREFIX}{base}", names) or names[:6]
        raise ValueError(f"opt must be '{PREFIX}' and the name of a timm optimizer, got {opt!r}; near: {close}")
    return base
