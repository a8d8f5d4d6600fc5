"""No step without PGT: an optimizer's step on a model under PGT needs a backward pass that came through its head.

The gate (``logits.py``) judges the gradients that reach it. What never reaches it is found here, before the step: a
fused loss that passes the head by, a head that was replaced or copied, a model left in eval mode. Torch calls one hook
before every optimizer's step; it is registered only while PGT is attached to something.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .logits import State

__all__ = ["ALPHA_KEY", "after_closure", "guard_copies", "guard_steps", "guard_weights"]

ALPHA_KEY = "powergrad_alpha"

_NO_PASS = (
    "PGT is attached (alpha={alpha}), but {event}, so this is training without PGT. Usual causes: a fused loss (Liger, "
    "TRL, linear_cross_entropy) uses the head's weight and keeps no logits: switch it off, or use "
    "pgt_hf.powergrad_linear_cross_entropy; the model or its head is in eval mode, or was called by forward() past its "
    "hooks; the head was replaced, resized or copied after attaching: attach again; the loss takes no logits of this "
    "head: pass head=. To train without PGT on purpose: handle.remove()"
)
_FOREIGN = (
    "a plain {optimizer} steps on a model that another optimizer trains with PGT (alpha={alpha}); call "
    "powergrad.remove() on that optimizer, or delete it, before the forward pass, or use pgt_hf.bind_powergrad on this"
)
_COPIED = (
    "this {optimizer} is a copy of one that trains with PGT, and its copy of the model is plain; call "
    "pgt_hf.bind_powergrad(optimizer, model) on the copies, or remove 'powergrad_alpha' from its param_groups"
)
_REPLACED = (
    "the transform of this {optimizer} was replaced: another optimizer took over its model; call "
    "pgt_hf.bind_powergrad(optimizer, model) to train with it again"
)


class _Watch:
    """What the guard remembers of one attachment."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # state.calls at its step


_watches: "weakref.WeakKeyDictionary[State, _Watch]" = weakref.WeakKeyDictionary()
# The attachments that concern an optimizer, found anew when one is added or the optimizer has gained parameters.
_concerned: "weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, int], list[weakref.ref[State]]]]"
_concerned = weakref.WeakKeyDictionary()
_attachments = 0
_hook: RemovableHandle | None = None
_copies = False


def guard_steps(state: State, model: nn.Module) -> None:
    """Watches every optimizer that steps on ``model``, for as long as ``state`` lives."""
    global _attachments
    _watches[state] = _Watch(model)
    _attachments += 1
    _register()


def guard_weights(state: State, layer: nn.Module) -> list[RemovableHandle]:
    """Refuses a backward pass that gives a head's layer a gradient without coming through the head.

    So one fused loss among many is found, in the backward pass itself. A compiled graph hands out all its gradients
    at once and in any order; hence the second look when the pass is over.
    """

    def look(weight: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if state.enabled and layer.training and state.last_pass != task and weight.grad is not None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: raise_if_missing(task))

    def raise_if_missing(task: int) -> None:
        if state.last_pass != task:
            event = "the head's weight got a gradient in a backward pass that did not come through the head's output"
            raise RuntimeError(_NO_PASS.format(alpha=state.alpha, event=event))

    return [p.register_post_accumulate_grad_hook(look) for p in layer.parameters() if p.requires_grad and p.is_leaf]


def guard_copies() -> None:
    """Watches the copies of an optimizer as well, which know no attachment."""
    global _copies
    _copies = True
    _register()


def after_closure(args: Any, kwargs: Any, action: Callable[[], None]) -> tuple[Any, Any] | None:
    """Runs ``action`` on the gradients of a step: at once, or, where a closure computes them, after each of its calls.

    Takes and returns what torch hands to a step pre-hook.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        action()
        return None

    def closure_with_action() -> Any:
        loss = closure()
        action()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_with_action}
    return (args[0], closure_with_action, *args[2:]), kwargs


def _register() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    global _hook
    if not _copies and _hook is not None and not any(state.enabled for state in _watches):
        _hook.remove()  # nothing is attached any more
        _hook = None
    name = type(optimizer).__name__
    states = _states_of(optimizer)
    own = getattr(optimizer.param_groups[0], "state", states) if optimizer.param_groups else states
    if own is None:
        raise RuntimeError(_COPIED.format(optimizer=name))
    if isinstance(own, State) and own.replaced:
        raise RuntimeError(_REPLACED.format(optimizer=name))
    if not states:
        return None
    if ALPHA_KEY not in optimizer.param_groups[0]:
        for state in states:
            if state.owned:
                raise RuntimeError(_FOREIGN.format(optimizer=name, alpha=state.alpha))
    return after_closure(args, kwargs, lambda: _check(optimizer, states))


def _check(optimizer: Optimizer, states: list[State]) -> None:
    for state in states:
        seen = _watches[state].seen
        if state.calls > seen.get(optimizer, 0):
            seen[optimizer] = state.calls
        elif _changes_anything(optimizer):
            event = f"no gradient has come through the head since this {type(optimizer).__name__} last stepped"
            raise RuntimeError(_NO_PASS.format(alpha=state.alpha, event=event))


def _states_of(optimizer: Optimizer) -> list[State]:
    """The enabled attachments of the models whose parameters this optimizer steps on."""
    key = (_attachments, sum(len(group["params"]) for group in optimizer.param_groups))
    known = _concerned.get(optimizer)
    if known is None or known[0] != key:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = []
        for state, watch in list(_watches.items()):
            model = watch.model()
            if model is not None and any(id(parameter) in stepped for parameter in model.parameters()):
                found.append(weakref.ref(state))
        known = _concerned[optimizer] = key, found
    return [state for ref in known[1] if (state := ref()) is not None and state.enabled]


def _changes_anything(optimizer: Optimizer) -> bool:
    """Whether the step trains: a dry one without gradients or with a rate of 0 only makes the optimizer's state."""
    return any(
        bool(group.get("lr", 1)) and any(parameter.grad is not None for parameter in group["params"])
        for group in optimizer.param_groups
    )
