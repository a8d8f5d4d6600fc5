"""The optimizer factory: every timm optimizer with the prefix ``powergrad_``.

PGT acts on the logits, not in the step: ``powergrad_sgd`` is timm's ``sgd`` plus a transform on the model that lives
as long as the optimizer. ``param_groups`` hold alpha as ``powergrad_alpha``, next to lr.
"""

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .attach import PowerGradHandle, attach_powergrad, release_powergrad
from .clipping import ClipGradients, check_clipping
from .functional import check_alpha
from .gate import State
from .guard import ALPHA_KEY, INITIAL_KEY, guard_copies
from .heads import Head, last_linear
from .limits import Number, check_type, checked, near, rule_for

__all__ = ["DEFAULT_ALPHA", "PREFIX", "AlphaGroup", "bind_powergrad", "create_optimizer", "list_optimizers"]

PREFIX = "powergrad_"
DEFAULT_ALPHA = 0.25
# Ranges of common options. torch and timm accept most values outside, and training then diverges.
_RULES = {
    "lr": Number("[0, inf)"),
    "weight_decay": Number("[0, inf)"),
    "momentum": Number("[0, 1)"),
    "dampening": Number("[0, 1]"),
    "betas": rule_for(list[Annotated[float, Number("[0, 1)")]]),
    "eps": Number("[0, inf)"),
    "layer_decay": Number("(0, 1]"),
    "layer_decay_min_scale": Number("[0, 1]"),
    "alpha": Number("[0, 1]"),
    "lr_decay": Number("[0, inf)"),
    "rho": Number("[0, 1)"),
}

_hooks: "weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]]" = weakref.WeakKeyDictionary()


def create_optimizer(
    model: nn.Module,
    opt: str = "powergrad_sgd",
    lr: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    clip_mode: str | None = None,
    clip_value: float | None = None,
    head: Head | None = None,
    **kwargs: Any,
) -> Optimizer:
    """``timm.optim.create_optimizer_v2`` plus the PowerGrad Transform on ``model``.

    Works with ``accelerator.prepare`` like any optimizer. A second optimizer for the same model replaces the first
    one's transform; the transform ends with its optimizer.

    Args:
        model: The model to train; timm groups its parameters (no weight decay on biases and norms). For parameter
            groups of your own, see ``bind_powergrad``.
        opt: ``"powergrad_"`` plus a timm name, see ``list_optimizers()``.
        lr: Learning rate.
        alpha: ``0 <= alpha <= 1``; 1 is plain training.
        clip_mode: Clip before each step by "norm", "value" or "agc" (adaptive, without the head); None is off.
        clip_value: The bound that ``clip_mode`` needs.
        head: The module or modules that compute the logits, see ``attach_powergrad``.
        **kwargs: Passed to timm: ``momentum``, ``weight_decay``, ``layer_decay``, ``nesterov``, ...

    Returns:
        A ``torch.optim.Optimizer``. Its ``powergrad`` attribute is the handle.

    Raises:
        TypeError, ValueError: An option is not allowed, the optimizer's name is unknown, or ``model`` is not a model.
        RuntimeError: PGT is already attached to the model by hand.

    Example:
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> optimizer = create_optimizer(model, "powergrad_sgd", lr=0.1, alpha=0.25, nesterov=True, weight_decay=5e-4)
    """
    from timm.optim import create_optimizer_v2

    check_alpha(alpha)
    check_clipping(clip_mode, clip_value)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}: PGT acts on the model's logits, so "
            "parameters are not enough; create the optimizer with timm or torch, then call "
            "bind_powergrad(optimizer, model)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model must have parameters to train, got a {type(model).__name__} with none")
    name = _base_name(opt)
    options = allowed_options(opt)
    for key, value in {"lr": lr, **kwargs}.items():
        if key in options:
            check_option(key, value, options[key].default)
        elif key != "param_group_fn":
            known = ", ".join(sorted(options))
            raise TypeError(f"{key} must be an option of {opt!r}, got {value!r}{near(key, options)}; it takes {known}")
    if kwargs.get("momentum") == 0 and "nesterov" in options:
        kwargs.setdefault("nesterov", False)  # timm's default, True, needs a momentum
    optimizer = create_optimizer_v2(model, opt=name, lr=lr, **kwargs)
    return bind_powergrad(optimizer, model, alpha=alpha, clip_mode=clip_mode, clip_value=clip_value, head=head)


