"""The mathematics of the PowerGrad Transform (PGT), in pure torch.

Cross-entropy's gradient at the logits ``z`` is ``s (softmax(z) - q)``. PGT leaves the value alone and replaces the
gradient by ``s (softmax(alpha z) - q)`` (Das et al., arXiv 2111.12495, Eq. 4; ``p^alpha`` normalised is
``softmax(alpha z)``). Everything else in the package calls this file.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_alpha", "powergrad_cross_entropy", "powergrad_linear_cross_entropy", "powergrad_log_softmax"]


def powergrad_log_softmax(input: Tensor, dim: int = -1, *, alpha: float | Tensor) -> Tensor:
    """Log-softmax with the true value and PGT's gradient, ``g - softmax(alpha z) * sum(g)`` for an upstream ``g``.

    Any loss written on top of it (soft targets, distillation, CTC, a hand-written sum) becomes a PGT loss.

    Args:
        input: Logits of any shape and floating dtype.
        dim: The dimension of the classes.
        alpha: ``0 <= alpha <= 1``, a number or a 0-dim tensor. 1 is ``torch.log_softmax`` bit for bit.

    Returns:
        Tensor of ``input``'s shape and dtype (float32 under autocast, as torch does).

    Raises:
        TypeError: ``alpha`` is no number, or ``input`` is not floating point.
        ValueError: ``alpha`` is negative or nan.

    Example:
        >>> z = torch.randn(8, 10, requires_grad=True)
        >>> q = torch.rand(8, 10).softmax(-1)
        >>> (-q * powergrad_log_softmax(z, alpha=0.25)).sum(-1).mean().backward()
    """
    alpha = check_alpha(alpha)
    input = _prepare(input)
    if _is_plain(alpha):
        return F.log_softmax(input, dim)
    return _LogSoftmax.apply(input, alpha, dim)


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
    sums to 0.

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
    input = _prepare(input)
    _check_cross_entropy(input, target, weight, reduction, label_smoothing)
    if _is_plain(alpha):
        return F.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    reuse = not target.is_floating_point() and label_smoothing == 0 and _may_reuse_buffers(input)
    buffers: list[Tensor] | None = [] if reuse else None
    return _CrossEntropy.apply(input, target, weight, alpha, ignore_index, reduction, label_smoothing, buffers)


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

    **The value is** ``CE(alpha z)``, **not the true loss**: no logits are kept to take that one from.

    Args:
        input: Features, (N, H).
        linear_weight: The head's weight, (C, H).
        target: As for ``torch.nn.functional.linear_cross_entropy``.
        linear_bias: The head's bias, (C).
        alpha: ``0 < alpha <= 1``; at 0 there is no such loss.
        **kwargs: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` and ``options`` of torch's function.
            Without ``options``, the logits of at least 128 rows are made at a time, as many as take the memory of the
            input where that is more. ``options=None`` makes all of them at once, which allows double backward; torch
            always does so where there is label smoothing.

    Raises:
        NotImplementedError: This torch has no ``linear_cross_entropy``.
        ValueError: ``alpha`` is 0, negative or nan.

    Example:
        >>> h, w = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> powergrad_linear_cross_entropy(h, w, torch.randint(100, (8,)), alpha=0.25).backward()
    """
    alpha = check_alpha(alpha)
    if not torch.compiler.is_compiling() and alpha == 0:
        raise ValueError(
            "alpha must be above 0 for powergrad_linear_cross_entropy, got 0; use powergrad_cross_entropy"
        )
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(
            f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy; "
            "use powergrad_cross_entropy(F.linear(input, linear_weight, linear_bias), target, alpha=alpha)"
        )
    chunked = input.dim() == linear_weight.dim() == 2 and not target.is_floating_point()
    if "options" not in kwargs and chunked and not kwargs.get("label_smoothing"):
        rows = max(128, input.numel() // max(1, linear_weight.size(0)))
        kwargs["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    if _is_plain(alpha):
        return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **kwargs)
    linear_bias = None if linear_bias is None else linear_bias * alpha
    loss = F.linear_cross_entropy(input * alpha, linear_weight, target, linear_bias=linear_bias, **kwargs)
    scaled = loss / alpha
    return scaled + (loss - scaled).detach()  # the value of the one, the gradient of the other


def check_alpha(alpha: float | Tensor) -> float | Tensor:
    """Returns ``alpha`` if it is one: a number >= 0 (a warning above 1), or a 0-dim tensor.

    Raises:
        TypeError: It is a bool, a string, or anything else that is no number.
        ValueError: It is nan, negative or infinite, or a tensor with more than one element.
    """
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0:
            raise ValueError(f"alpha must be a number or a 0-dim tensor, got a tensor of shape {tuple(alpha.shape)}")
        return alpha  # checked where it was set; reading it here would break a graph or wait for a device
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a number in [0, 1], got {alpha!r} of type {type(alpha).__name__}")
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    if alpha > 1:
        warnings.warn(f"alpha = {alpha} lies above 1: this sharpens p', the opposite of the paper's use", stacklevel=3)
    return float(alpha)


def _powered_softmax(input: Tensor, alpha: float | Tensor, dim: int, buffers: list[Tensor] | None = None) -> Tensor:
    """p' = softmax(alpha z), in float32 at least: half precision would round alpha z before the exponential.

    ``buffers`` may hold log p, which serves as z (a softmax does not see a shift) and is overwritten.
    """
    if buffers and not torch.is_grad_enabled():
        log_probs = buffers.pop()
        return torch.softmax(log_probs.mul_(alpha), dim, out=log_probs)
    dtype = torch.promote_types(input.dtype, torch.float32)
    return torch.softmax(input.to(dtype) * alpha, dim)


class _LogSoftmax(torch.autograd.Function):
    """Saves the input, not the output, so that p' is exact in half precision and double backward is right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
        return F.log_softmax(input, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.alpha, ctx.dim = inputs
        ctx.save_for_backward(input, *_tensors(ctx.alpha))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *alpha = ctx.saved_tensors
        powered = _powered_softmax(input, alpha[0] if alpha else ctx.alpha, ctx.dim)
        grad_output = grad_output.to(powered.dtype)
        grad = torch.addcmul(grad_output, powered, grad_output.sum(ctx.dim, keepdim=True), value=-1)
        return grad.to(input.dtype), None, None


class _CrossEntropy(torch.autograd.Function):
    """Value: torch's. Gradient: ``s (m p' - q)``, with q the weighted target and m = sum_c q_c (1 without weights)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        alpha: float | Tensor,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        buffers: list[Tensor] | None,
    ) -> Tensor:
        if buffers is not None:
            # What F.cross_entropy does, with the log-softmax kept for the backward pass to turn into the gradient.
            buffers.append(F.log_softmax(input, _class_dim(input)))
            return F.nll_loss(buffers[0], target, weight, ignore_index=ignore_index, reduction=reduction)
        return F.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, weight, ctx.alpha, ctx.ignore_index, ctx.reduction, ctx.label_smoothing, ctx.buffers = inputs
        ctx.has_weight = weight is not None
        ctx.save_for_backward(input, target, *_tensors(weight), *_tensors(ctx.alpha))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, *rest = ctx.saved_tensors
        weight = rest.pop(0) if ctx.has_weight else None
        alpha = rest.pop(0) if rest else ctx.alpha
        dim = _class_dim(input)
        classes = input.size(dim)
        smooth = ctx.label_smoothing / max(classes, 1)
        powered = _powered_softmax(input, alpha, dim, ctx.buffers)
        grad_output = grad_output.to(powered.dtype)
        if weight is not None:
            weight = weight.to(powered.dtype)
            shaped_weight = weight.view(-1, *[1] * (input.dim() - dim - 1))

        if target.is_floating_point():
            scale = grad_output.unsqueeze(dim) if ctx.reduction == "none" else grad_output
            if ctx.reduction == "mean":
                scale = scale / (target.numel() / classes)
            q = target.to(powered.dtype) * (1 - ctx.label_smoothing) + smooth
            q = q if weight is None else q * shaped_weight
            grad_target = None
            if ctx.needs_input_grad[1]:
                log_probs = F.log_softmax(input.to(powered.dtype), dim)
                grad_target = -scale * (1 - ctx.label_smoothing) * log_probs
                grad_target = (grad_target if weight is None else grad_target * shaped_weight).to(target.dtype)
            grad = (powered * q.sum(dim, keepdim=True) - q) * scale
            return grad.to(input.dtype), grad_target, None, None, None, None, None, None

        valid = target != ctx.ignore_index
        index = torch.where(valid, target, 0).long()
        row_weight = valid.to(powered.dtype) if weight is None else torch.where(valid, weight[index], 0)
        scale = grad_output if ctx.reduction != "mean" else grad_output / row_weight.sum()
        # An ignored row gets 0 even where the mean is over nothing and the scale infinite.
        scale = torch.where(valid, scale, 0).unsqueeze(dim)
        hit = row_weight.unsqueeze(dim) * (1 - ctx.label_smoothing)
        if ctx.label_smoothing == 0:
            # In place, one pass: (p' - onehot) * (w_y * s). Under create_graph softmax's own backward needs its
            # output.
            powered = powered.clone() if torch.is_grad_enabled() else powered
            grad = powered.scatter_add_(dim, index.unsqueeze(dim), -torch.ones_like(hit)).mul_(hit * scale)
        else:
            q = torch.full_like(powered, smooth) if weight is None else (smooth * shaped_weight).expand_as(powered)
            q = q.scatter_add(dim, index.unsqueeze(dim), hit)
            grad = (powered * q.sum(dim, keepdim=True) - q) * scale
        return grad.to(input.dtype), None, None, None, None, None, None, None


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else ()


def _is_plain(alpha: float | Tensor) -> bool:
    """alpha = 1 takes torch's own path. A tensor is not read under compilation, which would break the graph."""
    if isinstance(alpha, Tensor):
        if torch.compiler.is_compiling() or alpha.device.type != "cpu":
            return False
        alpha = alpha.item()
    return alpha == 1


def _may_reuse_buffers(input: Tensor) -> bool:
    """In eager mode, where log p is as exact as z: a compiler plans its own memory, vmap has no in-place softmax."""
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    return eager and input.dtype in (torch.float32, torch.float64)


def _prepare(input: Tensor) -> Tensor:
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating point tensor of logits, got dtype {input.dtype}")
    if torch.is_autocast_enabled(input.device.type):
        return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input  # as autocast does for CE
    return input


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if input.dim() == 0:
        raise ValueError("input must have shape (C), (N, C) or (N, C, d1, ...), got a 0-dim tensor")
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
