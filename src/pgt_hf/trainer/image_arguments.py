"""The settings that training image classifiers adds to ``PowerGradTrainingArguments``."""

from dataclasses import dataclass, field

from .arguments import PowerGradTrainingArguments

SCHEDULES = ("cosine", "step")


@dataclass
class ImageTrainingArguments(PowerGradTrainingArguments):
    """Arguments of ``ImageTrainer``; ``recipes/imagenet.py --help`` describes each.

    Raises:
        TypeError, ValueError: An argument is not allowed; nothing has been built by then.

    Example:
        >>> args = ImageTrainingArguments("out", schedule="cosine", warmup_epochs=5, mixup=0.2, ema_decay=0.9998)
    """

    schedule: str | None = field(default=None, metadata={"help": "timm's 'cosine' or 'step'; else lr_scheduler_type."})
    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs of linear warm-up, part of the run."})
    warmup_lr: float = field(default=0.001, metadata={"help": "First learning rate, as a share of learning_rate."})
    min_lr: float = field(default=0.0, metadata={"help": "Learning rate where the cosine schedule ends."})
    decay_epochs: list[int] = field(
        default_factory=lambda: [30, 60, 90], metadata={"help": "Epochs at which the step schedule decays."}
    )
    decay_rate: float = field(default=0.1, metadata={"help": "What the step schedule multiplies the rate by."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup's Beta parameter; 0 is off."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix's Beta parameter; 0 is off."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle of an image."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of an average of the weights, if any."})
    ema_warmup: bool = field(default=False, metadata={"help": "Start the average with a short memory."})
    channels_last: bool = field(default=False, metadata={"help": "Keep images and convolutions in NHWC order."})

    def __post_init__(self) -> None:
        if self.schedule not in (None, *SCHEDULES):
            raise ValueError(f"schedule must be None or one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("random_erasing", "decay_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay!r}")
        super().__post_init__()