def bind_powergrad(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    alpha: float = DEFAULT_ALPHA,
    clip_mode: str | None = None,
    clip_value: float | None = None,
    head: Head | None = None,
) -> Optimizer:
    """Attaches PGT to ``model`` for the life of any ``optimizer``; see ``create_optimizer`` for the rest."""
    check_clipping(clip_mode, clip_value)
    stepped = _stepped(optimizer)
    check_type("model", model, nn.Module)
    own = {id(parameter) for parameter in model.parameters()}
    whole = not type(model).__module__.startswith("deepspeed")  # which keeps flat copies of the parameters
    if own and whole and not any(id(each) in own for group in stepped.param_groups for each in group["params"]):
        raise ValueError(
            f"optimizer must train parameters of the model, got a {type(stepped).__name__} of others alone"
        )
    release_powergrad(model)
    handle = attach_powergrad(model, alpha, head)
    handle.state.owned = True
    for hook in _hooks.pop(stepped, []):  # of an earlier binding of the same optimizer
        hook.remove()
    _keep_out_of_graphs(stepped)
    link = _Link(handle, stepped)
    for each in {id(each): each for each in (optimizer, stepped)}.values():
        each.powergrad = handle  # type: ignore[attr-defined]
    _hooks[stepped] = [
        stepped.register_step_pre_hook(link.adopt),
        stepped.register_state_dict_post_hook(_take_out),
        stepped.register_load_state_dict_pre_hook(link.before_load),
        stepped.register_load_state_dict_post_hook(link.after_load),
    ]
    if clip_mode is not None and clip_value is not None:
        exclude = [parameter for layer in last_linear(model) for parameter in layer.parameters()]
        _hooks[stepped].append(stepped.register_step_pre_hook(ClipGradients(clip_mode, clip_value, exclude)))
    weakref.finalize(stepped, handle.remove)
    return optimizer


@checked
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
    if "momentum" not in inspect.signature(optimizer_class.__init__).parameters:
        del options["momentum"]  # timm's factory takes it for every optimizer, in vain for most
    return options


def check_option(name: str, value: Any, default: Any) -> None:
    """Raises TypeError or ValueError for an option of a wrong type or out of its range."""
    if isinstance(default, bool):
        rule_for(bool).check(name, value)
    elif value is not None and (name in _RULES or isinstance(default, (int, float))):
        _RULES.get(name, Number()).check(name, value)
        if isinstance(default, tuple) and len(value) != len(default):
            raise ValueError(f"{name} must be {len(default)} numbers, got {value!r}")


class AlphaGroup(dict[str, Any]):
    """A param group with a live alpha: writing to ``powergrad_alpha`` acts in the next forward pass.

    The transform has one alpha, so writing to one group writes to all. A copied or unpickled group has no transform.
    """

    def __init__(self, items: Mapping[str, Any], link: "_Link | None" = None) -> None:
        super().__init__(items)
        self.link = link

    @property
    def state(self) -> State | None:
        """The transform's state; None for a copy."""
        return None if self.link is None else self.link.handle.state

    def __setitem__(self, key: str, value: Any) -> None:
        if key == ALPHA_KEY and self.link is not None:
            self.link.handle.alpha = value
        else:
            super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "AlphaGroup":  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return _copied_group, (dict(self),)


def _copied_group(items: dict[str, Any]) -> AlphaGroup:
    guard_copies()
    return AlphaGroup(items)


