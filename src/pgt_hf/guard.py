"""No step without PGT: an optimizer's step on a model under PGT needs a backward pass that came through its head.

The gate (``gate.py``) judges the gradients that reach it. This module finds the rest before the step: a fused loss
that bypasses the head, a replaced or copied head, a model left in eval mode. It uses one hook before every optimizer's
step, registered only while PGT is attached to something.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .gate import State

__all__ = ["ALPHA_KEY", "INITIAL_KEY", "after_closure", "guard_copies", "guard_steps", "guard_weights"]

ALPHA_KEY = "powergrad_alpha"
INITIAL_KEY = f"initial_{ALPHA_KEY}"  # for schedules, like "initial_lr"

_NO_PASS = (
    "PGT is attached (alpha={alpha}), but {event}, so this is training without PGT. Usual causes: a fused loss "
    "(Liger, TRL, linear_cross_entropy) uses the head's weight and keeps no logits: switch it off, or use "
    "pgt_hf.powergrad_linear_cross_entropy; the model or its head is in eval mode, or was called by forward() past "
    "its hooks; the head was replaced, resized or copied after attaching: attach again; the loss takes no logits of "
    "this head: pass head=. To train without PGT on purpose: handle.remove()"
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


_models: "weakref.WeakKeyDictionary[State, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()
# The attachments that concern an optimizer; looked up again when one is added or the optimizer gets more parameters.
_concerned: "weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, int], list[weakref.ref[State]]]]"
_concerned = weakref.WeakKeyDictionary()
_attachments = 0
_hook: RemovableHandle | None = None
_copies = False


def guard_steps(state: State, model: nn.Module) -> None:
    """Watches every optimizer that steps on ``model``, as long as ``state`` lives."""
    global _attachments
    _models[state] = weakref.ref(model)
    _attachments += 1
    _register()


def guard_weights(state: State, layer: nn.Module) -> list[RemovableHandle]:
    """Refuses a backward pass that gives a head's layer a gradient without coming through the head.

    This finds one fused loss among several. A compiled graph returns its gradients in any order, so the check waits
    for the end of the pass.
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
    """Also watches copies of an optimizer, which have no attachment."""
    global _copies
    _copies = True
    _register()


def after_closure(args: Any, kwargs: Any, action: Callable[[], None]) -> tuple[Any, Any] | None:
    """Runs ``action`` on the gradients of a step: now, or after each call of the closure that computes them.

    Takes and returns what a step pre-hook of torch does.
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
    if not _copies and _hook is not None and not any(state.enabled for state in _models):
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
        state.place(next(iter(optimizer.param_groups[0]["params"])))
        if state.calls > state.stepped.get(optimizer, 0):
            state.stepped[optimizer] = state.calls
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
        for state, reference in list(_models.items()):
            model = reference()
            if model is not None and any(id(parameter) in stepped for parameter in model.parameters()):
                found.append(weakref.ref(state))
        known = _concerned[optimizer] = key, found
    states = [ref() for ref in known[1]]
    return [state for state in states if state is not None and state.enabled]


def _changes_anything(optimizer: Optimizer) -> bool:
    """Whether the step trains; without gradients, or at a rate of 0, it only creates the optimizer's state."""
    return any(
        bool(group.get("lr", 1)) and any(parameter.grad is not None for parameter in group["params"])
        for group in optimizer.param_groups
    )
