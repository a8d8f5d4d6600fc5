"""Makes ``optim="powergrad_sgd"`` known to a plain ``transformers.Trainer``, from Python and the command line.

Trainer has no public way to add optimizer names, so this changes two private tables of transformers: the enum
that ``TrainingArguments.optim`` is checked against, and the handlers that turn a name into an optimizer.
"""

import ast
import functools
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames, TrainingArguments

from ..attach import release_powergrad
from ..limits import near
from ..optim import PREFIX, allowed_options, check_option, create_optimizer, keep_asked_alpha

# Listed rather than asked from timm, whose import would make `import pgt_hf` slow.
_NAMES = """
    sgd momentum sgdw adam adamw nadam nadamw radam adabelief adafactor adagrad adan adopt lamb lars lion madgrad muon
    rmsprop rmsproptf
"""
# Options of ``create_optimizer`` that arguments of their own set, and that the records of a run read from there.
SET_ELSEWHERE = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "alpha": "alpha",
    "clip_mode": "clip_mode",
    "clip_value": "clip_value",
    "head": "powergrad_head",
}
TRAINER_OPTIMIZERS = tuple(PREFIX + name for name in _NAMES.split())


def register() -> None:
    """Adds the names to transformers; harmless when called twice."""
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    for name, handler in list(handlers.items()):
        if not isinstance(handler, functools.partial):
            handlers[name] = functools.partial(_plain, handler)
    for name in TRAINER_OPTIMIZERS:
        handlers[_add_member(name)] = functools.partial(_powergrad, name)
    trainer_optimizer._parse_optim_args = _split
    if (trainer := sys.modules.get("transformers.trainer")) is not None:
        trainer._parse_optim_args = _split  # type: ignore[attr-defined]


def parse_optim_args(
    opt: str, optim_args: str | dict[str, str] | None, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Turns ``optim_args`` into values of the types that the optimizer's options have.

    Args:
        opt: The optimizer.
        optim_args: ``key=value,...``, or the pairs.
        elsewhere: Options that arguments of their own set, by those arguments.

    Raises:
        ValueError: It is not ``key=value,...``, a key is unknown for this optimizer, or a value is not allowed.
    """
    allowed = allowed_options(opt)
    values: dict[str, Any] = {}
    for key, text in (optim_args if isinstance(optim_args, dict) else _split(optim_args)).items():
        if key in elsewhere:
            raise ValueError(f"optim_args must leave out {key}, which {elsewhere[key]} sets, got {key}={text}")
        if key not in allowed:
            known = ", ".join(sorted(set(allowed) - set(elsewhere)))
            raise ValueError(
                f"optim_args: {opt!r} has no option {key!r}, got {key}={text}{near(key, allowed)}; it takes {known}"
            )
        values[key] = value = _parse_value(text)
        try:
            check_option(key, value, allowed[key].default)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optim_args: {error}") from error
    if values.get("nesterov") and (values.get("momentum") == 0 or values.get("dampening")):
        raise ValueError(
            f"optim_args: nesterov must be false without momentum, and with dampening, got {optim_args!r}"
        )
    return values


def _powergrad(name: str, context: Any) -> tuple[Callable[[], Callable[..., Any]], dict[str, Any]]:
    """Handler: Trainer calls the first item, and what that returns with the model and the second."""
    args = context.args
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    allowed = allowed_options(name)
    # Trainer's Adam flags apply if the user changed them; else the optimizer's own defaults do (LAMB's eps, say).
    defaults = TrainingArguments.__dataclass_fields__
    if args.adam_epsilon != defaults["adam_epsilon"].default and "eps" in allowed:
        options["eps"] = args.adam_epsilon
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != (defaults["adam_beta1"].default, defaults["adam_beta2"].default) and "betas" in allowed:
        options["betas"] = betas
    elsewhere = dict(SET_ELSEWHERE)
    if hasattr(args, "powergrad_options"):
        options |= args.powergrad_options()
    else:  # plain TrainingArguments, which have no other place for them
        elsewhere = {key: elsewhere[key] for key in ("lr", "weight_decay")}
    given = getattr(args, "alpha_given", False) or "alpha" in context.optim_args
    options |= parse_optim_args(name, context.optim_args, elsewhere)
    return (lambda: _create_asked if given else create_optimizer), {"opt": name, **options}


def _create_asked(model: Any, **options: Any) -> Any:
    """For an alpha that the user gave: a resumed run uses it, whatever the checkpoint was trained with."""
    optimizer = create_optimizer(model, **options)
    keep_asked_alpha(optimizer)
    return optimizer


def _plain(handler: Callable[[Any], Any], context: Any) -> Any:
    """Removes PGT from a model that is handed to a plain optimizer."""
    if context.model is not None:
        release_powergrad(context.model)
    return handler(context)


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _add_member(value: str) -> OptimizerNames:
    if value in OptimizerNames._value2member_map_:
        return OptimizerNames(value)
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_, member._value_, member.__objclass__ = name, value, OptimizerNames  # type: ignore[attr-defined]
    member._sort_order_ = len(OptimizerNames)  # type: ignore[attr-defined]
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    type.__setattr__(OptimizerNames, name, member)
    return member


def _split(optim_args: str | None) -> dict[str, str]:
    values: dict[str, str] = {}
    # A comma inside brackets belongs to a value: betas=(0.9,0.95).
    for item in re.split(r",(?![^(\[]*[)\]])", optim_args.replace(" ", "")) if optim_args else []:
        key, *rest = item.split("=")
        if len(rest) != 1 or not key or not rest[0]:
            raise ValueError(f"optim_args must be key=value pairs separated by commas, got {item!r} in {optim_args!r}")
        if key in values:
            raise ValueError(f"optim_args must name each option once, got {key!r} twice: {optim_args!r}")
        values[key] = rest[0]
    return values
