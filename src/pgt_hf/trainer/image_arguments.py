"""The settings that training image classifiers adds to ``PowerGradTrainingArguments``."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from transformers import SchedulerType

from ..limits import Count, Needs, Number, OneOf, Share
from .arguments import NEEDS, PowerGradTrainingArguments

SCHEDULES = ("cosine", "step")


@dataclass
class ImageTrainingArguments(PowerGradTrainingArguments):
    """Arguments of ``ImageTrainer``; ``recipes/imagenet.py --help`` describes each.

    Example:
        >>> args = ImageTrainingArguments("out", schedule="cosine", warmup_epochs=5, mixup=0.2, ema_decay=0.9998)
    """

    NEEDS: ClassVar[dict[str, Needs]] = NEEDS | dict.fromkeys(
        ("warmup_steps", "lr_scheduler_kwargs"), Needs("schedule", (None,))
    )

    lr_scheduler_type: Annotated[SchedulerType | str, Needs("schedule", (None,))] = field(
        default="linear", metadata={"help": "transformers' schedule, in place of timm's."}
    )
    schedule: Annotated[str | None, OneOf(SCHEDULES)] = field(
        default=None, metadata={"help": "timm's 'cosine' or 'step'; else lr_scheduler_type."}
    )
    warmup_epochs: Annotated[float, Number("[0, inf)"), Needs("schedule")] = field(
        default=0.0, metadata={"help": "Epochs of linear warm-up, part of the run."}
    )
    warmup_lr: Annotated[float, Number("[0, 1]"), Needs("schedule")] = field(
        default=0.001, metadata={"help": "First learning rate, as a share of learning_rate."}
    )
    min_lr: Annotated[float, Number("[0, inf)"), Needs("schedule", ("cosine",))] = field(
        default=0.0, metadata={"help": "Learning rate where the cosine schedule ends."}
    )
    decay_epochs: Annotated[list[Count], Needs("schedule", ("step",))] = field(
        default_factory=lambda: [30, 60, 90], metadata={"help": "Epochs at which the step schedule decays."}
    )
    decay_rate: Annotated[float, Number("[0, 1]"), Needs("schedule", ("step",))] = field(
        default=0.1, metadata={"help": "What the step schedule multiplies the rate by."}
    )
    mixup: Annotated[float, Number("[0, 100]")] = field(
        default=0.0, metadata={"help": "Mixup's Beta parameter; 0 is off."}
    )
    cutmix: Annotated[float, Number("[0, 100]")] = field(
        default=0.0, metadata={"help": "CutMix's Beta parameter; 0 is off."}
    )
    random_erasing: Share = field(default=0.0, metadata={"help": "Probability of erasing a rectangle of an image."})
    ema_decay: Annotated[float | None, Number("[0, 1)")] = field(
        default=None, metadata={"help": "Decay of an average of the weights, if any."}
    )
    ema_warmup: Annotated[bool, Needs("ema_decay")] = field(
        default=False, metadata={"help": "Start the average with a short memory."}
    )
    channels_last: bool = field(default=False, metadata={"help": "Keep images and convolutions in NHWC order."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and self.max_steps < 1 and self.warmup_epochs > self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs must be at most num_train_epochs, {self.num_train_epochs}, got {self.warmup_epochs}"
            )
        if sorted(set(self.decay_epochs)) != list(self.decay_epochs):
            raise ValueError(f"decay_epochs must be in ascending order, each once, got {self.decay_epochs}")
        if self.neftune_noise_alpha is not None:
            raise ValueError(f"neftune_noise_alpha must be left out for images, got {self.neftune_noise_alpha}")
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"label_names must be left out, or labels, got {self.label_names}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr must be at most learning_rate, {self.learning_rate}, got {self.min_lr}")