class _Link:
    """Keeps alpha the same in an optimizer's param groups and in the handle, and loads it from a state dict."""

    keep_asked = False  # whether the alpha that was asked for wins over another one in a state dict

    def __init__(self, handle: PowerGradHandle, optimizer: Optimizer) -> None:
        self.handle = handle
        self.optimizer = weakref.ref(optimizer)
        self.asked = handle.alpha
        self.loaded: dict[str, float] = {}
        handle.on_change = self.write
        self.write(handle.alpha)

    def write(self, alpha: float) -> None:
        """Puts alpha into every group, and makes the groups live."""
        optimizer = self.optimizer()
        for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
            if not isinstance(group, AlphaGroup) or group.link is not self:
                group = optimizer.param_groups[i] = AlphaGroup(group, self)  # type: ignore[union-attr]
            dict.__setitem__(group, ALPHA_KEY, alpha)

    def adopt(self, optimizer: Optimizer, *_: Any) -> None:
        """Step pre-hook: makes added or replaced groups live, and takes over their alpha."""
        if all(isinstance(group, AlphaGroup) for group in optimizer.param_groups):
            return
        for group in optimizer.param_groups:
            if not isinstance(group, AlphaGroup):
                self.handle.alpha = group.get(ALPHA_KEY, self.handle.alpha)
        self.write(self.handle.alpha)

    def before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups", [])
        found = {group[ALPHA_KEY] for group in groups if ALPHA_KEY in group}
        if len(found) > 1:
            raise ValueError(f"all param groups must share one {ALPHA_KEY}, the state dict has {sorted(found)}")
        self.loaded = {key: state_dict[key] for key in (ALPHA_KEY, INITIAL_KEY) if key in state_dict}

    def after_load(self, optimizer: Optimizer) -> None:
        """Continues with the alpha of the state dict, as with its learning rate, unless ``keep_asked``."""
        alpha = self.loaded.get(ALPHA_KEY, optimizer.param_groups[0].get(ALPHA_KEY, self.handle.alpha))
        initial = self.loaded.get(INITIAL_KEY, alpha)
        if initial != self.asked:
            used, other = (self.asked, initial) if self.keep_asked else (alpha, self.asked)
            warnings.warn(
                f"the optimizer's state was saved with alpha={initial}, but alpha={self.asked} was asked for: this "
                f"run continues with alpha={used}, not {other}; set optimizer.powergrad.alpha to change it",
                stacklevel=2,
            )
            if self.keep_asked:
                alpha = initial = self.asked
        for group in optimizer.param_groups:
            group.pop(ALPHA_KEY, None)
            if INITIAL_KEY in self.loaded:
                group[INITIAL_KEY] = initial
        self.handle.alpha = alpha
        self.write(self.handle.alpha)


def keep_asked_alpha(optimizer: Optimizer) -> None:
    """Lets this optimizer's alpha, which was asked for, win over that of a checkpoint."""
    group: Any = _stepped(optimizer).param_groups[0]
    group.link.keep_asked = True


def _keep_out_of_graphs(optimizer: Optimizer) -> None:
    """Lets ``torch.compile`` break its graph at the step: it cannot trace ``AlphaGroup`` or the hooks."""
    base = type(optimizer)
    if not hasattr(base, "without_pgt"):
        disabled = torch.compiler.disable(base.step)

        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:  # torch 2.9 compiles a disabled method unbound
            return disabled(self, *args, **kwargs)

        step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again
        members = {
            "step": step,
            "without_pgt": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__reduce__": lambda self: (_new_optimizer, (base,), self.__getstate__()),  # type: ignore[attr-defined]
        }
        optimizer.__class__ = type(base.__name__, (base,), members)


def _new_optimizer(base: type[Optimizer]) -> Optimizer:
    return base.__new__(base)


def _take_out(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Moves alpha out of the groups of a state dict, where a plain optimizer would load and keep it."""
    for key in (ALPHA_KEY, INITIAL_KEY):
        for group in state_dict["param_groups"]:
            if key in group:
                state_dict[key] = group.pop(key)


def _stepped(optimizer: Any) -> Optimizer:
    """The optimizer whose ``step`` torch's hooks see, inside timm's Lookahead, Accelerate's wrapper and the like."""
    inner = optimizer
    for name in ("optimizer", "_base_optimizer", "base_optimizer", "base"):
        while isinstance(getattr(inner, name, None), Optimizer):
            inner = getattr(inner, name)
    check_type("optimizer", inner, Optimizer)
    return inner  # type: ignore[no-any-return]


def _base_name(opt: str) -> str:
    names = list_optimizers()
    base = opt.removeprefix(PREFIX) if isinstance(opt, str) else ""
    if not isinstance(opt, str) or not opt.startswith(PREFIX) or PREFIX + base.removeprefix("lookahead_") not in names:
        close = near(f"{PREFIX}{base}", names) or f"; such as {', '.join(names[:6])}"
        raise ValueError(f"opt must be '{PREFIX}' and the name of a timm optimizer, got {opt!r}{close}")
    return base
