"""What a program shows while it trains: a bar with the time left, and one line for each evaluation."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from ..runs.record import METRICS

_DETAILS = ("nll", "ece", "brier", "_folded", "runtime", "per_second", "preparation_time", "epoch")
_SECONDS, _SHARE = 60, 0.05  # where there is no terminal: a line each minute, or each twentieth of the run


class Progress(ProgressCallback):
    """In place of transformers' ``ProgressCallback``, which writes each log entry as one dict.

    Where standard error is no terminal, lines take the place of the bar.

    Example:
        >>> trainer.remove_callback(ProgressCallback)
        >>> trainer.add_callback(Progress)
    """

    def __init__(self) -> None:
        super().__init__()
        self._bars = sys.stderr.isatty()
        self._started = self._told = time.monotonic()
        self._first = self._last = 0
        self._evaluated = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._told = time.monotonic()
        self._first = self._last = state.global_step
        if self._bars and state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bars:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # The last evaluation is logged again at the end.
        if (evaluated := _in_words(logs)) and state.global_step != self._evaluated:
            self._evaluated = state.global_step
            tqdm.write(f"epoch {state.epoch or 0:<6.4g} {evaluated}")
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")
        elif "loss" in logs and self._is_due(state):
            spent = time.monotonic() - self._started
            left = spent / max(state.global_step - self._first, 1) * (state.max_steps - state.global_step)
            self._told, self._last = time.monotonic(), state.global_step
            print(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4g}  "
                f"{tqdm.format_interval(spent)} passed, {tqdm.format_interval(left)} left",
                flush=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            spent = tqdm.format_interval(time.monotonic() - self._started)
            print(f"trained {state.global_step - self._first} steps in {spent}", flush=True)

    def _is_due(self, state: Any) -> bool:
        return state.global_step - self._last >= _SHARE * state.max_steps or time.monotonic() - self._told >= _SECONDS


def _in_words(logs: dict[str, Any]) -> str:
    """An evaluation's main results; the rest is in the history and at the end."""
    words = []
    for key, value in logs.items():
        name = key.removeprefix("eval_")
        if name != key and isinstance(value, (int, float)) and not any(detail in name for detail in _DETAILS):
            share = METRICS.get(name.removeprefix("ema_"), ("", "", False))[2]
            label = name.replace("_", " ").replace("top", "top-")
            words.append(f"{label} {value:.2%}" if share else f"{label} {value:.4g}")
    return "  ".join(words)
