"""``PowerGradTrainer``: Trainer with PGT on the model's logits, for any optimizer, and its quantities in the logs."""

import inspect
from collections.abc import Callable, Mapping, Sized
from contextlib import suppress
from functools import wraps
from types import NoneType
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from ..attach import PowerGradHandle
from ..heads import find_heads
from ..limits import check_type
from ..logits import elem_of
from ..optim import bind_powergrad, keep_asked_alpha
from .alpha_callback import AlphaScheduleCallback
from .arguments import PowerGradTrainingArguments
from .hp_space import powergrad_hp_space
from .process_group import end_group_at_exit

_FUNCTIONS = ("data_collator", "model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
_PAIRS = {"optimizers": "(optimizer, scheduler)", "optimizer_cls_and_kwargs": "(class, its arguments)"}


class PowerGradTrainer(Trainer):
    """Trainer that trains every softmax cross-entropy of the model's logits with PGT.

    Takes what Trainer takes; ``args`` is a ``PowerGradTrainingArguments``. The optimizer may come from ``optim``, from
    ``optimizers=(yours, scheduler)`` or from ``optimizer_cls_and_kwargs``. The logs gain ``powergrad_alpha`` and
    ``logit_norm`` (mean L2 norm of the training logits since the last log); ``loss`` is the true training loss. When
    ``train()`` ends the model is plain again. ``push_to_hub`` publishes by way of ``pgt_hf.hub.PublishCallback``.

    Example:
        >>> args = PowerGradTrainingArguments("out", alpha=0.25, optim="powergrad_sgd", learning_rate=0.1)
        >>> trainer = PowerGradTrainer(model, args, train_dataset=dataset)
    """

    args: PowerGradTrainingArguments

    @wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *others: Any,
        **named: Any,
    ) -> None:
        args = PowerGradTrainingArguments("trainer_output") if args is None else args
        check_type("args", args, PowerGradTrainingArguments)
        given = inspect.signature(Trainer).bind(model, args, data_collator, train_dataset, *others, **named).arguments
        if model is not None or given.get("model_init") is None:
            check_type("model", model, nn.Module)
        _check(given)
        if args.powergrad_head is not None and model is not None:
            find_heads(model, args.powergrad_head)  # an error before training, not at its first step
        counted = isinstance(train_dataset, Sized) and not isinstance(train_dataset, IterableDataset)
        if counted and not len(train_dataset):
            raise ValueError("train_dataset must have at least one example, got none")
        if args.dataloader_drop_last and counted:
            each = len(train_dataset) // args.world_size
            if each < args.train_batch_size:
                raise ValueError(
                    f"per_device_train_batch_size must be at most {each}, the training examples of one process, got "
                    f"{args.train_batch_size}: dataloader_drop_last would leave out all of them"
                )
        self._handle: PowerGradHandle | None = None
        self._logit_norm: Tensor | None = None
        self._logit_rows = 0
        self._operations_per_value: int | None = None
        super().__init__(model, args, data_collator, train_dataset, *others, **named)
        if self.args.world_size > 1:
            end_group_at_exit(self)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            with suppress(AttributeError, ValueError):  # what needs the model is said when the optimizer is made
                self.get_optimizer_cls_and_kwargs(self.args)  # one that is not installed is an error now

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # a second train() finds the one that Accelerate wrapped
        handle = getattr(inner, "powergrad", None)
        if handle is None or not handle.attached:
            bind_powergrad(inner, self.model if model is None else model, **self.args.powergrad_options())
            handle = inner.powergrad
            if self.args.alpha_given:
                keep_asked_alpha(inner)
        elif self.args.alpha_given and self.args.alpha != handle.alpha:
            raise ValueError(
                f"the optimizer sets alpha={handle.alpha}, the arguments alpha={self.args.alpha}; keep one"
            )
        self.args.alpha = handle.alpha
        self._handle = handle
        self._record_alpha()
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._operations_per_value = None  # a model_init may have made another model
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._handle is not None:
                self._record_alpha()
                self._handle.remove()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._record_alpha()
        super().save_model(*args, **kwargs)

    def _record_alpha(self) -> None:
        """Records the alpha that the model was last trained with, which its probabilities depend on."""
        config = getattr(self.model, "config", None)
        if config is None or self._handle is None or not self._handle.attached:  # after training: it may be folded
            return
        config.powergrad_alpha, config.powergrad_folded = self._handle.alpha, False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AlphaScheduleCallback):
                config.powergrad_schedule = callback.settings()

    def hyperparameter_search(self, hp_space: Any = None, *args: Any, backend: Any = "optuna", **kwargs: Any) -> Any:
        """As ``Trainer.hyperparameter_search``; with Optuna, ``hp_space`` is by default ``powergrad_hp_space``.

        The learning rate is then searched from a tenth to ten times that of the arguments.
        """
        if hp_space is None and backend == "optuna":
            rate = self.args.learning_rate
            hp_space = powergrad_hp_space((rate / 10, rate * 10))
        return super().hyperparameter_search(hp_space, *args, backend=backend, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        from ..hub.publish import take_over

        take_over(self)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        from ..hub.publish import take_over

        return take_over(self).push(self, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._measure(outputs)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer counts the parameters anew for every batch.
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not (values := inputs[name].numel()):
            return 0
        if self._operations_per_value is None:
            self._operations_per_value = super().floating_point_ops(inputs) // values
        return self._operations_per_value * values

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Where nothing is clipped, Trainer computes the norm at every step, for a few log entries. In fp16 it must:
        # that also takes the scale off the gradients, before any callback looks at them.
        if grad_norm is None and self.accelerator.scaler is None and not self._logs_next():
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _logs_next(self) -> bool:
        """Whether the step that is being taken will be logged."""
        step, strategy = self.state.global_step + 1, self.args.logging_strategy
        if strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0:
            return True
        return strategy == IntervalStrategy.EPOCH or (step == 1 and self.args.logging_first_step)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Since the last step each process has batch norm statistics of its own; rank 0's are the ones that are saved.
        if self.args.world_size > 1:
            _broadcast(list(self.model.buffers()))
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                logs |= getattr(callback, "take_logs", dict)()
        if "loss" in logs and self._handle is not None:
            logs["powergrad_alpha"] = self._handle.alpha
            if self._logit_norm is not None:
                total = torch.stack([self._logit_norm, self._logit_norm.new_tensor(self._logit_rows)])
                total = self.accelerator.reduce(total, "sum")
                logs["logit_norm"] = round((total[0] / total[1]).item(), 4)
                self._logit_norm, self._logit_rows = None, 0
        super().log(logs, *args, **kwargs)

    def _measure(self, outputs: Any) -> None:
        """Adds up the norms on the device, without waiting for them before the next log."""
        logits = outputs.get("logits") if isinstance(outputs, dict) else outputs
        if not isinstance(logits, Tensor):
            return
        norms = elem_of(logits).detach().float().flatten(0, -2).norm(dim=-1)
        self._logit_norm = norms.sum() if self._logit_norm is None else self._logit_norm + norms.sum()
        self._logit_rows += norms.numel()


def _check(given: Mapping[str, Any]) -> None:
    """Raises TypeError for what Trainer would stumble over later, or without naming it."""
    for name in _FUNCTIONS:
        check_type(name, given.get(name), Callable, NoneType)  # type: ignore[arg-type]
    check_type("callbacks", given.get("callbacks"), list, tuple, NoneType)
    for name, content in _PAIRS.items():
        pair = given.get(name)
        if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"{name} must be a pair {content}, got {pair!r:.200}")


def _broadcast(buffers: list[Tensor]) -> None:
    """The first process's values for all: one call for each dtype, however many buffers there are."""
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):  # in one order on all processes
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        together = broadcast(torch.cat([buffer.flatten() for buffer in same]))
        for buffer, part in zip(same, together.split([buffer.numel() for buffer in same]), strict=True):
            buffer.copy_(part.view_as(buffer))
