"""``TrainingArguments`` and the few settings that PGT adds, and those that training image classifiers adds."""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import TrainingArguments

from .clipping import check_clipping
from .functional import check_alpha
from .optim import DEFAULT_ALPHA

__all__ = ["SCHEDULES", "ImageTrainingArguments", "PowerGradTrainingArguments"]

SCHEDULES = ("cosine", "step")


@dataclass
class PowerGradTrainingArguments(TrainingArguments):
    """Arguments of ``PowerGradTrainer``; any ``optim`` may be used, PGT does not live in it.

    Args:
        alpha: The exponent of PGT, ``0 <= alpha <= 1``, by default 0.25; 1 is plain training. One that is given is
            used by a resumed run too, with a warning if the checkpoint was trained with another.
        clip_mode: None (Trainer's own ``max_grad_norm`` holds), or "norm", "value", "agc": clipping before each step,
            in place of ``max_grad_norm``, which is then set to 0.
        clip_value: The bound that ``clip_mode`` needs (for AGC its factor, 0.01 in the paper).
        powergrad_head: Dotted name of the module that makes the logits, where it is not found by itself.
        hub_fold: Publish weights with alpha multiplied into the head, whose softmax gives calibrated probabilities.
        hub_timeout: Seconds that the end of training waits for an upload to the Hub. The other processes wait as well,
            so keep it well below ``ddp_timeout``.

    Raises:
        TypeError, ValueError: One of these is not allowed; nothing has been built by then.

    Example:
        >>> args = PowerGradTrainingArguments("out", alpha=0.25, optim="powergrad_sgd", learning_rate=0.1)
    """

    alpha: float | None = field(
        default=None, metadata={"help": f"PGT's exponent in [0, 1], default {DEFAULT_ALPHA}; 1 is plain training."}
    )
    clip_mode: str | None = field(default=None, metadata={"help": "Clip gradients by 'norm', 'value' or 'agc'."})
    clip_value: float | None = field(default=None, metadata={"help": "The bound for clip_mode."})
    powergrad_head: str | None = field(default=None, metadata={"help": "Dotted name of the head, if not found."})
    hub_fold: bool = field(default=False, metadata={"help": "Publish weights with alpha in the head."})
    hub_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for an upload at the end."})

    def __post_init__(self) -> None:
        self.alpha_given = self.alpha is not None
        self.alpha = DEFAULT_ALPHA if self.alpha is None else float(check_alpha(self.alpha))
        check_clipping(self.clip_mode, self.clip_value)
        if not self.hub_timeout > 0:
            raise ValueError(f"hub_timeout must be a number of seconds above 0, got {self.hub_timeout}")
        if self.hub_fold and self.alpha == 0:
            raise ValueError("hub_fold needs an alpha above 0: 0 would make every probability 1/C")
        super().__post_init__()
        if self.clip_mode is not None:
            self.max_grad_norm = 0.0

    def powergrad_options(self) -> dict[str, Any]:
        """The settings as ``create_optimizer`` and ``bind_powergrad`` take them."""
        return {
            "alpha": self.alpha,
            "clip_mode": self.clip_mode,
            "clip_value": self.clip_value,
            "head": self.powergrad_head,
        }


@dataclass
class ImageTrainingArguments(PowerGradTrainingArguments):
    """Arguments of ``ImageTrainer``: what the training of image classifiers adds to a loop.

    Args:
        schedule: "cosine" or "step", timm's schedules, stepped per update; None leaves it to ``lr_scheduler_type``.
        warmup_epochs: Linear warm-up from ``warmup_lr`` to ``learning_rate``, inside the epochs of the run.
        warmup_lr: Learning rate of the first step, as a share of ``learning_rate`` (the paper: 0.001).
        min_lr: Learning rate where the cosine ends.
        decay_epochs: Epochs at which the step schedule multiplies the rate by ``decay_rate``.
        decay_rate: See ``decay_epochs``.
        mixup: Mixup's Beta parameter; 0 is off.
        cutmix: CutMix's Beta parameter; 0 is off.
        mixup_prob: Share of the batches that are mixed at all.
        mixup_switch_prob: Share of the mixed ones that are cut, where both are on.
        random_erasing: Probability that a rectangle of an image is replaced by noise.
        ema_decay: Keep an exponential moving average of the weights, evaluate and save it as well; None is off.
        ema_warmup: Begin with a short memory, which suits runs of few steps.
        channels_last: Keep images and convolutions in NHWC order, as tensor cores and oneDNN prefer.

    Raises:
        TypeError, ValueError: One of these is not allowed; nothing has been built by then.

    Example:
        >>> args = ImageTrainingArguments("out", schedule="cosine", warmup_epochs=5, mixup=0.2, ema_decay=0.9998)
    """

    schedule: str | None = field(default=None, metadata={"help": "'cosine' or 'step'; else lr_scheduler_type holds."})
    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs of linear warm-up, part of the run."})
    warmup_lr: float = field(default=0.001, metadata={"help": "First learning rate, as a share of learning_rate."})
    min_lr: float = field(default=0.0, metadata={"help": "Learning rate where the cosine schedule ends."})
    decay_epochs: list[int] = field(
        default_factory=lambda: [30, 60, 90], metadata={"help": "Epochs at which the step schedule decays."}
    )
    decay_rate: float = field(default=0.1, metadata={"help": "What the step schedule multiplies the rate by."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup's Beta parameter; 0 is off."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix's Beta parameter; 0 is off."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Share of the batches that are mixed or cut."})
    mixup_switch_prob: float = field(default=0.5, metadata={"help": "Share of these that are cut, where both are on."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle of an image."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of an average of the weights, if any."})
    ema_warmup: bool = field(default=False, metadata={"help": "Let the average begin with a short memory."})
    channels_last: bool = field(default=False, metadata={"help": "Keep images and convolutions in NHWC order."})

    def __post_init__(self) -> None:
        if self.schedule not in (None, *SCHEDULES):
            raise ValueError(f"schedule must be None or one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("mixup_prob", "mixup_switch_prob", "random_erasing", "decay_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay!r}")
        super().__post_init__()
