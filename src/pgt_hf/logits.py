"""``PowerGradLogits``: logits that know how they want to be differentiated.

A tensor subclass that carries ``alpha`` from the classification head to wherever the softmax is taken. It stays itself
through reshapes, casts, slices and arithmetic; where ``log_softmax`` or ``cross_entropy`` meets it, the value is the
true one and the gradient is PGT's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from .functional import powergrad_cross_entropy, powergrad_log_softmax

__all__ = ["PowerGradLogits", "PowerGradState"]


class PowerGradState:
    """What the logits of one head share: alpha, how often a softmax has used it, and who owns it.

    alpha and calls are 0-dim CPU tensors: moved in place, they neither recompile a graph nor wait for a device.
    A state that an optimizer owns reads alpha through ``before_use``; its copies (an EMA of the model, a pickle) have
    no owner and no effect, so that nobody trains a copy with PGT without knowing.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = torch.tensor(alpha, dtype=torch.float64)
        self.calls = torch.zeros((), dtype=torch.int64)
        self.met: list[str] = []  # functions that met the logits instead, for the error message
        self.owned = False
        self.before_use: Callable[[], None] | None = None

    @property
    def active(self) -> bool:
        return not self.owned or self.before_use is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"before_use": None}


class PowerGradLogits(Tensor):
    """A tensor with a ``PowerGradState``. Made by ``PowerGradLogits.wrap``; ordinary in every other way."""

    powergrad_state: PowerGradState

    @staticmethod
    def wrap(logits: Tensor, state: PowerGradState) -> "PowerGradLogits":
        wrapped = logits.as_subclass(PowerGradLogits)
        wrapped.powergrad_state = state
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        state = _find_state(args, kwargs)
        if state is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _TRANSFORMED and isinstance(_logits_of(args, kwargs), PowerGradLogits):
                result = _TRANSFORMED[func](state, *args, **kwargs)
            else:
                result = func(*args, **kwargs)
                if not torch.compiler.is_compiling():
                    _remember(state, func)
        if func is Tensor.clone:  # DDP's static graph clones inside a Function, where nothing requires a gradient yet
            return PowerGradLogits.wrap(result, state)
        return _carry(result, state)


def _find_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PowerGradState | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, PowerGradLogits):
            # A copy that something outside made (an unpickled tensor, say) carries no state and is a plain tensor.
            return getattr(value, "powergrad_state", None)
        if isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, PowerGradLogits):
                    return getattr(item, "powergrad_state", None)
    return None


def _carry(result: Any, state: PowerGradState) -> Any:
    """Passes the state on to what depends on the logits: floating, differentiable, not yet a loss.

    Log-probabilities may carry it too: a second log_softmax changes neither their value nor their gradient.
    """
    if isinstance(result, Tensor):
        if result.requires_grad and result.is_floating_point() and result.dim() > 0:
            return PowerGradLogits.wrap(result, state)
        return result
    if type(result) in (list, tuple):
        return type(result)(_carry(item, state) for item in result)
    return result


def _remember(state: PowerGradState, func: Callable[..., Any]) -> None:
    name = getattr(func, "__name__", "")
    if name and not name.startswith("__") and name not in state.met:
        state.met = [*state.met, name][-6:]


def _logits_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input", kwargs.get("log_probs"))


def _plain(logits: Tensor) -> Tensor:
    # An op under DisableTorchFunctionSubclass returns a plain tensor; as_subclass(Tensor) would break a compiled
    # graph.
    return logits.view_as(logits)


def _cross_entropy(
    state: PowerGradState,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    state.calls.add_(1)
    return powergrad_cross_entropy(
        _plain(input), target, weight, ignore_index, reduction, label_smoothing, alpha=state.alpha
    )


def _log_softmax(
    state: PowerGradState,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Tensor:
    if isinstance(_stacklevel, torch.dtype):  # torch.log_softmax(input, dim, dtype)
        dtype = _stacklevel
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # torch's deprecated choice
    state.calls.add_(1)
    input = _plain(input)
    return powergrad_log_softmax(input if dtype is None else input.to(dtype), dim, alpha=state.alpha)


def _ctc_loss(
    state: PowerGradState,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """CTC over PGT's log-softmax; log_probs (T, N, C) or (T, C).

    torch's own backward hands out ``softmax(z) - q`` rather than the derivative of the loss in log_probs, ``-q`` (q:
    the posterior of the alignment), which would leave the log-softmax nothing to transform. A term of value 0 puts it
    right.
    """
    log_probs = _plain(log_probs)
    losses = F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, "none", zero_infinity)
    steps = torch.arange(log_probs.size(0), device=log_probs.device)
    lengths = torch.as_tensor(input_lengths, device=log_probs.device)
    used = steps.view(-1, *[1] * (log_probs.dim() - 2)) < lengths
    mass = (log_probs * log_probs.detach().exp()).sum(-1)
    # An impossible alignment has no gradient to put right: its loss is infinite, or 0 under zero_infinity.
    mass = torch.where(used & losses.detach().isfinite() & (losses.detach() != 0), mass, 0).sum(0)
    losses = losses - (mass - mass.detach())
    if reduction == "mean":
        return (losses / torch.as_tensor(target_lengths, device=losses.device).clamp(min=1)).mean()
    return losses.sum() if reduction == "sum" else losses


_TRANSFORMED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.cross_entropy: _cross_entropy,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    torch.special.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    F.ctc_loss: _ctc_loss,
}
