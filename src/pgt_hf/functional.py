"""The mathematics of the PowerGrad Transform (PGT), in pure torch.

Cross-entropy's gradient at the logits ``z`` is ``s (softmax(z) - q)``. PGT leaves the value alone and replaces the
gradient by ``s (softmax(alpha z) - q)`` (Das et al., arXiv 2111.12495, Eq. 4; ``p^alpha`` normalised is
``softmax(alpha z)``). In other words, the derivative of log-softmax becomes ``g - softmax(alpha z) sum(g)``, and every
loss over a log-softmax follows. Everything else in the package calls this file.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext

from .limits import Number, Whole, check_type

__all__ = ["check_alpha", "powergrad_cross_entropy", "powergrad_linear_cross_entropy", "powergrad_log_softmax"]

_ROUNDED_TO_0 = 1e-44  # an alpha that float32 may not tell from 0
IGNORED = -100  # the label of what counts nowhere, torch's ignore_index


def powergrad_log_softmax(input: Tensor, dim: int = -1, *, alpha: float | Tensor) -> Tensor:
    """Log-softmax with the true value and PGT's gradient, ``g - softmax(alpha z) * sum(g)`` for an upstream ``g``.

    Any loss written on top of it (soft targets, distillation, a hand-written sum) becomes a PGT loss. It may be
    differentiated twice, and works under ``torch.func`` and ``torch.compile``.

    Args:
        input: Logits of any shape and floating dtype.
        dim: The dimension of the classes.
        alpha: ``0 <= alpha <= 1``, a number or a 0-dim tensor. 1 is ``torch.log_softmax`` bit for bit.

    Returns:
        Tensor of ``input``'s shape, in the dtype of ``torch.log_softmax``.

    Raises:
        TypeError: ``alpha`` is not a number, or ``input`` is not floating point.
        ValueError: ``alpha`` is negative or nan.

    Example:
        >>> z = torch.randn(8, 10, requires_grad=True)
        >>> q = torch.rand(8, 10).softmax(-1)
        >>> (-q * powergrad_log_softmax(z, alpha=0.25)).sum(-1).mean().backward()
    """
    alpha = check_alpha(alpha)
    _check_floating(input)
    if type(dim) is not int:
        Whole().check("dim", dim)
    if _is_one(alpha):
        return F.log_softmax(input, dim)
    return (_LogSoftmaxUnderFunctorch if is_functorch() else LogSoftmax).apply(input, alpha, dim)


def powergrad_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    alpha: float | Tensor,
) -> Tensor:
    r"""``torch.nn.functional.cross_entropy`` with PGT's gradient, ``s (softmax(alpha z) - q)``.

    The value is torch's own for the same arguments. ``q`` is the target distribution after smoothing and ``s`` all
    that stands upstream (1/N of the mean, class weights, a loss scale). Where class weights and smoothing or
    probabilities meet, ``q`` carries the weights ``w_c`` and ``softmax(alpha z)`` their total, so that each row still
    sums to 0. It may be differentiated twice, and works under ``torch.func`` and ``torch.compile``.

    Args:
        input: Logits, (C), (N, C) or (N, C, d1, ..., dK), floating.
        target: Class indices (int64), () or (N) or (N, d1, ..., dK); or class probabilities, of ``input``'s shape.
        weight: A weight for each class, (C).
        ignore_index: A class index that contributes neither to the value nor to the gradient.
        reduction: "none", "mean" or "sum", as torch defines them.
        label_smoothing: ``eps`` of ``q_y = 1 - eps + eps / C``, in [0, 1].
        alpha: ``0 <= alpha <= 1``, a number or a 0-dim tensor. 1 is torch's function bit for bit.

    Returns:
        A 0-dim tensor, or one of the target's index shape for ``reduction="none"``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has a value or a shape that is not allowed.

    Example:
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> target = torch.randint(10, (8,))
        >>> powergrad_cross_entropy(logits, target, alpha=0.25).backward()
        >>> torch.allclose(logits.grad, ((0.25 * logits).softmax(-1) - F.one_hot(target, 10)) / 8)
        True
    """
    alpha = check_alpha(alpha)
    check_cross_entropy(input, target, weight, reduction, label_smoothing)
    input, target, weight = under_autocast(input, target, weight)
    options = (ignore_index, reduction, label_smoothing)
    if _is_one(alpha):
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if is_fast(target, weight, label_smoothing, alpha):
        if is_compiling():
            return _TracedCrossEntropy.apply(input, target, weight, alpha, *options)
        return CrossEntropy.apply(input, target, weight, alpha, *options)[0]
    return _nll(powergrad_log_softmax(input, _class_dim(input), alpha=alpha), target, weight, *options)


def powergrad_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    alpha: float | Tensor,
    **kwargs: Any,
) -> Tensor:
    """Linear head and PGT cross-entropy in one, without keeping the logits: for large vocabularies.

    PGT's gradient is that of ``CE(alpha z) / alpha``, and ``alpha z`` is the head of ``alpha * input``: so this is
    ``torch.nn.functional.linear_cross_entropy`` of the scaled input, with its gradient divided by alpha. Any other
    fused loss becomes a PGT one in the same way, ``loss(alpha * input, weight, target) / alpha``.

    **The value is** ``CE(alpha z)``, **not the true loss**: no logits are kept to compute that one from.

    Args:
        input: Features, (N, H).
        linear_weight: The head's weight, (C, H).
        target: As for ``torch.nn.functional.linear_cross_entropy``.
        linear_bias: The head's bias, (C).
        alpha: ``0 < alpha <= 1``; there is no such loss at 0.
        **kwargs: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` and ``options`` of torch's function.
            Without ``options``, the logits of at least 128 rows are made at a time, as many as take the memory of the
            input where that is more. ``options=None`` makes all of them at once, which allows double backward; torch
            always does so with label smoothing.

    Raises:
        NotImplementedError: This torch has no ``linear_cross_entropy``.
        ValueError: ``alpha`` is 0, negative or nan.

    Example:
        >>> h, w = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> powergrad_linear_cross_entropy(h, w, torch.randint(100, (8,)), alpha=0.25).backward()
    """
    alpha = check_alpha(alpha)
    if isinstance(alpha, float) and alpha == 0:
        raise ValueError(
            "alpha must be above 0 for powergrad_linear_cross_entropy, got 0; use powergrad_cross_entropy"
        )
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(
            f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy; "
            "use powergrad_cross_entropy(F.linear(input, linear_weight, linear_bias), target, alpha=alpha)"
        )
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        check_type(name, tensor, Tensor)
    chunked = input.dim() == linear_weight.dim() == 2 and not target.is_floating_point()
    if "options" not in kwargs and chunked and not kwargs.get("label_smoothing"):
        rows = max(128, input.numel() // max(1, linear_weight.size(0)))
        kwargs["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    if _is_one(alpha):
        return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **kwargs)
    linear_bias = None if linear_bias is None else linear_bias * alpha
    loss = F.linear_cross_entropy(input * alpha, linear_weight, target, linear_bias=linear_bias, **kwargs)
    return _DividedGradient.apply(loss, alpha)


def check_alpha(alpha: float | Tensor, name: str = "alpha") -> float | Tensor:
    """Returns ``alpha`` as a float if it is a number >= 0 (with a warning above 1).

    A 0-dim tensor that cannot be read without breaking a graph or waiting for a device is returned as it is.

    Raises:
        TypeError: It is a bool, a string, or anything else that is not a number.
        ValueError: It is nan, negative or infinite, or a tensor with more than one element.
    """
    number: Any = alpha
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got a tensor of shape {tuple(alpha.shape)}")
        if not alpha.is_floating_point():
            raise TypeError(f"{name} must be a number in [0, 1], got a tensor of dtype {alpha.dtype}")
        if is_compiling() or alpha.device.type != "cpu" or is_functorch():
            return alpha
        number = alpha.item()
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        Number("[0, inf)").check(name, alpha)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must lie in [0, 1], got {number!r}")
    if is_compiling():  # it may be a symbol
        return number
    if number > 1:
        warnings.warn(
            f"{name} = {number} lies above 1: this sharpens p', the opposite of the paper's use", stacklevel=3
        )
    return float(number)


def log_softmax_backward(
    grad: Tensor, input: Tensor, alpha: float | Tensor, dim: int, is_log_probs: bool = False
) -> Tensor:
    """PGT itself: the gradient of log-softmax, ``g - softmax(alpha z) sum(g)``, in float32 at least.

    ``input`` may be the logits or their log-probabilities: a softmax does not see a shift. ``is_log_probs`` says that
    they are that and ``0 < alpha <= 1``: then ``sum p^alpha`` is at least 1 and needs no maximum taken off, which
    saves a compiler a pass.
    """
    input, grad = input.to(_wide(input)), grad.to(_wide(input))
    total = grad.sum(dim, keepdim=True)
    if type(input) is Tensor and not (is_compiling() or torch.is_grad_enabled() or _is_batched(grad)):
        powered = _scaled(input, alpha, may_be_masked=True)
        torch.softmax(powered, dim, out=powered)
        return torch.addcmul(grad, powered, total, value=-1, out=powered)
    return grad - _powered_softmax(input, alpha, dim, is_log_probs) * total


def _powered_softmax(input: Tensor, alpha: float | Tensor, dim: int, is_log_probs: bool = False) -> Tensor:
    """p' = softmax(alpha z), differentiable."""
    if is_log_probs:
        powers = _scaled(input, alpha, may_be_masked=False).exp()
        return powers / powers.sum(dim, keepdim=True)
    return torch.softmax(_scaled(input, alpha, may_be_masked=True), dim)


def _kept(input: Tensor, log_probs: Tensor) -> Tensor:
    """What the backward pass computes p' from: the log-probabilities, or the logits where half precision rounds them.

    A softmax does not see the difference.
    """
    return input if log_probs.dtype.itemsize == 2 else log_probs


def _is_flat(dtype: torch.dtype, alpha: float | Tensor) -> bool:
    """Whether the log-probabilities of such logits are exact and ``sum p^alpha`` is known to be at least 1."""
    return dtype.itemsize > 2 and isinstance(alpha, float) and 0 < alpha <= 1


def _scaled(input: Tensor, alpha: float | Tensor, may_be_masked: bool) -> Tensor:
    """alpha z. At alpha = 0, masked logits (-inf) would become nan; they stay masked."""
    if not isinstance(alpha, Tensor):
        scaled, may_be_masked = input * alpha, alpha < _ROUNDED_TO_0
    else:
        scaled = input * alpha.to(input.dtype)
    return torch.where(input == -torch.inf, input, scaled) if may_be_masked else scaled


class LogSoftmax(torch.autograd.Function):
    """``powergrad_log_softmax`` for autograd."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
        output = F.log_softmax(input, dim)
        LogSoftmax.keep(ctx, (input, alpha, dim), output)
        return output

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what ``backward`` needs."""
        input, ctx.alpha, ctx.dim = inputs
        ctx.dtype = input.dtype
        ctx.save_for_backward(_kept(input, output))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad = log_softmax_backward(grad_output, kept, ctx.alpha, ctx.dim, _is_flat(ctx.dtype, ctx.alpha))
        return grad.to(ctx.dtype), None, None


class _LogSoftmaxUnderFunctorch(LogSoftmax):
    """``torch.func`` asks for a separate ``setup_context``, which costs every other call 40 microseconds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, alpha: float | Tensor, dim: int) -> Tensor:  # type: ignore[override]
        return F.log_softmax(input, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        LogSoftmax.keep(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """The transpose of ``backward``, so that both modes have one derivative."""
        (input,) = ctx.saved_tensors
        powered = _powered_softmax(input.to(_wide(input)), ctx.alpha, ctx.dim)
        return (tangent - (powered * tangent).sum(ctx.dim, keepdim=True)).to(input.dtype)


class CrossEntropy(torch.autograd.Function):
    """Log-softmax and ``_nll`` in one, for eager mode: the log-probabilities become the gradient in their own memory.

    They are a second output, never handed to the caller, through which a second derivative finds its way back.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, alpha: float, *options: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.alpha, ctx.options, ctx.kept_by_hook = alpha, options, _are_hooks_active()
        ctx.set_materialize_grads(False)
        log_probs = F.log_softmax(input, _class_dim(input))
        ctx.save_for_backward(_kept(input, log_probs), target, weight)
        return _nll(log_probs, target, weight, *options), log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return CrossEntropy.gradient(ctx, grads, *ctx.saved_tensors), None, None, None, None, None, None

    @staticmethod
    def gradient(
        ctx: Any, grads: tuple[Tensor | None, ...], kept: Tensor, target: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The gradient of the logits, from those of the outputs and what ``forward`` saved."""
        grad_output, grad = grads
        dtype, wide = kept.dtype, kept.to(_wide(kept))
        if grad is not None:
            grad = log_softmax_backward(grad, wide, ctx.alpha, _class_dim(wide))
        if grad_output is not None:
            dim, out = _class_dim(wide), None
            if torch.is_grad_enabled() or _is_batched(grad_output):
                powered = _powered_softmax(wide, ctx.alpha, dim)
            else:
                shared = wide is kept and (ctx.kept_by_hook or _graph_is_kept())
                out = wide.clone() if shared else wide.detach()
                powered = torch.softmax(out.mul_(ctx.alpha), dim, out=out)
            of_value = _gradient(grad_output, powered, out, target, weight, *ctx.options)
            grad = of_value if grad is None else grad + of_value
        assert grad is not None
        return grad.to(dtype)


class _TracedCrossEntropy(torch.autograd.Function):
    """``CrossEntropy`` for a compiler, which finds memory by itself and takes no second derivative."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, alpha: float | Tensor, *options: Any
    ) -> Tensor:
        ctx.alpha, ctx.options = alpha, options
        log_probs = F.log_softmax(input, _class_dim(input))
        ctx.save_for_backward(_kept(input, log_probs), target, weight)
        return _nll(log_probs, target, weight, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, target, weight = ctx.saved_tensors
        wide, dim = kept.to(_wide(kept)), _class_dim(kept)
        powered = _powered_softmax(wide, ctx.alpha, dim, _is_flat(kept.dtype, ctx.alpha))
        grad = _gradient(grad_output, powered, None, target, weight, *ctx.options)
        return grad.to(kept.dtype), None, None, None, None, None, None


class _DividedGradient(torch.autograd.Function):
    """A tensor whose gradient is divided by ``alpha``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, alpha: float | Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.alpha, None


def is_fast(target: Tensor, weight: Tensor | None, label_smoothing: float, alpha: float | Tensor) -> bool:
    """Whether ``CrossEntropy``, or ``_TracedCrossEntropy`` in a compiler, takes it: the usual arguments."""
    if is_functorch() or not (is_compiling() or (isinstance(alpha, float) and alpha >= _ROUNDED_TO_0)):
        return False
    weighted = weight is not None and (target.is_floating_point() or label_smoothing > 0 or weight.requires_grad)
    return not (weighted or target.requires_grad)


def _nll(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """What ``F.cross_entropy`` computes after its log-softmax, in the same order of operations."""
    dim = _class_dim(log_probs)
    classes = log_probs.size(dim)
    shaped = None if weight is None else weight.view(-1, *[1] * (log_probs.dim() - dim - 1))
    if target.is_floating_point():
        if label_smoothing > 0:
            target = target * (1 - label_smoothing) + label_smoothing / classes
        products = log_probs * target if shaped is None else log_probs * target * shaped
        if reduction == "none":
            return -products.sum(dim)
        return -products.sum() / (log_probs.numel() / classes) if reduction == "mean" else -products.sum()
    loss = F.nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction=reduction)
    if label_smoothing == 0:
        return loss
    spread = -(log_probs if shaped is None else log_probs * shaped).sum(dim)
    valid = target != ignore_index
    spread = torch.where(valid, spread, 0)
    if reduction == "mean":
        index = torch.where(valid, target, 0).long()
        count = valid.sum() if weight is None else torch.where(valid, weight.take(index), 0).sum()
        spread = spread.sum() / count
    elif reduction == "sum":
        spread = spread.sum()
    return (1 - label_smoothing) * loss + spread * (label_smoothing / classes)


def _gradient(
    grad_output: Tensor,
    powered: Tensor,
    out: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """``s (m p' - q)`` with ``m = sum(q)``: in the memory of ``out``, or differentiable where that is None."""
    dim = _class_dim(powered)
    classes, scale = powered.size(dim), grad_output.to(powered.dtype)
    if target.is_floating_point():
        scale = scale.unsqueeze(dim) if reduction == "none" else scale
        scale = scale / (target.numel() / classes) if reduction == "mean" else scale
        mass = target.sum(dim, keepdim=True, dtype=scale.dtype)
        if label_smoothing > 0:
            mass = mass * (1 - label_smoothing) + label_smoothing
        grad = torch.mul(powered, mass * scale, out=out).addcmul_(target, scale * (label_smoothing - 1))
    else:
        index = target.long()  # in uint8, -100 would be 156
        valid = index != ignore_index
        index = torch.where(valid, index, 0)
        share: Tensor = valid if weight is None else torch.where(valid, weight.to(scale.dtype).take(index), 0)
        scale = scale / share.sum() if reduction == "mean" else scale
        # An ignored row gets 0 even where the mean is over nothing and the scale infinite.
        scale = torch.where(valid, scale if weight is None else scale * share, 0).unsqueeze(dim)
        grad = torch.mul(powered, scale, out=out)
    if label_smoothing > 0:
        grad.sub_(scale * (label_smoothing / classes))
    if not target.is_floating_point():  # last, so that a compiler makes one pass of all before
        grad.scatter_add_(dim, index.unsqueeze(dim), scale * (label_smoothing - 1))
    return grad


def _graph_is_kept() -> bool:
    """Whether ``retain_graph=True`` may ask for this gradient once more."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _are_hooks_active() -> bool:
    """Whether hooks see, and may keep, what is saved for the backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _is_batched(grad: Tensor) -> bool:
    """Under ``vmap``, or ``torch.autograd.grad(..., is_grads_batched=True)``: nothing may be written in place."""
    return is_functorch() or torch._C._functorch.is_legacy_batchedtensor(grad)


def is_compiling() -> bool:
    """Whether a compiler traces this; on torch 2.9 and 2.10, torch's own word is false where it propagates shapes."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def is_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def _is_one(alpha: float | Tensor) -> bool:
    """alpha = 1 takes torch's own path; a tensor that cannot be read does not."""
    return isinstance(alpha, float) and alpha == 1


def _check_floating(input: Tensor) -> None:
    check_type("input", input, Tensor)
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating point tensor of logits, got dtype {input.dtype}")


def under_autocast(*tensors: Tensor | None) -> Iterator[Any]:
    """What cross-entropy computes with: under autocast, half precision becomes float32."""
    for tensor in tensors:
        if tensor is None or tensor.dtype not in (torch.float16, torch.bfloat16):
            yield tensor
        else:
            yield tensor.float() if torch.is_autocast_enabled(tensor.device.type) else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> None:
    _check_floating(input)
    check_type("target", target, Tensor)
    if weight is not None:
        check_type("weight", weight, Tensor)
        if not weight.is_floating_point():
            raise TypeError(f"weight must be a floating point tensor, got dtype {weight.dtype}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        Number("[0, 1]").check("label_smoothing", label_smoothing)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if input.dim() == 0:
        raise ValueError("input must have shape (C), (N, C) or (N, C, d1, ...), got ()")
    dim = _class_dim(input)
    if weight is not None and weight.shape != (input.size(dim),):
        raise ValueError(f"weight must have shape ({input.size(dim)},), one per class, got {tuple(weight.shape)}")
    index_shape = input.shape[:dim] + input.shape[dim + 1 :]
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target of class probabilities must have input's shape {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"target must hold class indices (int64) or class probabilities (floating), got {target.dtype}"
        )
    elif target.shape != index_shape:
        raise ValueError(
            f"target of class indices must have shape {tuple(index_shape)} for input {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
