"""``TrainingArguments`` and the few settings that PGT adds."""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import TrainingArguments

from ..clipping import check_clipping
from ..functional import check_alpha
from ..optim import DEFAULT_ALPHA


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
    powergrad_head: str | None = field(
        default=None, metadata={"help": "Dotted name of the head, if it cannot be detected."}
    )
    hub_fold: bool = field(default=False, metadata={"help": "Multiply alpha into the head of published weights."})
    hub_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for uploads at the end of training."})

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
