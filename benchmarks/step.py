"""What a trainer adds to a training step: a plain loop, Trainer, and ours, on a network that takes next to nothing.

    python -m benchmarks.step              # test_resnet, 32 pixels, batch 8, one thread
    python -m benchmarks.step --rounds 9

The trainers run in turns in one process; a figure is the median over the rounds of a step's CPU time, which other work
on the machine does not stretch much.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from pgt_hf import ImageTrainer, ImageTrainingArguments, PowerGradTrainer, PowerGradTrainingArguments, create_optimizer
from pgt_hf.images import create_model
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback, StopOnSigterm

BATCH, SIDE, CLASSES, WARM_UP = 8, 32, 10, 20
COMMON = {
    "max_grad_norm": 0.0, "logging_steps": 10**6, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "per_device_train_batch_size": BATCH, "logging_nan_inf_filter": False, "learning_rate": 1e-3, "use_cpu": True,
    "dataloader_drop_last": True,
}  # fmt: skip
EXAMPLE = {"pixel_values": torch.randn(3, SIDE, SIDE), "labels": 1}
GUARDS = (DivergenceCallback, DiagnosticsCallback, StopOnSigterm)


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """The same image over and over: reading takes no time."""

    def __len__(self) -> int:
        return BATCH * 10**5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return EXAMPLE


class Clock(TrainerCallback):
    """Times the steps after the first few."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.started = time.process_time()
        self.seconds = (time.process_time() - getattr(self, "started", 0)) / max(state.global_step - WARM_UP, 1)


def network() -> Any:
    return create_model("test_resnet", [str(label) for label in range(CLASSES)], image_size=SIDE)


def plain_loop(steps: int, optim: str) -> float:
    """The loop that a reader of torch's tutorial would write, with a DataLoader."""
    model = network().train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    if optim != "sgd":
        optimizer = create_optimizer(model, optim, lr=1e-3, alpha=0.25)
    batches = iter(torch.utils.data.DataLoader(Images(), BATCH))
    started = 0.0
    for step in range(steps):
        if step == WARM_UP:
            started = time.process_time()
        batch = next(batches)
        F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - started) / (steps - WARM_UP)


def trained(steps: int, trainer: Any, arguments: Any, optim: str, callbacks: tuple[type, ...] = ()) -> float:
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, max_steps=steps, optim=optim, **COMMON)
        clock = Clock()
        made = [callback() for callback in callbacks]
        trainer(network(), args, train_dataset=Images(), callbacks=[*made, clock]).train()
    return clock.seconds


SIDES: dict[str, Callable[[int], float]] = {
    "plain loop, cross-entropy": lambda steps: plain_loop(steps, "sgd"),
    "plain loop, PGT": lambda steps: plain_loop(steps, "powergrad_sgd"),
    "Trainer": lambda steps: trained(steps, Trainer, TrainingArguments, "sgd"),
    "PowerGradTrainer": lambda steps: trained(steps, PowerGradTrainer, PowerGradTrainingArguments, "powergrad_sgd"),
    "ImageTrainer": lambda steps: trained(steps, ImageTrainer, ImageTrainingArguments, "powergrad_sgd"),
    "ImageTrainer and its callbacks": lambda steps: trained(
        steps, ImageTrainer, ImageTrainingArguments, "powergrad_sgd", GUARDS
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--profile", choices=SIDES, help="print where the time of one side goes, and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        with cProfile.Profile() as trace:
            SIDES[given.profile](given.steps)
        pstats.Stats(trace).sort_stats("tottime").print_stats(40)
        return
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(given.rounds):
        for name, side in SIDES.items():
            found[name].append(side(given.steps))
    base = statistics.median(found["Trainer"])
    print("| | microseconds a step | over Trainer |\n|---|---|---|")
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle * 1e6:,.0f} | {(middle - base) * 1e6:+,.0f} |")


if __name__ == "__main__":
    main()
