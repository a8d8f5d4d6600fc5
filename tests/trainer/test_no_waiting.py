"""Between two log entries no training step waits for the device: nothing asks for a tensor's value."""

import traceback

import pytest
import torch
from small import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from pgt_hf import ImageTrainingArguments
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback, StopOnSigterm

pytestmark = pytest.mark.slow

VALUES = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default"}
ON_THE_CPU = ("in check_alpha", "torch/optim/")  # alpha and Adam's counters are kept there, whatever the device


class Asked(TorchDispatchMode):
    """Counts the operations that need a value from the device, by where they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func is torch.ops.aten.index.Tensor and any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in args[1]
        )
        if masks or str(func) in VALUES:
            stack = "".join(traceback.format_stack(limit=8)[:-1])
            if not any(place in stack for place in ON_THE_CPU):
                self.found.append(stack)
        return func(*args, **(kwargs or {}))


class Begin(TrainerCallback):
    def __init__(self, asked: Asked, steps: range) -> None:
        self.asked, self.steps = asked, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.asked.__enter__()


class End(Begin):
    on_step_begin = TrainerCallback.on_step_begin

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step - 1 in self.steps:
            self.asked.__exit__(None, None, None)


STRONG = {"mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.0, "label_smoothing_factor": 0.1, "ema_decay": 0.9}
SETTINGS = {
    "plain": {},
    "strong": STRONG,
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"clip_mode": "agc", "clip_value": 0.01},
    "clipped by norm": {"clip_mode": "norm", "clip_value": 1.0},
    "adamw": {"optim": "powergrad_adamw", "optim_args": None},
    "class weights": {"schedule": "cosine", "warmup_epochs": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step_asks_for_no_value(tmp_path, settings):
    asked, steps = Asked(), range(2, 4)
    guards = (Begin(asked, steps), DivergenceCallback(interval=50), DiagnosticsCallback(interval=50), StopOnSigterm())
    defaults = {"logging_steps": 50, "max_steps": 5}
    trainer = build(tmp_path, callbacks=guards, **defaults | settings)
    trainer.add_callback(End(asked, steps))
    trainer.train()
    assert not asked.found, f"{len(asked.found)} times, first from\n{asked.found[0]}"


def test_batches_are_copied_to_the_device_while_the_step_goes_on(tmp_path):
    def copies(**options):
        return ImageTrainingArguments(str(tmp_path), report_to="none", **options).accelerator_config.non_blocking

    assert copies()
    assert not copies(use_cpu=True)  # nothing is copied, and Trainer would warn that memory is not pinned
    assert not copies(dataloader_pin_memory=False) and not copies(accelerator_config={"non_blocking": False})
