"""Logits that carry alpha, and gradients that carry a stamp: how PGT finds the softmax.

``PowerGradLogits`` is a tensor subclass that keeps alpha through every op that torch dispatches. Where its log-softmax
is differentiated (by Python, C++, TorchScript, a checkpoint, a compiler), torch calls
``aten._log_softmax_backward_data`` with the log-probabilities, which are ``PowerGradLogits`` too: there PGT acts. The
result is a ``StampedGradient`` and stays one on its way up to the head's gate (``gate.py``).
"""

import collections
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.utils._pytree import tree_leaves, tree_map_only

from .functional import (
    CrossEntropy,
    LogSoftmax,
    check_alpha,
    check_cross_entropy,
    is_compiling,
    is_fast,
    log_softmax_backward,
    under_autocast,
)

__all__ = ["PowerGradLogits", "StampedGradient", "elem_of", "no_pgt", "unwrap"]

aten = torch.ops.aten

_NO_PGT = (
    "PGT is attached, but a gradient reached the head ({found}) without passing a log_softmax or cross_entropy of the "
    "logits{met}: this is training without PGT. Sigmoid losses (BCE) have no PGT. Replace a softmax written out by "
    "hand (softmax().log(), logsumexp, Categorical) by pgt_hf.powergrad_log_softmax. Do not detach or copy the logits "
    "before the loss (a reentrant checkpoint detaches them: use_reentrant=False). If another module computes the "
    "logits, or this output is not logits, pass head=. To train without PGT on purpose: handle.remove()"
)

_met: "collections.deque[str]" = collections.deque(maxlen=6)  # the last functions called on logits, for the message


def no_pgt(found: str) -> RuntimeError:
    """The error of a backward pass in which PGT did not act."""
    met = f"; it met {', '.join(dict.fromkeys(_met))}" if _met else ""
    return RuntimeError(_NO_PGT.format(found=found, met=met))


class _Wrapper(Tensor):
    """A tensor that holds another one; ``__torch_dispatch__`` decides what happens to it."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, *_: Any) -> "_Wrapper":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=elem.device,
            requires_grad=elem.requires_grad,
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.elem!r})"


def elem_of(tensor: Any) -> Any:
    """The plain tensor inside, where nothing is differentiated."""
    return tensor.elem if isinstance(tensor, _Wrapper) else tensor


class StampedGradient(_Wrapper):
    """A gradient that PGT has acted on. Sums keep the stamp: PGT plus a regulariser is still PGT."""

    crossing = -1  # the backward pass in which a stamped gradient last entered a compiled graph

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "StampedGradient":
        return StampedGradient(inner["elem"])

    def __coerce_same_metadata_as_tangent__(self, meta: Any, expected_type: type | None = None) -> Tensor:
        """A compiled graph takes the gradient of its returned logits plain, see ``PowerGradLogits``."""
        if expected_type in (None, StampedGradient):
            return self
        StampedGradient.crossing = torch._C._current_graph_task_id()
        return self.elem

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            return func(args[0].elem, *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        plain, plain_kwargs = tree_map_only(_Wrapper, elem_of, (args, kwargs))
        out = func(*plain, **plain_kwargs)
        if func._schema.is_mutable:
            return _as_passed(out, (plain, plain_kwargs), (args, kwargs))
        return tree_map_only(Tensor, lambda t: StampedGradient(t) if t.is_floating_point() else t, out)


class PowerGradLogits(_Wrapper):
    """Logits of a head under PGT, and all that is computed from them."""

    def __init__(self, elem: Tensor, alpha: Tensor, regime: str) -> None:
        self.elem, self.alpha = elem, alpha
        self.regime = regime  # what a compiler must know about alpha, since it cannot read the tensor

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["elem", "alpha"], self.regime

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: str, size: Any, stride: Any) -> "PowerGradLogits":
        return PowerGradLogits(inner["elem"], inner["alpha"], meta)

    def __coerce_same_metadata_as_tangent__(self, meta: Any, expected_type: type | None = None) -> Tensor:
        raise no_pgt("made from the logits themselves")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _READS:
            # Plain, as metrics want it. It also tells a compiler to expect plain gradients for the logits that its
            # graph returns, which is what it gets for unused ones (pytorch issue 172556).
            return args[0].elem.detach()
        if func in _LEAVES_TORCH:
            return func(args[0].elem.detach(), *args[1:], **kwargs)
        if func is Tensor.data_ptr:
            raise RuntimeError("PGT: the logits of an attached head have no storage of their own; use logits.detach()")
        if name != "__get__" and torch.is_grad_enabled() and not is_compiling():
            if func in _FAST and (out := _FAST[func](*args, **kwargs)) is not None:
                return out
            if not name.startswith("_"):
                _met.append(name)
            if func not in _KEEP_ARGUMENTS:
                args, kwargs = _shield(name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is aten._log_softmax_backward_data.default and isinstance(args[1], PowerGradLogits):
            return _log_softmax_backward(*args)
        if func in _CTC_BACKWARD and isinstance(args[1], PowerGradLogits):
            return StampedGradient(_ctc_backward(func, args, kwargs))
        plain, plain_kwargs = tree_map_only(PowerGradLogits, elem_of, (args, kwargs))
        if StampedGradient in types:
            return StampedGradient.__torch_dispatch__(func, types, plain, plain_kwargs)
        if func._schema.is_mutable:
            if torch.is_grad_enabled() and _writes_into_plain(func, args, kwargs):
                raise RuntimeError(
                    f"PGT: {func} writes logits into a plain tensor, which would lose PGT; use cat or stack"
                )
            out = func(*plain, **plain_kwargs)
            if isinstance(args[0], PowerGradLogits) and type(args[0].elem) is Tensor:
                torch.autograd.graph.increment_version(args[0].elem)  # what the head saved of its output is stale
            return _as_passed(out, (plain, plain_kwargs), (args, kwargs))
        logits = _the_logits(args, kwargs)

        def carry(tensor: Tensor) -> Tensor:
            keeps = tensor.is_floating_point() and tensor.dim() > 0
            return PowerGradLogits(tensor, logits.alpha, logits.regime) if keeps else tensor

        return tree_map_only(Tensor, carry, func(*plain, **plain_kwargs))


# --- where PGT acts


def _log_softmax_backward(grad: Tensor, output: PowerGradLogits, dim: int, dtype: torch.dtype) -> StampedGradient:
    grad = elem_of(grad)
    if output.regime == "plain":
        return StampedGradient(aten._log_softmax_backward_data(grad, output.elem, dim, dtype))
    if torch.is_grad_enabled():
        raise RuntimeError(
            "PGT: create_graph=True works where cross_entropy or log_softmax is called from Python in eager mode; "
            "here, call pgt_hf.powergrad_cross_entropy or pgt_hf.powergrad_log_softmax, and detach the handle"
        )
    flat = output.regime == "flat" and output.dtype.itemsize > 2
    return StampedGradient(log_softmax_backward(grad, output.elem, output.alpha, dim, is_log_probs=flat).to(dtype))


_CTC_BACKWARD = {aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor}


def _ctc_backward(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The derivative of CTC in the log-probabilities, ``-q``.

    torch returns ``softmax - q``, which leaves the log-softmax nothing to transform. Rows of impossible alignments,
    and rows past the end of a sequence, have no gradient.
    """
    args, kwargs = tree_map_only(_Wrapper, elem_of, (args, kwargs))
    grad, log_probs, _, input_lengths, _, losses, *_ = args
    out = func(*args, **kwargs)
    steps = torch.arange(log_probs.size(0), device=log_probs.device).view(-1, *[1] * (log_probs.dim() - 2))
    used = (steps < torch.as_tensor(input_lengths, device=log_probs.device)) & losses.isfinite()
    return out - torch.where(used, grad, 0).unsqueeze(-1) * log_probs.exp()


