"""The head's gate: logits leave with alpha, and a gradient that PGT has not acted on is an error.

A compiler traces the backward pass before it happens, so its gate cannot raise; it reports through the gradients of
two leaf tensors instead (``State``).
"""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from .functional import is_compiling
from .logits import PowerGradLogits, StampedGradient, elem_of, no_pgt, unwrap

__all__ = ["State", "TracedGate", "enter"]


def _regime(alpha: float) -> str:
    """alpha = 1 takes torch's own path; between 0 and 1, log-probabilities need no maximum taken off."""
    return "plain" if alpha == 1 else "flat" if 0 < alpha < 1 else "other"


class State:
    """What the gates of one attachment share: alpha, and the number of backward passes that came through.

    A compiled graph cannot count. Its gate gives a gradient to one of two leaf tensors instead: to alpha if the stamp
    was seen while the graph was traced, to ``border`` if the logits leave the graph and the stamp comes from outside.
    Hooks on the leaves count, so nothing waits for a device.
    """

    def __init__(self, alpha: float) -> None:
        self.enabled = True
        self.owned = False  # by an optimizer, whose life it shares
        self.folded = False  # alpha is in the head's weights: training on would apply it twice
        self.replaced = False  # by another optimizer of the same model
        self.calls = 0
        self.stepped: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # calls at its last step
        self.last_pass = -1
        self.value = torch.tensor(alpha, dtype=torch.float64)
        self.regime = _regime(alpha)
        self.graph_regime = self.regime  # one recompilation when alpha leaves 1, none when it returns to 1
        self.leaves = self._make_leaves(torch.float32, torch.device("cpu"))

    @property
    def alpha(self) -> float:
        """The exponent of the next forward pass."""
        return self.value.item()

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.value = torch.tensor(value, dtype=torch.float64)  # a new one: pending backward passes keep theirs
        self.leaves[0].detach().fill_(value)
        self.regime = _regime(value)
        if value != 1:
            self.graph_regime = self.regime

    def place(self, parameter: Tensor) -> None:
        """Keeps the leaves on the head's device: a CPU tensor in a graph on a GPU would prevent CUDA graphs."""
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if self.leaves[0].dtype != dtype or self.leaves[0].device != parameter.device:
            self.leaves = self._make_leaves(dtype, parameter.device)

    def count(self) -> None:
        """Counts each backward pass once, however often it comes through."""
        task = torch._C._current_graph_task_id()
        if task != self.last_pass or task == -1:
            self.calls, self.last_pass = self.calls + 1, task

    def _make_leaves(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        alpha = torch.tensor(self.alpha, dtype=dtype, device=device, requires_grad=True)
        border = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        alpha.register_post_accumulate_grad_hook(self._on_inside)
        border.register_post_accumulate_grad_hook(self._on_border)
        return alpha, border

    def _on_inside(self, leaf: Tensor) -> None:
        if leaf.grad is not None:  # torch also calls this for a leaf that got no gradient
            leaf.grad = None
            self.count()

    def _on_border(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            leaf.grad = None
            if StampedGradient.crossing != torch._C._current_graph_task_id():
                raise no_pgt("at the border of a compiled graph")
            self.count()

    def __getstate__(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "enabled": self.enabled and not self.owned, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["alpha"])  # type: ignore[misc]
        self.enabled, self.calls = state["enabled"], state["calls"]


def enter(output: Any, state: State) -> Any:
    """The head's output, with every floating-point tensor that requires a gradient turned into ``PowerGradLogits``.

    It searches pytrees, and the attributes of other objects, which it changes in place.
    """
    gate: Callable[[Tensor], Tensor] = lambda t: _Gate.apply(t, state)  # noqa: E731
    if is_compiling():
        leaves = state.leaves
        gate = lambda t: TracedGate.apply(t, *leaves, state.graph_regime)  # noqa: E731
    if isinstance(output, Tensor):  # the common case: no tree walk to trace
        return _enter_tensor(output, gate)
    seen: set[int] = set()

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _enter_tensor(leaf, gate)
        for name in _attributes(leaf) if id(leaf) not in seen else ():
            seen.add(id(leaf))
            object.__setattr__(leaf, name, tree_map(visit, getattr(leaf, name)))
        return leaf

    return tree_map(visit, output)


def _enter_tensor(value: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    if not (value.requires_grad and value.is_floating_point() and value.dim() > 0):
        return value
    if hasattr(value, "placements"):
        raise NotImplementedError(
            f"PGT: the logits are a DTensor with placements {value.placements}, as for loss_parallel; let the head "
            "return a whole local tensor: ColwiseParallel(output_layouts=Replicate(), use_local_output=True)"
        )
    return gate(value)


def _attributes(value: Any) -> list[str]:
    if isinstance(value, (type, torch.nn.Module)) or callable(value):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", ()))


class _Gate(torch.autograd.Function):
    """The gate in eager mode: gives out ``PowerGradLogits``, takes back a stamped gradient or raises."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, state: State) -> PowerGradLogits:
        ctx.state = state
        return PowerGradLogits(logits.detach(), state.value, state.regime)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if type(grad) is not StampedGradient:
            raise no_pgt(f"a {type(grad).__name__} of shape {tuple(grad.shape)}")
        ctx.state.count()
        return unwrap(grad), None


class TracedGate(torch.autograd.Function):
    """The gate inside a compiled graph, see ``State``: it handles tensors only, and never raises at run time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: Tensor, border: Tensor, regime: str) -> PowerGradLogits:
        ctx.like = {"dtype": alpha.dtype, "device": alpha.device}
        return PowerGradLogits(logits.view_as(logits), alpha.detach(), regime)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        here = torch.ones((), **ctx.like)
        if isinstance(grad, StampedGradient):
            return grad.elem, here, None, None
        return elem_of(grad), None, here, None
