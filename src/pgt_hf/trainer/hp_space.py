"""The search space of alpha and the learning rate.

They are coupled, since PGT sends about 1/alpha times more gradient into the backbone: search them together, and give
the baseline's learning rate as many trials.
"""

from collections.abc import Callable
from typing import Any

from ..limits import Rate, Share, checked

PAPER_ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # the published ones lie at 0.05, 0.25, 0.3 and 0.92


@checked
def powergrad_hp_space(
    learning_rate: tuple[Rate, Rate], alpha: tuple[Share, Share] = (0.05, 1.0)
) -> Callable[[Any], dict[str, float]]:
    """A search space for ``Trainer.hyperparameter_search`` with Optuna: alpha and the learning rate together.

    Both are (lowest, highest); the learning rate is searched on a logarithmic scale. With an alpha of (1, 1) it is the
    baseline's space. ``PowerGradTrainer.hyperparameter_search`` uses it by default, around its own learning rate.

    Example:
        >>> space = powergrad_hp_space(learning_rate=(0.01, 1.0))
        >>> trainer.hyperparameter_search(space, n_trials=20, direction="maximize", backend="optuna")
    """
    if not 0 < learning_rate[0] <= learning_rate[1]:
        raise ValueError(f"learning_rate must be two rising numbers above 0, got {learning_rate}")
    if not 0 <= alpha[0] <= alpha[1] <= 1:
        raise ValueError(f"alpha must be two rising numbers in [0, 1], got {alpha}")

    def space(trial: Any) -> dict[str, float]:
        return {
            "alpha": trial.suggest_float("alpha", *alpha),
            "learning_rate": trial.suggest_float("learning_rate", *learning_rate, log=True),
        }

    return space
