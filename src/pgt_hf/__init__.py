"""PowerGrad Transform (PGT) for the Hugging Face ecosystem.

PGT changes one thing in training: the backward pass at the softmax uses ``softmax(alpha z)`` in place of
``softmax(z)`` (Das et al., "Altering Backward Pass Gradients improves Convergence", arXiv 2111.12495). Importing this
package also makes ``optim="powergrad_sgd"`` known to ``transformers.Trainer``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .arguments import ImageTrainingArguments, PowerGradTrainingArguments
from .attach import PowerGradHandle, attach_powergrad
from .functional import powergrad_cross_entropy, powergrad_linear_cross_entropy, powergrad_log_softmax
from .heads import fold_powergrad
from .logits import PowerGradLogits
from .loss import PowerGradCrossEntropyLoss
from .optim import bind_powergrad, create_optimizer, list_optimizers
from .registration import register
from .schedules import AlphaScheduler
from .search import powergrad_hp_space

if TYPE_CHECKING:
    from .callbacks import AlphaScheduleCallback
    from .image_trainer import ImageTrainer
    from .trainer import PowerGradTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "AlphaScheduleCallback",
    "AlphaScheduler",
    "ImageTrainer",
    "ImageTrainingArguments",
    "PowerGradCrossEntropyLoss",
    "PowerGradHandle",
    "PowerGradLogits",
    "PowerGradTrainer",
    "PowerGradTrainingArguments",
    "attach_powergrad",
    "bind_powergrad",
    "create_optimizer",
    "fold_powergrad",
    "list_optimizers",
    "powergrad_cross_entropy",
    "powergrad_hp_space",
    "powergrad_linear_cross_entropy",
    "powergrad_log_softmax",
]

register()


# transformers.Trainer is slow to import, and these are built on it.
_LAZY = {"AlphaScheduleCallback": "callbacks", "ImageTrainer": "image_trainer", "PowerGradTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
