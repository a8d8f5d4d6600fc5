"""What a trainer adds to a training step: a plain loop, Trainer, and ours, on a network that takes next to nothing.

    python -m benchmarks.step              # 32 pixels, batch 8, one thread
    python -m benchmarks.step --profile PowerGradTrainer

The sides take their steps in turns, in threads of one process, and each is compared with Trainer's next to it. All
times are CPU times of a thread, which other work on the machine does not stretch much.
"""

import argparse
import cProfile
import itertools
import math
import operator
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

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


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """The same image over and over: reading takes no time."""

    def __len__(self) -> int:
        return BATCH * 10**5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return EXAMPLE


class Turns:
    """Lets the sides take one step each in turn, every side in a thread of its own."""

    def __init__(self, sides: list[str]) -> None:
        self.changed, self.order = threading.Condition(), deque(sides)

    def wait(self, side: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == side)

    def next(self, side: str) -> None:
        with self.changed:
            self.order.rotate(-1)
            self.changed.notify_all()
        self.wait(side)

    def leave(self) -> None:
        with self.changed:
            self.order.popleft()
            self.changed.notify_all()


class Clock(TrainerCallback):
    """Notes the CPU seconds that each step took in its thread, and lets the others take theirs."""

    def __init__(self, next_turn: Callable[[], None] = lambda: None) -> None:
        self.steps: list[float] = []
        self.next_turn, self.started = next_turn, time.thread_time()

    def on_step_end(self, args: Any = None, state: Any = None, control: Any = None, **kwargs: Any) -> None:
        self.steps.append(time.thread_time() - self.started)
        self.next_turn()
        self.started = time.thread_time()


def smallest() -> Any:
    """Takes next to no time, so that a difference of microseconds is not lost in the noise of convolutions."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config)


NETWORKS: dict[str, Callable[[], Any]] = {
    "test_resnet": lambda: create_model("test_resnet", [str(label) for label in range(CLASSES)], image_size=SIDE),
    "a ResNet of one block": smallest,
}


def plain_loop(make: Callable[[], Any], steps: int, clock: Clock, optim: str) -> None:
    """The loop that a reader of torch's tutorial would write, with a DataLoader."""
    model = make().train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    if optim != "sgd":
        optimizer = create_optimizer(model, optim, lr=1e-3, alpha=0.25, momentum=0, nesterov=False)
    batches = iter(torch.utils.data.DataLoader(Images(), BATCH))
    for _ in range(steps):
        batch = next(batches)
        F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()


def trained(
    make: Callable[[], Any],
    steps: int,
    clock: Clock,
    trainer: Any,
    arguments: Any,
    optim: str,
    callback: Callable[[], TrainerCallback] | None = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = None if optim == "sgd" else "momentum=0,nesterov=false"  # as torch's SGD, which Trainer uses
        args = arguments(folder, max_steps=steps, optim=optim, optim_args=options, **COMMON)
        callbacks = [callback(), clock] if callback else [clock]
        trainer(make(), args, train_dataset=Images(), callbacks=callbacks).train()


SIDES: dict[str, Callable[[Callable[[], Any], int, Clock], None]] = {
    "plain loop, cross-entropy": partial(plain_loop, optim="sgd"),
    "plain loop, PGT": partial(plain_loop, optim="powergrad_sgd"),
    "Trainer": partial(trained, trainer=Trainer, arguments=TrainingArguments, optim="sgd"),
    "PowerGradTrainer": partial(
        trained, trainer=PowerGradTrainer, arguments=PowerGradTrainingArguments, optim="powergrad_sgd"
    ),
    "ImageTrainer": partial(trained, trainer=ImageTrainer, arguments=ImageTrainingArguments, optim="powergrad_sgd"),
}
# The recipes' callbacks; the steps from one on which they look at the network to the next, here and by default.
CALLBACKS: dict[str, tuple[Callable[[], TrainerCallback], int, int]] = {
    "DiagnosticsCallback": (partial(DiagnosticsCallback, 25), 25, 100),
    "DivergenceCallback": (DivergenceCallback, 10, 10),
    "StopOnSigterm": (StopOnSigterm, 0, 0),
}
SIDES |= {name: partial(SIDES["ImageTrainer"], callback=made) for name, (made, _, _) in CALLBACKS.items()}


def in_turns(make: Callable[[], Any], steps: int) -> dict[str, list[float]]:
    """The CPU seconds of each step of each side. The first steps are left out."""
    turns = Turns(list(SIDES))
    clocks = {side: Clock(partial(turns.next, side)) for side in SIDES}

    def run(side: str) -> None:
        turns.wait(side)
        torch.set_num_threads(1)
        try:
            SIDES[side](make, steps, clocks[side])
        finally:
            turns.leave()

    with ThreadPoolExecutor(len(SIDES)) as threads, redirect_stdout(sys.stderr):
        list(threads.map(run, SIDES))
    return {side: clock.steps[WARM_UP:] for side, clock in clocks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", choices=SIDES, help="print where the time of one side goes, and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        with cProfile.Profile() as trace:
            SIDES[given.profile](smallest, given.steps, Clock())
        pstats.Stats(trace).sort_stats("tottime").print_stats(40)
        return
    print(f"{given.steps} steps of each side; in brackets the 95% interval of the median difference")
    for network, make in NETWORKS.items():
        found = in_turns(make, given.steps)
        print(f"\n| {network} | microseconds a step | over Trainer |\n|---|---|---|")
        for side in [side for side in SIDES if side not in CALLBACKS]:
            more = sorted(differences(found, side, "Trainer"))
            reach = round(0.98 * math.sqrt(len(more)))  # of a sign test
            low, high = more[len(more) // 2 - reach], more[len(more) // 2 + reach]
            took, median = statistics.median(found[side]) * 1e6, statistics.median(more)
            print(f"| {side} | {took:,.0f} | {median:+,.0f} ({low:+,.0f} to {high:+,.0f}) |")
        print("\n| microseconds over ImageTrainer | a step | more where it looks | in all |\n|---|---|---|---|")
        for side, (_, every, usual) in CALLBACKS.items():
            more = differences(found, side, "ImageTrainer")
            looks = [every > 0 and number % every == 0 for number in range(WARM_UP, given.steps)]
            each = statistics.median(itertools.compress(more, map(operator.not_, looks)))
            if not every:
                print(f"| {side} | {each:+,.0f} | - | {each:+,.0f} |")
                continue
            look = statistics.median(itertools.compress(more, looks)) - each
            print(f"| {side} | {each:+,.0f} | {look:+,.0f}, every {usual} | {each + look / usual:+,.0f} |")


def differences(found: dict[str, list[float]], side: str, base: str) -> list[float]:
    """Microseconds by which a side's steps took longer than the next ones of another side."""
    return [(mine - other) * 1e6 for mine, other in zip(found[side], found[base], strict=True)]


if __name__ == "__main__":
    main()