# --- the fast path: Python calls in eager mode


class _FastCrossEntropy(CrossEntropy):
    @staticmethod
    def forward(ctx: Any, logits: PowerGradLogits, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        outputs = CrossEntropy.forward(ctx, logits.elem, *args)
        if logits.elem.dtype.itemsize == 2:
            ctx.save_for_backward(logits, *args[:2])
            _note_version(ctx, logits.elem)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits, *rest = ctx.saved_tensors
        grad = CrossEntropy.gradient(ctx, grads, _open(ctx, logits), *rest)
        return _stamp(grad), None, None, None, None, None, None


class _FastLogSoftmax(LogSoftmax):
    @staticmethod
    def forward(ctx: Any, logits: PowerGradLogits, alpha: float, dim: int) -> PowerGradLogits:  # type: ignore[override]
        log_probs = PowerGradLogits(LogSoftmax.forward(ctx, logits.elem, alpha, dim), logits.alpha, logits.regime)
        ctx.save_for_backward(logits)
        _note_version(ctx, logits.elem)
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input = _open(ctx, *ctx.saved_tensors)
        grad = log_softmax_backward(unwrap(grad), input, ctx.alpha, ctx.dim)
        return _stamp(grad.to(input.dtype)), None, None


def _fast_cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not _is_plain_call(input, target, weight):
        return None
    check_cross_entropy(input.elem, target, weight, reduction, label_smoothing)
    if torch.is_autocast_enabled(input.elem.device.type):
        input, target, weight = under_autocast(input, target, weight)
    alpha = check_alpha(input.alpha)
    if not is_fast(target, weight, label_smoothing, alpha) or alpha == 1:
        return None
    return _FastCrossEntropy.apply(input, target, weight, alpha, ignore_index, reduction, label_smoothing)[0]


def _fast_log_softmax(input: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    dtype = kwargs.get("dtype")
    if args or dim is None or kwargs.keys() - {"dtype", "_stacklevel"} or not _is_plain_call(input):
        return None
    input = input if dtype is None else input.to(dtype)
    alpha = check_alpha(input.alpha)
    if not isinstance(alpha, float) or alpha == 1:
        return None
    return _FastLogSoftmax.apply(input, alpha, dim)


def _is_plain_call(input: Any, *others: Tensor | None) -> bool:
    return type(input) is PowerGradLogits and not any(isinstance(other, _Wrapper) for other in others)


_FAST: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.cross_entropy: _fast_cross_entropy,
    F.log_softmax: _fast_log_softmax,
    torch.log_softmax: _fast_log_softmax,
    torch.special.log_softmax: _fast_log_softmax,
    Tensor.log_softmax: _fast_log_softmax,
}


def unwrap(tensor: Tensor) -> Tensor:
    """The plain tensor inside, also under create_graph."""
    if not isinstance(tensor, _Wrapper):
        return tensor
    return _Convert.apply(tensor, elem_of, lambda grad: grad) if torch.is_grad_enabled() else tensor.elem


def _note_version(ctx: Any, elem: Tensor) -> None:
    """So that ``_open`` notices a change: through ``logits.detach()``, which is ``elem``, autograd would not."""
    ctx.saved, ctx.version = weakref.ref(elem), elem._version


def _open(ctx: Any, tensor: Tensor) -> Tensor:
    """What the forward pass has saved, plain; the derivative of a gradient made from logits is PGT's as well."""
    if not isinstance(tensor, PowerGradLogits):
        return tensor
    if tensor.elem is ctx.saved() and tensor.elem._version != ctx.version:
        raise RuntimeError(
            "PGT: one of the variables needed for gradient computation has been modified by an inplace operation: the "
            "logits were changed after the loss, perhaps through logits.detach(); use logits.detach().clone()"
        )
    return (
        _Convert.apply(tensor, elem_of, lambda grad: _stamp(unwrap(grad))) if torch.is_grad_enabled() else tensor.elem
    )


def _stamp(grad: Tensor) -> Tensor:
    return _Convert.apply(grad, StampedGradient, elem_of) if torch.is_grad_enabled() else StampedGradient(grad)


class _Convert(torch.autograd.Function):
    """Applies one conversion on the way down and another on the way up; both may be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, down: Callable[[Tensor], Tensor], up: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.up = up
        plain = elem_of(tensor)
        return down(plain.view_as(plain))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.up(grad), None, None


# --- ops that need care


_READS = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]

# Functions whose results leave torch, or that keep memory: they get the plain values.
_LEAVES_TORCH = {
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.share_memory_, Tensor.__dlpack__, Tensor.__dlpack_device__,
    torch._C._to_dlpack, Tensor.__reduce_ex__, Tensor.pin_memory,
}  # fmt: skip
_KEEP_ARGUMENTS = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.register_hook, Tensor.retain_grad,
    Tensor.requires_grad_, Tensor.__repr__,
}  # fmt: skip


def _shield(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Where a plain tensor with a gradient (a learnable scale) meets logits, what flows back to it has no stamp."""

    def shield(tensor: Tensor) -> Tensor:
        trained = tensor.requires_grad and not isinstance(tensor, _Wrapper)
        return _Convert.apply(tensor, elem_of, elem_of) if trained else tensor

    in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    written = args[: 1 if in_place else 0]
    rest, kwargs = tree_map_only(Tensor, shield, (args[len(written) :], kwargs))
    return (*written, *rest), kwargs


def _the_logits(args: Any, kwargs: Any) -> PowerGradLogits:
    """The first logits among the arguments; if there are several, they must have the same alpha."""
    first, *others = (value for value in tree_leaves((args, kwargs)) if isinstance(value, PowerGradLogits))
    for other in others:
        alphas = (first.alpha, other.alpha)
        readable = all(type(alpha) is Tensor and alpha.device.type == "cpu" for alpha in alphas)  # without waiting
        if alphas[0] is not alphas[1] and readable and alphas[0] != alphas[1]:
            raise RuntimeError(
                f"PGT: logits of two heads with alpha={first.alpha.item()} and alpha={other.alpha.item()} were "
                "combined; attach both with the same alpha, or detach one"
            )
    return first


def _as_passed(out: Any, plain: Any, wrapped: Any) -> Any:
    """A mutating op returns the very objects that the caller passed in."""
    passed = {id(p): w for p, w in zip(tree_leaves(plain), tree_leaves(wrapped), strict=True)}
    return tree_map_only(Tensor, lambda t: passed.get(id(t), t), out)


def _writes_into_plain(func: Any, args: Any, kwargs: Any) -> bool:
    if not any(isinstance(t, PowerGradLogits) and t.requires_grad for t in tree_leaves((args, kwargs))):
        return False  # metrics
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in ("self", "out"):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            if any(not isinstance(t, PowerGradLogits) and t.is_floating_point() for t in written):
                return True
    return False
