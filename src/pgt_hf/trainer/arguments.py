"""``TrainingArguments`` and the few settings that PGT adds."""

import inspect
import re
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from types import NoneType
from typing import Annotated, Any, ClassVar

import torch
from accelerate.utils import DynamoBackend
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, TrainingArguments

from ..clipping import CLIP_MODES, check_clipping
from ..functional import check_alpha
from ..limits import (
    Needs,
    Number,
    OneOf,
    Positive,
    RepoId,
    Share,
    Text,
    Whole,
    WritableFolder,
    check_fields,
    check_type,
)
from ..optim import DEFAULT_ALPHA, PREFIX, allowed_options
from .registration import SET_ELSEWHERE, parse_optim_args

_LOWER_IS_BETTER = re.compile(r"(eval_)?(ema_)?(nll|ece|brier)(_folded)?")  # Trainer assumes it of losses only
_COUNT, _SEED = Whole("[1, inf)"), Whole("[0, 4294967295]")
# What Trainer's own arguments may be. Trainer takes other values, and fails late, trains to nan, or does nothing.
RULES: dict[str, Any] = {
    "output_dir": WritableFolder(),
    "learning_rate": Number("[0, 1e6]"),
    "weight_decay": Number("[0, 1e6]"),
    "adam_beta1": Number("[0, 1)"),
    "adam_beta2": Number("[0, 1)"),
    "adam_epsilon": Number("[0, 1]"),
    "num_train_epochs": Number("(0, 1e9]"),
    "max_steps": Whole("[1, inf)", also=(-1,)),
    "warmup_steps": Number("[0, inf)"),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "label_smoothing_factor": Number("[0, 1]"),
    "logging_steps": Number("(0, inf)"),
    "eval_steps": Number("(0, inf)"),
    "save_steps": Number("(0, inf)"),
    "eval_delay": Number("[0, inf)"),
    "save_total_limit": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": Whole("[0, 1024]"),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_timeout": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "neftune_noise_alpha": Number("[0, inf)"),
    "hub_model_id": RepoId(),
    "torch_compile_backend": OneOf([backend.value.lower() for backend in DynamoBackend]),
    "torch_compile_mode": OneOf(("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
}
_PUSHED = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
_TARGETED = tuple(name.value for name in OptimizerNames if name.value.startswith(("galore", "apollo")))
# Those that would do nothing.
NEEDS = {
    "eval_steps": Needs("eval_strategy", ("steps",)),
    "save_steps": Needs("save_strategy", ("steps",)),
    "logging_steps": Needs("logging_strategy", ("steps",)),
    "dataloader_persistent_workers": Needs("dataloader_num_workers"),
    "length_column_name": Needs("train_sampling_strategy", ("group_by_length",)),
    "gradient_checkpointing_kwargs": Needs("gradient_checkpointing"),
    "liger_kernel_config": Needs("use_liger_kernel"),
    "optim_target_modules": Needs("optim", _TARGETED),
    "trackio_space_id": Needs("report_to", ("trackio", "all")),
    "project": Needs("report_to", ("trackio", "all")),
    **dict.fromkeys(_PUSHED, Needs("push_to_hub")),
}


@dataclass
class PowerGradTrainingArguments(TrainingArguments):
    """Arguments of ``PowerGradTrainer``, for any ``optim``.

    Args:
        alpha: The exponent of PGT, ``0 <= alpha <= 1``, by default 0.25; 1 is plain training. If given,
            a resumed run uses it too, with a warning if the checkpoint was trained with another.
        clip_mode: None (Trainer's own ``max_grad_norm`` holds), or "norm", "value", "agc": clipping before each step,
            in place of ``max_grad_norm``, which is then set to 0.
        clip_value: The bound that ``clip_mode`` needs (for AGC its factor, 0.01 in the paper).
        powergrad_head: Dotted name of the module that makes the logits, if it cannot be detected.
        hub_fold: Publish weights with alpha multiplied into the head, whose softmax gives calibrated probabilities.
        hub_timeout: Seconds that the end of training waits for an upload to the Hub. The other processes wait as well,
            so keep it well below ``ddp_timeout``.

    Example:
        >>> args = PowerGradTrainingArguments("out", alpha=0.25, optim="powergrad_sgd", learning_rate=0.1)
    """

    RULES: ClassVar[dict[str, Any]] = RULES
    NEEDS: ClassVar[dict[str, Needs]] = NEEDS

    max_grad_norm: Annotated[float | None, Number("[0, inf)"), Needs("clip_mode", (None,))] = field(
        default=1.0, metadata={"help": "Clip gradients to this global norm; 0 is off."}
    )
    # Trainer's default waits for the device at every step, and hides nan from DivergenceCallback.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log an average in place of a loss that is not finite."}
    )
    alpha: Share | None = field(
        default=None, metadata={"help": f"PGT's exponent in [0, 1], default {DEFAULT_ALPHA}; 1 is plain training."}
    )
    clip_mode: Annotated[str | None, OneOf(CLIP_MODES)] = field(
        default=None, metadata={"help": "Clip gradients by 'norm', 'value' or 'agc'."}
    )
    clip_value: Annotated[float | None, Number("(0, inf)"), Needs("clip_mode")] = field(
        default=None, metadata={"help": "The bound for clip_mode."}
    )
    powergrad_head: Annotated[str | None, Text()] = field(
        default=None, metadata={"help": "Dotted name of the head, if it cannot be detected."}
    )
    hub_fold: Annotated[bool, Needs("push_to_hub")] = field(
        default=False, metadata={"help": "Multiply alpha into the head of published weights."}
    )
    hub_timeout: Annotated[Positive, Needs("push_to_hub")] = field(
        default=600.0, metadata={"help": "Seconds to wait for uploads at the end of training."}
    )

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self), RULES)
        check_type("optim_args", self.optim_args, str, NoneType)
        check_type("metric_for_best_model", self.metric_for_best_model, str, NoneType)
        check_type("report_to", self.report_to, str, list, tuple, NoneType)
        self.alpha_given = self.alpha is not None
        self.alpha = DEFAULT_ALPHA if self.alpha is None else float(check_alpha(self.alpha))
        check_clipping(self.clip_mode, self.clip_value)
        if self.clip_mode is not None and self.max_grad_norm not in (None, 0, type(self).max_grad_norm):
            raise ValueError(
                f"max_grad_norm must be left out with clip_mode {self.clip_mode!r}, got {self.max_grad_norm}"
            )
        if self.hub_fold and self.alpha == 0:
            raise ValueError("hub_fold needs an alpha above 0: 0 would make every probability 1/C")
        if 1 <= self.max_steps < self.warmup_steps:
            raise ValueError(f"warmup_steps must be at most max_steps, {self.max_steps}, got {self.warmup_steps}")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 must not both be true, got true for both")
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError("fp16 must be false where there is no accelerator, as on the CPU, got true")
        optim = str(getattr(self.optim, "value", self.optim))
        if optim.startswith(PREFIX):
            parse_optim_args(optim, self.optim_args, SET_ELSEWHERE)
            self._check_adam(optim)
        lower_is_better = _LOWER_IS_BETTER.fullmatch(self.metric_for_best_model or "")
        if getattr(self, "greater_is_better", None) is None and lower_is_better:
            self.greater_is_better = False
        for name in self.include_for_metrics:
            OneOf(("inputs", "loss")).check("include_for_metrics", name)
        self._check_report_to()
        chosen = getattr(self, "accelerator_config", None) is not None
        super().__post_init__()
        if not chosen:  # a step does not wait for its batch to be copied
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self._check_scheduler()
        if not optim.startswith(PREFIX):
            self._check_installed(optim)
        if self.clip_mode is not None:
            self.max_grad_norm = 0.0

    def _check_report_to(self) -> None:
        wanted = {self.report_to} if isinstance(self.report_to, str) else set(self.report_to or ())
        if not wanted - {"all", "none"}:
            return
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in wanted:
            OneOf(("none", "all", *INTEGRATION_TO_CALLBACK)).check("report_to", name)
        if missing := wanted - {"all", "none", *get_available_reporting_integrations()}:
            raise ValueError(
                f"report_to must name what is installed, got {', '.join(sorted(missing))!r}, which is not"
            )

    def _check_scheduler(self) -> None:
        options = self.lr_scheduler_kwargs or {}
        if not isinstance(options, dict):
            raise TypeError(f"lr_scheduler_kwargs must be options as JSON, got {options!r}")
        name = SchedulerType(self.lr_scheduler_type)
        known = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters)
        known -= {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        if unknown := sorted(set(options) - known):
            taken = ", ".join(sorted(known)) or "none"
            raise ValueError(f"lr_scheduler_kwargs must be options of {name.value!r}, {taken}, got {unknown[0]!r}")

    def _check_installed(self, optim: str) -> None:
        from transformers import Trainer

        without, idle = copy(self), False
        without.optim_args = None
        try:
            with suppress(ValueError):  # for some it takes a model
                chosen = Trainer.get_optimizer_cls_and_kwargs(self)
                idle = bool(self.optim_args) and Trainer.get_optimizer_cls_and_kwargs(without) == chosen
        except ImportError as error:
            raise ValueError(f"optim must name what is installed, got {optim!r}: {error}") from error
        if idle:
            raise ValueError(f"optim_args must be left out with {optim!r}, which takes none, got {self.optim_args!r}")

    def _check_adam(self, optim: str) -> None:
        """Refuses Trainer's options of Adam for an optimizer that has no such options."""
        options, defaults = allowed_options(optim), TrainingArguments.__dataclass_fields__
        for name, option in (("adam_beta1", "betas"), ("adam_beta2", "betas"), ("adam_epsilon", "eps")):
            if getattr(self, name) != defaults[name].default and option not in options:
                raise ValueError(
                    f"{name} must be left out with {optim!r}, which has no {option}, got {getattr(self, name)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: Trainer pickles its arguments into every checkpoint."""
        return self.__dict__ | {"hub_token": None}

    def powergrad_options(self) -> dict[str, Any]:
        """The settings as ``create_optimizer`` and ``bind_powergrad`` take them."""
        return {
            "alpha": self.alpha,
            "clip_mode": self.clip_mode,
            "clip_value": self.clip_value,
            "head": self.powergrad_head,
        }
