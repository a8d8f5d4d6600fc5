"""PowerGrad Transform (PGT) for the Hugging Face ecosystem.

PGT changes one thing in training: the backward pass at the softmax uses ``softmax(alpha z)`` in place of
``softmax(z)`` (Das et al., "Altering Backward Pass Gradients improves Convergence", arXiv 2111.12495). Importing this
package also makes ``optim="powergrad_sgd"`` known to ``transformers.Trainer``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .arguments import PowerGradTrainingArguments
from .attach import PowerGradHandle, attach_powergrad, fold_powergrad
from .functional import powergrad_cross_entropy, powergrad_linear_cross_entropy, powergrad_log_softmax
from .logits import PowerGradLogits
from .loss import PowerGradCrossEntropyLoss
from .optim import bind_powergrad, create_optimizer, list_optimizers
from .registration import register
from .schedules import AlphaScheduler

if TYPE_CHECKING:
    from .callbacks import AlphaScheduleCallback
    from .trainer import PowerGradTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "AlphaScheduleCallback",
    "AlphaScheduler",
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
    "powergrad_linear_cross_entropy",
    "powergrad_log_softmax",
]

register()


_SLOW_TO_IMPORT = {"AlphaScheduleCallback": ".callbacks", "PowerGradTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    if name in _SLOW_TO_IMPORT:
        return getattr(importlib.import_module(_SLOW_TO_IMPORT[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
