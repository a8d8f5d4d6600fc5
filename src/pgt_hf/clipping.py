"""Gradient clipping as an optimizer hook: by global norm, by value, or adaptively (AGC, Brock et al. 2021)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .guard import after_closure
from .limits import Number, OneOf

__all__ = ["CLIP_MODES", "ClipGradients", "check_clipping"]

CLIP_MODES = ("norm", "value", "agc")


def check_clipping(clip_mode: str | None, clip_value: float | None) -> None:
    """Raises TypeError or ValueError unless both are None, or a known mode comes with a positive value."""
    if clip_mode is None:
        if clip_value is not None:
            modes = ", ".join(CLIP_MODES)
            raise ValueError(f"clip_value must be None without a clip_mode (one of {modes}), got {clip_value!r}")
        return
    OneOf(CLIP_MODES).check("clip_mode", clip_mode)
    if clip_value is None:
        raise ValueError(f"clip_value must be a number above 0 for clip_mode {clip_mode!r}, got None")
    Number("(0, inf)").check("clip_value", clip_value)


class ClipGradients:
    """A step pre-hook: ``optimizer.register_step_pre_hook(ClipGradients("agc", 0.01, exclude=head_parameters))``.

    Args:
        clip_mode: "norm" (global norm), "value" (each element) or "agc" (each unit against its weight's norm).
        clip_value: The norm, the value, or AGC's factor lambda.
        exclude: Parameters that AGC does not clip, such as the head's; the other modes clip all.
    """

    def __init__(self, clip_mode: str, clip_value: float, exclude: Collection[Tensor] = ()) -> None:
        check_clipping(clip_mode, clip_value)
        self.clip_mode = clip_mode
        self.clip_value = clip_value
        self.exclude = {id(parameter) for parameter in exclude} if clip_mode == "agc" else set()

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        return after_closure(args, kwargs, lambda: self.clip(optimizer))

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients that the optimizer is about to use."""
        from timm.utils.clip_grad import dispatch_clip_grad

        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grad_scale = getattr(optimizer, "grad_scale", None)
        if grad_scale is not None:  # a fused optimizer unscales inside its step, which is after this hook
            for parameter in parameters:
                parameter.grad.div_(grad_scale.to(parameter.grad.device))
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        dispatch_clip_grad([p for p in parameters if id(p) not in self.exclude], self.clip_value, mode=self.clip_mode)
